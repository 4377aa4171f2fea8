"""What `tune` makes of its trials: the best, what mattered, tables and a picture."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from .. import _console
from ..training import METHODS, Recipe
from ._compare_results import MEASURES, by_seed, change, effects
from ._errors import printable
from ._statistics import LEVEL, mean_difference
from ._study import Standing, task_key
from ._study_checks import RESULT
from ._tune_plan import GRID, Plan, ended_well
from ._tune_space import BASE

# So many trials are needed for importances. Beside those of 91 random recipes on the digits, nine
# methods, the importances of 10 of them are in a rank correlation of 0.48 and one of them is off by
# 0.30; of 20, 0.64 and 0.28; of 40, 0.71 and 0.22 (means of 16 draws).
IMPORTANCE_TRIALS = 20
_ARMS = ("base", "best")
_BLUE, _ORANGE, _GREY = "#1b6ca8", "#d95f02", "#888888"


def summary(
    plan: Plan,
    standing: Standing,
    best: FrozenTrial | None,
    confirmed: Standing | None,
) -> dict[str, Any]:
    """All that there is to tell, as tune.json has it."""
    crashed = [*standing.crashed.values()]
    crashed += [] if confirmed is None else confirmed.crashed.values()
    return {
        "about": plan.about() | {"data": plan.setting.images.source},
        "threads": torch.get_num_threads(),
        "search": plan.search,
        "prune": plan.prune,
        "methods": {
            axis.name: {"least": axis.least, "most": axis.most, "log": axis.log}
            for axis in plan.space.axes
        },
        "best": None if best is None else _told(plan, best),
        "base": _of_recipe(plan, standing, plan.space.base),
        "usual": _of_recipe(plan, standing, plan.space.usual),
        "importances": importances(standing),
        "confirmed": None
        if confirmed is None or best is None
        else _confirmed(plan, confirmed, best),
        "left": _left(plan, standing),
        "crashed": [t.params | {"error": printable(t.user_attrs["error"])} for t in crashed],
        "trials": [_told(plan, trial) for trial in standing.done],
    }


def _left(plan: Plan, standing: Standing) -> int:
    """The trials that the time did not suffice for, of those that were asked for."""
    if plan.search == GRID:
        return len(standing.free)
    begun = len(standing.done) + len(standing.crashed)
    return 0 if plan.trials == sys.maxsize else max(0, plan.trials - begun)


def _told(plan: Plan, trial: FrozenTrial) -> dict[str, Any]:
    """A trial of the search."""
    return {
        "number": trial.number,
        "pruned": trial.state == TrialState.PRUNED,
        "validation_loss": trial.value if ended_well(trial) else None,
        "strengths": trial.user_attrs["strengths"],
        "recipe": dataclasses.asdict(plan.space.recipe(trial.params)),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "losses": {str(step): loss for step, loss in sorted(trial.intermediate_values.items())},
        "trainings": trial.user_attrs.get(RESULT, []),
    }


def _of_recipe(plan: Plan, standing: Standing, recipe: Recipe) -> dict[str, Any] | None:
    """The trial of a recipe, if there was one."""
    there = (t for t in standing.done if plan.space.recipe(t.params) == recipe)
    trial = next(there, None)
    return None if trial is None else _told(plan, trial)


def importances(standing: Standing) -> dict[str, float] | None:
    """By method, the share of the losses' variance over the searched space that its strength
    explains by itself; None of too few trials. One that was ended early has the loss that it had
    by then: those that went to the end are the good ones, between which there is less to explain.

    Source: F. Hutter, H. Hoos, K. Leyton-Brown, "An efficient approach for assessing
    hyperparameter importance", ICML 2014.
    """
    study = optuna.create_study()
    for trial in standing.done:
        if trial.value is not None and math.isfinite(trial.value):
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.params, distributions=trial.distributions, value=trial.value
                )
            )
    if len(study.trials) < IMPORTANCE_TRIALS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(value) for name, value in found.items()}


def _confirmed(plan: Plan, confirmed: Standing, best: FrozenTrial) -> dict[str, Any]:
    """The base and the best on fresh seeds, and what the latter changed."""
    asked = {task_key(task) for task in plan.retrainings(best)}
    arms = dict(zip((BASE, best.number), _ARMS, strict=True))
    trials = [
        {"arm": arms[t.params["trial"]], "seed": t.params["seed"], "fold": t.params["fold"]}
        | t.user_attrs[RESULT]
        for t in confirmed.done
        if task_key(t.params) in asked
    ]
    values = {name: by_seed([*_ARMS], trials, name, len(plan.folds)) for name in MEASURES}
    means = {
        arm: {name: _mean(values[name][arm].values(), name) for name in MEASURES} for arm in _ARMS
    }
    return {
        "seeds": list(plan.fresh),
        "means": means,
        "effects": effects(values, functools.partial(mean_difference, pairs=[_ARMS])),
        "trials": trials,
    }


def _mean(values: Any, name: str) -> float | None:
    values = list(values)
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return math.exp(mean) if MEASURES[name].is_ratio else mean


# Printed


def print_results(results: Mapping[str, Any]) -> None:
    """What was found, as options of `train`, what mattered, and what retraining says."""
    _console.print_lines(_found(results))
    if (best := results["best"]) is not None:
        importances = results["importances"]
        heads = ["method", "searched", "best"]
        rows = []
        for name, of in results["methods"].items():
            searched = f"off, {of['least']:g} to {of['most']:g}{', log' if of['log'] else ''}"
            row = [name, "off, on" if METHODS[name].kind is bool else searched]
            row.append(_strength(best["strengths"][name]))
            rows.append((*row, *([f"{importances[name]:.0%}"] if importances else [])))
        heads += ["importance"] if importances else []
        _console.print_table("", heads, rows, words=2)
        if importances is None:
            _console.print_lines(
                [f"importances take {IMPORTANCE_TRIALS} trials with a finite loss"]
            )
        print(f"the best recipe: {best['command']}")
    if (confirmed := results["confirmed"]) is not None:
        means, found = confirmed["means"], confirmed["effects"]
        rows = [
            (
                m.title + " (ratio)" * m.is_ratio,
                *(m.value(means[arm][name]) for arm in _ARMS),
                change(found[name], name),
            )
            for name, m in MEASURES.items()
            if name in found
        ]
        n = len(confirmed["seeds"])
        heads = ["measure", *_ARMS, "best less base"]
        _console.print_table(f"retrained on {n} fresh seeds", heads, rows, words=1)
    _console.print_lines(_notes(results))


def _strength(value: Any) -> str:
    return f"{value:g}" if value and value is not True else "on" if value else "off"


def _found(results: Mapping[str, Any]) -> list[str]:
    trials = results["trials"]
    pruned = sum(trial["pruned"] for trial in trials)
    seconds = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
    text = f"{len(trials)} trials, {pruned} of them ended early"
    text += f", {sum(seconds) / len(seconds):.1f} s a trial" if seconds else ""
    if (best := results["best"]) is None:
        return [text, "no trial ended with a finite loss: nothing was found"]
    text += f"; validation loss {best['validation_loss']:.4f} at best (trial {best['number']})"
    for what, of in (("without the methods", "base"), ("with their usual strengths", "usual")):
        if results[of] is not None and (loss := results[of]["validation_loss"]) is not None:
            text += f", {loss:.4f} {what}"
    return [text]


def _notes(results: Mapping[str, Any]) -> list[str]:
    lines = []
    if (confirmed := results["confirmed"]) is not None:
        n = len(confirmed["seeds"])
        lines.append(
            "the test set, which the search did not see, is the same for all of them; "
            f"means of {n} paired {'seeds' if n > 1 else 'seed'}"
            + (
                f" and {LEVEL:.0%} bootstrap intervals"
                if n > 1
                else ", which tell nothing of chance"
            )
            + "; percentages in points"
        )
    elif all(results[of] for of in _ARMS) and len({results[of]["number"] for of in _ARMS}) == 1:
        lines.append("nothing that was tried is better than the net without the methods")
    if results["left"]:
        lines.append(f"trials left: {results['left']}: the same command goes on with them")
    for crash in results["crashed"]:
        told = ", ".join(f"{k} {v}" for k, v in crash.items() if k != "error")
        lines.append(f"crashed: {told}: {crash['error']}")
    return lines


# Drawn


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """The losses in the order of the trials, and a panel a method: its strength against them."""
    methods = results["methods"]
    columns = min(4, len(methods) + 1)
    rows = math.ceil((len(methods) + 1) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    whole = [t for t in results["trials"] if t["validation_loss"] is not None]
    ended = [t for t in results["trials"] if t["pruned"]]
    best = results["best"]
    history = next(panels)
    history.plot(
        [t["number"] for t in ended],
        [_last(t) for t in ended],
        "x",
        color=_GREY,
        markersize=4,
        label="ended early",
    )
    history.plot(
        [t["number"] for t in whole],
        [t["validation_loss"] for t in whole],
        "o",
        color=_BLUE,
        markersize=4,
        label="trials",
    )
    so_far = [min(t["validation_loss"] for t in whole[: i + 1]) for i in range(len(whole))]
    history.step(
        [t["number"] for t in whole], so_far, where="post", color=_ORANGE, label="best so far"
    )
    if results["base"] is not None and results["base"]["validation_loss"] is not None:
        history.axhline(
            results["base"]["validation_loss"],
            color="black",
            linewidth=0.8,
            linestyle=":",
            label="without the methods",
        )
    history.set_xlabel("trial")
    history.xaxis.set_major_locator(MaxNLocator(integer=True))
    history.legend(frameon=False, fontsize=7, loc="lower left")
    for name, of in methods.items():
        axes = next(panels)
        off = _off_at(of)
        for trials, mark, colour in ((ended, "x", _GREY), (whole, "o", _BLUE)):
            axes.plot(
                [t["strengths"][name] or off for t in trials],
                [_last(t) for t in trials],
                mark,
                color=colour,
                markersize=4,
                alpha=0.8,
            )
        if best is not None:
            axes.plot(
                best["strengths"][name] or off,
                best["validation_loss"],
                "*",
                color=_ORANGE,
                markersize=11,
            )
        _mark_off(axes, of, off)
        axes.set_xlabel(name)
    for axes in panels:
        axes.set_visible(False)
    for axes in figure.axes:
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7, which="both")
    figure.supylabel("validation loss (log scale)", fontsize=10)
    figure.suptitle(
        "the search, and each method's strengths; a star is the best; crosses ended early, with "
        "the loss that they had by then",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)


def _last(trial: Mapping[str, Any]) -> float:
    """The last loss of a trial that is known."""
    losses = [*trial["losses"].values(), trial["validation_loss"]]
    return float(next((loss for loss in reversed(losses) if loss is not None), math.nan))


def _off_at(of: Mapping[str, Any]) -> float:
    """Where a strength of 0 is drawn: to the left of the least."""
    if of["log"]:
        return float(of["least"] * (of["least"] / of["most"]) ** 0.15)
    return float(of["least"] - 0.15 * (of["most"] - of["least"]))


def _mark_off(axes: Any, of: Mapping[str, Any], off: float) -> None:
    """Strengths along the axis, from off."""
    if of["log"]:
        axes.set_xscale("log")
        ticks = [10.0**k for k in range(-9, 9)]
    else:
        ticks = list(MaxNLocator(4).tick_values(of["least"], of["most"]))
    ticks = [t for t in ticks if of["least"] <= t <= of["most"]]
    axes.set_xticks([off, *ticks], ["off", *(f"{t:g}" for t in ticks)])
    axes.minorticks_off()
