"""Searches the strengths of methods of regularisation for the least validation loss.

Every method searched can as well be left out. Prints the best recipe as options of `train`, what
mattered, and what retraining on fresh seeds says: the best of many looks better than it is. Writes
search.png, tune.json and recipe.toml (of the best) to the --out directory. The test set is put
aside before the search, and that retraining alone looks at it.
The trials are kept in an Optuna study in --storage. After Ctrl-C the same command goes on, also
with more --trials or another --search; the same command in several processes, or on machines that
share the storage, divides the work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence

from .. import _console
from ..training import METHODS, Recipe
from ._errors import INTERRUPTED, UsageError
from ._files import json_text, make_writable, write_result
from ._progress import Watch, duration
from ._recipe import RECIPE, add_recipe_arguments, methods_from, options_of, recipe_from
from ._setting import add_setting_arguments, check_seeds
from ._study import Standing, workers
from ._trial import (
    STUDY,
    Setting,
    add_trial_arguments,
    out_from,
    setting_from,
    take_share,
    workers_of,
)
from ._tune_plan import GRID, MEDIAN, NAME, PRUNERS, SEARCHES, TPE, Plan, best_of
from ._tune_results import draw, print_results, summary
from ._tune_space import space_from
from .train import REGULARISED

TRIALS = 30  # without a budget
# Those that cost little time (no attacks, no teacher), one of each kind.
DEFAULT_METHODS = (
    "dropout",
    "weight_decay",
    "l1",
    "mixup",
    "label_smoothing",
    "drop_path",
    "noise",
    "augment",
)
PICTURE, TUNE = "search.png", "tune.json"
RESULTS = (PICTURE, TUNE, RECIPE)
_UNITS = {"s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        metavar="NAME,...",
        help=f"the methods whose strengths are searched, of {', '.join(METHODS)} (default: "
        f"{', '.join(DEFAULT_METHODS)}, as far as they go with the model); the others are as the "
        "recipe has them",
    )
    parser.add_argument(
        "--range",
        dest="ranges",
        action="append",
        default=[],
        metavar="METHOD=LEAST:MOST",
        help="strengths to search, instead of those that are usual; again for another method",
    )
    parser.add_argument(
        "--search",
        choices=SEARCHES,
        default=TPE,
        help="by what was found so far, at random, or all combinations (default: %(default)s)",
    )
    parser.add_argument(
        "--points",
        type=int,
        default=3,
        metavar="N",
        help="strengths of each method in a grid, which has it off as well (default: %(default)s)",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"recipes to try, those of earlier runs included (default: {TRIALS}, or as many as "
        "the budget allows)",
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="begin no trial that would not end within that time from now, as in 90s, 20m or 2h; "
        "the retraining comes after it (default: none)",
    )
    parser.add_argument(
        "--prune",
        choices=PRUNERS,
        default=MEDIAN,
        help="end trials early: below the median of the others at the same epoch, or all but the "
        "best third at some epochs (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="trainings of each trial, whose mean loss counts (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the first of them, the test set's and the search's (default: %(default)s)",
    )
    parser.add_argument(
        "--confirm",
        type=int,
        default=5,
        metavar="N",
        help="retrain the best recipe and the one without the methods on N seeds after those of "
        "the search, and compare them on the test set; 0 for none (default: %(default)s)",
    )
    add_trial_arguments(parser, NAME)
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # Everything that can be wrong with the input is found here, before anything is written.
    plan, budget = _plan(args), _budget(args.budget)
    most = max(plan.trials, 2 * len(plan.fresh) * len(plan.folds))
    count = min(workers_of(args, plan.setting.device), most)
    take_share(count)
    begun, until = time.monotonic(), math.inf
    if budget is not None:
        needed = _seconds_of_a_trial(plan)
        if needed > budget:
            raise UsageError(
                f"--budget {args.budget}: is too little for one trial, which takes about "
                f"{needed:.3g} s with all methods on"
            )
        until = begun + budget - needed
    out = out_from(args, NAME)
    make_writable(out, RESULTS)
    study = plan.study()
    before = len(study.standing().done)
    print(
        f"{plan.search} over {', '.join(axis.name for axis in plan.space.axes)}: {before} trials "
        f"done before; {plan.setting.kernels} kernels on {plan.setting.device}, {count} at once",
        flush=True,
    )

    def note(standing: Standing) -> str:
        best = best_of(standing)
        words = [] if best is None else [f"best {best.value:.4f} (trial {best.number})"]
        if budget is not None:
            left = max(0.0, begun + budget - time.monotonic())
            words.append(f"{duration(left)} of the budget left")
        return "".join(f", {word}" for word in words)

    try:
        with workers(_help, count - 1, plan, until, count), _console.progress() as progress:
            total = None if plan.trials == sys.maxsize else plan.trials
            standing = plan.work(study, until, Watch(progress, total, note))
            best, confirmed = best_of(standing), None
            if (found := plan.to_confirm(standing)) is not None:
                watch = Watch(progress, len(plan.retrainings(found)))
                confirmed = plan.retrain(plan.confirmation(), found, watch)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from {plan.storage}", file=sys.stderr)
        return INTERRUPTED
    results = summary(plan, standing, best, confirmed)
    if best is not None:
        recipe = plan.space.recipe(best.params)
        words = [*_setting_options(args, plan.setting), *options_of(recipe, REGULARISED)]
        results["best"]["command"] = shlex.join(["reg-kernels", "train", *words])
        write_result(out / RECIPE, lambda path: path.write_text(recipe.to_toml()))
    write_result(out / PICTURE, lambda path: draw(path, results))
    write_result(out / TUNE, lambda path: path.write_text(json_text(results)))
    print_results(results)
    names = RESULTS if best is not None else RESULTS[:-1]
    print(f"wrote {', '.join(names[:-1])} and {names[-1]} to {out}")
    return 1 if results["crashed"] or best is None else 0


def _help(plan: Plan, until: float, count: int) -> None:
    """Another process at the same work."""
    take_share(count)
    found = plan.to_confirm(plan.work(plan.study(os.getpid()), until, None))
    if found is not None:
        plan.retrain(plan.confirmation(), found, None)


def _seconds_of_a_trial(plan: Plan) -> float:
    """By the second epoch with all methods on: the first one has much to wake up."""
    usual = plan.space.usual
    times = [time.perf_counter()]

    class Enough(Exception):
        pass

    def after_epoch(epoch: int, _: Sequence[float]) -> None:
        times.append(time.perf_counter())
        if epoch == 2:
            raise Enough

    student = dataclasses.replace(usual, distillation=0.0)
    with contextlib.suppress(Enough):
        plan.setting.train(student, plan.seeds[0], after_epoch=after_epoch, tested=False)
    nets = len(plan.seeds) * len(plan.folds) * (2 if usual.distillation else 1)
    return (times[-1] - times[-2]) * usual.epochs * nets


# The arguments


def _plan(args: argparse.Namespace) -> Plan:
    for name, least in (("trials", 1), ("points", 1), ("seeds", 1), ("confirm", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name}: must be at least {least}, got {value}")
    seeds = check_seeds(args.seed, args.seeds + args.confirm)
    recipe = recipe_from(args, Recipe())
    methods = methods_from(args.methods, recipe.model, DEFAULT_METHODS)
    space = space_from(recipe, methods, args.ranges)
    trials = args.trials or (TRIALS if args.budget is None else sys.maxsize)
    if args.search == GRID:
        space.grid(args.points, trials)  # refused here if it is too large
    return Plan(
        space=space,
        setting=dataclasses.replace(setting_from(args, attacked_by=0.0), test_seed=args.seed),
        storage=args.storage or str(out_from(args, NAME) / STUDY),
        seeds=seeds[: args.seeds],
        fresh=seeds[args.seeds :],
        search=args.search,
        points=args.points,
        trials=trials,
        prune=args.prune,
    )


def _setting_options(args: argparse.Namespace, setting: Setting) -> list[str]:
    """The options by which `train` has the data of the first seed."""
    parser = argparse.ArgumentParser()
    add_setting_arguments(parser)
    usual = vars(parser.parse_args([])) | {"seed": 0}
    words = []
    for name, value in usual.items():
        if (here := getattr(args, name)) != value:
            words += [f"--{name.replace('_', '-')}", str(here)]
    if setting.validation_size:
        words += ["--validation-size", str(setting.validation_size)]
    return words


def _budget(text: str | None) -> float | None:
    """In seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or not (seconds := float(match[1]) * _UNITS[match[2]]):
        raise UsageError(f"--budget: must be a time above 0, as 90s, 20m or 2h, got {text!r}")
    return seconds
