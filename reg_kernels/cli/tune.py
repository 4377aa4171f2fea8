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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, Trial

from .. import _console
from ..training import METHODS, Recipe
from ._errors import UsageError
from ._files import json_text, make_writable, write_result
from ._progress import Watch, duration
from ._recipe import RECIPE, add_recipe_arguments, methods_from, options_of, recipe_from
from ._setting import add_setting_arguments
from ._study import INTERRUPTED, Standing, Study, workers
from ._trial import (
    RESULT,
    Setting,
    add_trial_arguments,
    check_seeds,
    setting_from,
    take_share,
    workers_of,
)
from ._tune_results import best_of, draw, print_results, summary
from ._tune_space import BASE, Space, space_from
from .train import REGULARISED

TPE, RANDOM, GRID = SEARCHES = ("tpe", "random", "grid")
MEDIAN, HYPERBAND, NONE = PRUNERS = ("median", "hyperband", "none")
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
# The share of the epochs before which no trial is ended. Of 67 random recipes on the digits, the
# order after a tenth of the epochs has a rank correlation of 0.67 with that at the end; after a
# third of 0.84, and the third best is only the 41st yet; after a half of 0.93, and the best five
# are among the first 16.
WARMUP = 0.5
# So often a net's loss is told to the storage: SQLite takes 6 ms of processor time for each.
REPORTS = 20
PICTURE, TUNE, STUDY = "search.png", "tune.json", "study.db"
RESULTS = (PICTURE, TUNE, RECIPE)
NAME = "tune"  # of the study
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
    add_trial_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the files go; those of an earlier run are replaced (default: runs/tune-NAME by "
        "the name of the data)",
    )
    parser.add_argument(
        "--storage",
        metavar="FILE|URL",
        help=f"what keeps the trials: an SQLite file (.db), a journal (.log) or a URL of Optuna's "
        f"(default: {STUDY} in the --out directory)",
    )
    add_recipe_arguments(parser)


