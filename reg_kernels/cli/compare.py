"""Trains a small net with and without each method of regularisation, and says what each did.

Every method is looked at over paired seeds: the nets of a seed have the same images, weights and
batches, and differ in their methods alone. Prints what each changed in test accuracy and loss, the
gap between training and test set, calibration, time and memory, with intervals, and writes
effects.png, curves.png, compare.json and recipe.toml (of the nets without the methods) to the --out
directory. Nothing is chosen on the test set, which each net sees once, at its end.
The trainings are trials of an Optuna study in --storage. After Ctrl-C the same command goes on; the
same command in several processes, or on machines that share the storage, divides the work.
"""

from __future__ import annotations

import argparse
import sys

from .. import _console
from ..training import METHODS, Recipe
from ._compare_plan import DESIGNS, FACTORIAL, NAME, ONE_ON, Plan, arms_of
from ._compare_results import draw_curves, draw_effects, print_results, summary
from ._errors import INTERRUPTED, UsageError
from ._files import json_text, make_writable, write_result
from ._progress import Watch
from ._recipe import RECIPE, add_recipe_arguments, methods_from, recipe_from
from ._setting import check_seeds
from ._study import workers
from ._trial import (
    STUDY,
    add_trial_arguments,
    out_from,
    setting_from,
    take_share,
    workers_of,
)

MOST_TRIALS = 300  # unless --max-trials allows more
EFFECTS, CURVES, COMPARE = "effects.png", "curves.png", "compare.json"
RESULTS = (EFFECTS, CURVES, COMPARE, RECIPE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        metavar="NAME,...",
        help=f"the methods to look at, of {', '.join(METHODS)} (default: all that go with the "
        "model); they have the strength of the recipe or, where it has none, a usual one",
    )
    parser.add_argument(
        "--design",
        choices=DESIGNS,
        default=ONE_ON,
        help="nets with none of the methods and with each alone; with all of them and without "
        "each; or with every subset (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="trainings of each net, each with a split, weights and draws of its own; more of them "
        "can be asked for later (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the first of them (default: %(default)s)"
    )
    add_trial_arguments(parser, NAME)
    parser.add_argument(
        "--max-trials",
        type=int,
        default=MOST_TRIALS,
        metavar="N",
        help="refuse designs with more trainings than that (default: %(default)s)",
    )
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # Everything that can be wrong with the input is found here, before anything is written.
    plan = _plan(args)
    out = out_from(args, NAME)
    make_writable(out, RESULTS)
    study, tasks = plan.study(), plan.tasks()
    free = len(study.standing(tasks).free)
    count = max(1, min(workers_of(args, plan.setting.device), free))
    take_share(count)
    print(
        f"{len(plan.arms)} nets x {len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''}"
        f"{f' x {plan.setting.folds} folds' if plan.setting.folds else ''}: {len(tasks)} trials, "
        f"{len(tasks) - free} of them done; {plan.setting.kernels} kernels on "
        f"{plan.setting.device}, {count} at once",
        flush=True,
    )
    try:
        with workers(_help, count - 1, plan, count), _console.progress() as progress:
            standing = plan.work(study, Watch(progress, len(tasks)))
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from {plan.storage}", file=sys.stderr)
        return INTERRUPTED
    results = summary(plan, standing)
    write_result(out / EFFECTS, lambda path: draw_effects(path, results))
    write_result(out / CURVES, lambda path: draw_curves(path, results))
    base = plan.recipe.with_methods((), plan.methods)
    write_result(out / RECIPE, lambda path: path.write_text(base.to_toml()))
    write_result(out / COMPARE, lambda path: path.write_text(json_text(results)))
    print_results(results)
    print(f"wrote {', '.join(RESULTS[:-1])} and {RESULTS[-1]} to {out}")
    return 1 if results["crashed"] else 0


def _help(plan: Plan, count: int) -> None:
    """Another process at the same work."""
    take_share(count)
    plan.work(plan.study())


def _plan(args: argparse.Namespace) -> Plan:
    seeds = check_seeds(args.seed, args.seeds)
    recipe = recipe_from(args, Recipe())
    methods = methods_from(args.methods, recipe.model, METHODS)
    arms = 2 ** len(methods) if args.design == FACTORIAL else len(methods) + 1
    trials = arms * len(seeds) * (args.folds or 1)
    if trials > args.max_trials:
        raise UsageError(
            f"--design: would be {trials} trials, {arms} nets x {len(seeds)} seeds"
            f"{f' x {args.folds} folds' if args.folds else ''}, of at most {args.max_trials}; "
            "--max-trials allows more"
        )
    with_all = recipe.with_methods(methods, methods)
    return Plan(
        recipe=recipe,
        methods=methods,
        design=args.design,
        arms={arm.label: arm for arm in arms_of(recipe, methods, args.design)},
        seeds=seeds,
        setting=setting_from(args, attacked_by=with_all.adversarial),
        storage=args.storage or str(out_from(args, NAME) / STUDY),
    )