@dataclass(frozen=True)
class Plan:
    """What is searched, and where it is kept."""

    space: Space
    setting: Setting
    storage: str
    seeds: range
    fresh: range  # the seeds of the retraining
    search: str
    points: int
    trials: int
    prune: str

    @property
    def folds(self) -> range:
        return range(max(1, self.setting.folds))

    def about(self) -> dict[str, Any]:
        """What the results of trials depend on, apart from their strengths."""
        return (
            self.setting.about()
            | {"seed": self.seeds[0], "seeds": len(self.seeds)}
            | {"methods": {axis.name: [axis.least, axis.most] for axis in self.space.axes}}
            | dataclasses.asdict(self.space.base)
        )

    def study(self, process: int = 0) -> Study:
        """The search, as a process of this command goes on with it, by its number."""

        def sampler(begun: int) -> optuna.samplers.BaseSampler:
            # Processes that drew the same numbers would try the same recipes.
            state = np.random.SeedSequence((self.seeds[0], begun, process)).generate_state(1)
            if self.search == TPE:
                return optuna.samplers.TPESampler(
                    seed=int(state[0]), multivariate=True, constant_liar=True
                )
            return optuna.samplers.RandomSampler(int(state[0]))

        drawn = None if self.search == GRID else sampler
        return Study(
            self.storage, NAME, self.about(), self.space.distributions, drawn, self._pruner()
        )

    def _pruner(self) -> optuna.pruners.BasePruner:
        steps = self.space.base.epochs * len(self.seeds) * len(self.folds)
        if self.prune == MEDIAN:
            return optuna.pruners.MedianPruner(n_warmup_steps=int(WARMUP * self.space.base.epochs))
        if self.prune == HYPERBAND:
            return optuna.pruners.HyperbandPruner(max(1, steps // 9), steps)
        return optuna.pruners.NopPruner()

    def to_confirm(self, standing: Standing) -> FrozenTrial | None:
        """The best trial, if it is another than the base and is to be retrained."""
        best = best_of(standing)
        if best is None or not self.fresh or self.space.recipe(best.params) == self.space.base:
            return None
        return best

    def confirmation(self) -> Study:
        """The retraining, of any trials, so that a longer search need not begin it anew."""
        last = 2**31 - 1
        space = {
            "trial": IntDistribution(BASE, last),
            "seed": IntDistribution(0, 2**32 - 1),
            "fold": IntDistribution(0, len(self.folds) - 1),
        }
        return Study(self.storage, f"{NAME} confirmed", self.about(), space)

    def train(self, study: Study, trial: Trial, watch: Watch | None) -> float:
        """A trial of the search. One whose recipe was tried before has the same result."""
        recipe = self.space.recipe(trial.params)
        losses: list[float] = []
        results = []
        strengths = {axis.name: getattr(recipe, axis.name) for axis in self.space.axes}
        trial.set_user_attr("strengths", strengths)
        for other in study.trials():
            known = other.user_attrs
            if known.get("strengths") == strengths and RESULT in known and other.value is not None:
                trial.set_user_attr(RESULT, known[RESULT])
                return other.value
        every = max(1, recipe.epochs // REPORTS)
        for seed in self.seeds:
            for fold in self.folds:

                def after_epoch(epoch: int, history: Sequence[float]) -> None:
                    if watch is not None:
                        watch.epoch(epoch, history)
                    if self.prune == NONE or epoch % every:
                        return
                    mean = (sum(losses) + history[-1]) / (len(losses) + 1)
                    trial.report(mean, len(losses) * recipe.epochs + epoch)
                    if trial.should_prune():
                        raise optuna.TrialPruned

                if watch is not None:
                    watch.begins(f"trial {trial.number}", recipe.epochs)
                result = self.setting.train(recipe, seed, fold, after_epoch, tested=False)
                results.append(result)
                losses.append(_loss(result))
        trial.set_user_attr(RESULT, results)
        return math.fsum(losses) / len(losses)

    def retrain(self, study: Study, best: FrozenTrial, watch: Watch | None) -> Standing:
        """The best trial's recipe and the base, on fresh seeds."""
        recipes = {BASE: self.space.base, best.number: self.space.recipe(best.params)}
        names = {BASE: "base", best.number: "best"}

        def train(trial: Trial) -> float:
            number, seed, fold = (trial.params[name] for name in ("trial", "seed", "fold"))
            if watch is not None:
                watch.begins(f"{names[number]}, seed {seed}", recipes[number].epochs)
            after_epoch = (lambda *_: None) if watch is None else watch.epoch
            result = self.setting.train(recipes[number], seed, fold, after_epoch)
            trial.set_user_attr(RESULT, result)
            return _loss(result)

        show = (lambda _: None) if watch is None else watch.stands
        return study.work(train, self.retrainings(best), show=show)

    def retrainings(self, best: FrozenTrial) -> list[dict[str, int]]:
        return [
            {"trial": number, "seed": seed, "fold": fold}
            for seed in self.fresh
            for fold in self.folds
            for number in (BASE, best.number)
        ]

    def work(self, study: Study, until: float, watch: Watch | None) -> Standing:
        """Tries recipes until there are enough, or it is time."""

        def objective(trial: Trial) -> float:
            return self.train(study, trial, watch)

        show = (lambda _: None) if watch is None else watch.stands
        space = self.space
        if self.search == GRID:
            tasks = space.grid(self.points, self.trials)
            return study.work(objective, tasks, until=until, show=show)
        # What there is to be better than comes first, and then a guess.
        first = [space.numbers(recipe) for recipe in (space.base, space.usual)][: self.trials]
        study.work(objective, first, until=until, wait=False, show=show)
        return study.work(objective, most=self.trials, until=until, show=show)


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
    out = _out(args)
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


def _loss(result: dict[str, Any]) -> float:
    loss = result["measures"]["validation_loss"]
    return math.inf if loss is None else float(loss)


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
        storage=args.storage or str(_out(args) / STUDY),
        seeds=seeds[: args.seeds],
        fresh=seeds[args.seeds :],
        search=args.search,
        points=args.points,
        trials=trials,
        prune=args.prune,
    )


def _out(args: argparse.Namespace) -> Path:
    out: Path | None = args.out
    return out or Path("runs") / f"{NAME}-{Path(args.data).stem}"


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
