"""What `compare` makes of its trials: effects, a table and pictures."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import _console
from ._compare_plan import ALL, FACTORIAL, Plan
from ._errors import printable
from ._statistics import LEVEL, effect, interaction, mean_difference
from ._study import Standing
from ._study_checks import RESULT
from ._trainer.training import ATTACKED

BETTER, WORSE, UNTOLD = "#1b6ca8", "#d95f02", "#888888"
MOST_PANELS = 24


@dataclass(frozen=True)
class Measure:
    """What a net is judged by."""

    title: str
    unit: str  # of a value: "%", "", "s" or "MiB"
    better: int  # 1 where more is better, -1 where less is

    @property
    def is_ratio(self) -> bool:
        """Whether it is compared as a ratio, as what a machine spends; else as a difference."""
        return self.unit in ("s", "MiB")

    def value(self, value: float | None) -> str:
        if value is None:
            return "-"
        if self.unit == "%":
            return f"{100 * value:.2f} %"
        if self.unit == "MiB":
            return f"{value / 2**20:.1f} MiB"
        return f"{value:.3f}" + (" s" if self.unit == "s" else "")

    def change(self, value: float) -> str:
        if self.is_ratio:
            return f"{value:.2f}"
        return f"{100 * value:+.2f}" if self.unit == "%" else f"{value:+.3f}"


MEASURES = {
    "test_accuracy": Measure("test accuracy", "%", 1),
    "test_loss": Measure("test loss", "", -1),
    "gap": Measure("gap", "%", -1),
    "test_ece": Measure("calibration error", "%", -1),
    ATTACKED: Measure("accuracy attacked", "%", 1),
    "seconds_per_epoch": Measure("epoch", "s", -1),
    "peak_bytes": Measure("step's memory", "MiB", -1),
}
DRAWN = ("test_accuracy", "test_loss", "gap", "test_ece")

# By arm and seed
Values = Mapping[str, Mapping[int, float]]


def summary(plan: Plan, standing: Standing) -> dict[str, Any]:
    """All that there is to tell, as compare.json has it."""
    trials = [t.params | {"number": t.number} | t.user_attrs[RESULT] for t in standing.done]
    folds = max(1, plan.setting.folds)
    values = {name: by_seed(list(plan.arms), trials, name, folds) for name in MEASURES}
    return {
        "about": plan.setting.about() | {"data": plan.setting.images.source},
        "design": plan.design,
        "methods": list(plan.methods),
        "seeds": list(plan.seeds),
        "arms": {
            label: {
                "on": [name for name in plan.methods if name in arm.on],
                "recipe": dataclasses.asdict(arm.recipe),
                "means": _means([t["measures"] for t in trials if t["arm"] == label]),
            }
            for label, arm in plan.arms.items()
        },
        "effects": {
            method: effects(values, functools.partial(mean_difference, pairs=_pairs(plan, method)))
            for method in plan.methods
        },
        "interactions": {
            f"{first} x {second}": effects(values, functools.partial(interaction, fours=fours))
            for first, second in itertools.combinations(plan.methods, 2)
            if (fours := _fours(plan, first, second))
        },
        "crashed": [
            trial.params | {"error": printable(trial.user_attrs["error"])}
            for trial in standing.crashed.values()
        ],
        "trials": trials,
    }


def by_seed(
    arms: list[str], trials: list[dict[str, Any]], name: str, folds: int
) -> dict[str, dict[int, float]]:
    """A measure by arm and seed, the mean over the folds; a ratio's logarithm. A seed of which a
    fold is missing, or is no number, is left out."""
    found: dict[tuple[str, int], list[float]] = {}
    for trial in trials:
        value = trial["measures"].get(name)
        if value is not None:
            found.setdefault((trial["arm"], trial["seed"]), []).append(value)
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for (arm, seed), parts in found.items():
        if len(parts) == folds:
            mean = statistics.fmean(parts)
            values[arm][seed] = math.log(mean) if MEASURES[name].is_ratio else mean
    return values


def _means(measures: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Of an arm's trials; None of what one of them has none of."""
    found: dict[str, float | None] = {}
    for name in measures[0] if measures else ():
        there = [value for each in measures if (value := each.get(name)) is not None]
        found[name] = statistics.fmean(there) if len(there) == len(measures) else None
    return found


def _pairs(plan: Plan, method: str) -> list[tuple[str, str]]:
    """The arms without and with a method that differ in it alone."""
    by_methods = {arm.on: label for label, arm in plan.arms.items()}
    return [
        (by_methods[on - {method}], label)
        for on, label in by_methods.items()
        if method in on and on - {method} in by_methods
    ]


def _fours(plan: Plan, first: str, second: str) -> list[tuple[str, str, str, str]]:
    """The arms with neither, the first, the second and both that differ in them alone."""
    by_methods = {arm.on: label for label, arm in plan.arms.items()}
    subsets = ((), (first,), (second,), (first, second))
    fours = []
    for on in by_methods:
        sets = [on.union(more) for more in subsets]
        if not on & {first, second} and all(each in by_methods for each in sets):
            neither, one, other, both = (by_methods[each] for each in sets)
            fours.append((neither, one, other, both))
    return fours


def effects(values: Mapping[str, Values], difference: Any) -> dict[str, Any]:
    """By measure: the mean effect, its interval and each seed's. Ratios are ratios again."""
    found = {}
    for name, measure in MEASURES.items():
        seeds = difference(values[name])
        if not seeds:
            continue
        back = math.exp if measure.is_ratio else float
        of = effect(seeds)
        low, high = (of.interval.low, of.interval.high) if of.interval else (None, None)
        found[name] = {
            "mean": back(of.mean),
            "low": None if low is None else back(low),
            "high": None if high is None else back(high),
            "seeds": {str(seed): back(value) for seed, value in seeds.items()},
        }
    return found


def verdict(effect: Mapping[str, Any], name: str) -> int:
    """1 where an effect is better for all that its interval says, -1 worse, 0 where it says
    neither."""
    if effect["low"] is None:
        return 0
    neutral = 1.0 if MEASURES[name].is_ratio else 0.0
    side = (effect["low"] > neutral) - (effect["high"] < neutral)
    return int(side * MEASURES[name].better)


def _ranked(results: Mapping[str, Any]) -> list[str]:
    """The methods, those first that gain most on the test set."""
    effects = results["effects"]
    there = [name for name in effects if "test_accuracy" in effects[name]]
    ranked = sorted(there, key=lambda name: -effects[name]["test_accuracy"]["mean"])
    return ranked + [name for name in effects if name not in there]


# Printed


def print_results(results: Mapping[str, Any]) -> None:
    """A table with a row a method, and what is to be known about it."""
    effects, arms = results["effects"], results["arms"]
    measures = {k: m for k, m in MEASURES.items() if any(k in of for of in effects.values())}
    (label, first), *_ = arms.items()
    rows = [(label, *(m.value(first["means"].get(k)) for k, m in measures.items()))]
    for method in _ranked(results):
        cells = [change(effects[method].get(name), name) for name in measures]
        rows.append((f"{'+ ' if label != ALL else ''}{method}", *cells))
    heads = [m.title + (" (ratio)" if m.is_ratio else "") for m in measures.values()]
    _console.print_table("", ["", *heads], rows, words=1)
    _console.print_lines(_notes(results))


def change(effect: Mapping[str, Any] | None, name: str) -> str:
    if effect is None:
        return "-"
    measure = MEASURES[name]
    mean, low, high = (effect[key] for key in ("mean", "low", "high"))
    if low is None or (measure.is_ratio and measure.change(low) == measure.change(high)):
        return measure.change(mean)  # memory is the same each time
    return f"{measure.change(mean)} [{measure.change(low)},{measure.change(high)}]"


def _notes(results: Mapping[str, Any]) -> list[str]:
    n = len(results["seeds"])
    what = "the other methods on or off" if results["design"] == FACTORIAL else "the same seed"
    lines = [
        f"with the method less without it, {what}: means of {n} paired "
        f"{'seeds' if n > 1 else 'seed'}"
        + (f" and {LEVEL:.0%} bootstrap intervals" if n > 1 else ", which tell nothing of chance")
        + "; percentages in points"
    ]
    if 1 < n < 6:
        lines.append(
            f"of {n} seeds no interval is wider than from the least to the greatest difference, "
            f"which misses the true one in some {2 ** (1 - n):.0%} of cases: --seeds gives more"
        )
    for arm in results["arms"].values():
        if arm["means"] and len(arm["on"]) <= 1:
            lines += _particulars(results, arm)
    runaway = sum(None in trial["measures"].values() for trial in results["trials"])
    if runaway:
        lines.append(
            f"trials that ended with a loss that is not finite, which leave their seed out of what "
            f"is said of it: {runaway}"
        )
    for crash in results["crashed"]:
        fold = f", fold {crash['fold']}" if results["about"]["folds"] else ""
        lines.append(f"crashed: {crash['arm']}, seed {crash['seed']}{fold}: {crash['error']}")
    return lines


def _particulars(results: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    """What a method has to be judged by besides."""
    means, recipe, lines = arm["means"], arm["recipe"], []
    if arm["on"] == ["early_stopping"]:
        epochs = (means["best_epoch"], means["epochs"], recipe["epochs"])
        lines.append(
            "early_stopping: {1:.0f} epochs of {2} trained, the best after {0:.0f}".format(*epochs)
        )
    if arm["on"] == ["l1"]:
        zeros, weights = means["zeros"], means["weights"]
        lines.append(
            f"l1: {zeros:,.0f} of {weights:,.0f} weights are exactly 0, {zeros / weights:.0%}"
        )
    teachers = [t["teacher"] for t in results["trials"] if "teacher" in t]
    if arm["on"] == ["distillation"] and teachers:
        seconds = statistics.fmean(t["seconds"] for t in teachers)
        lines.append(f"distillation: training the teacher took {seconds:.1f} s before that")
    return lines


# Drawn


def draw_effects(path: Path, results: Mapping[str, Any]) -> None:
    """A row a method: what it changed, with the interval and each seed's difference."""
    ranked, effects = _ranked(results)[::-1], results["effects"]
    names = [name for name in (*DRAWN, ATTACKED) if any(name in of for of in effects.values())]
    names = names or ["test_accuracy"]
    figure = Figure(figsize=(3 * len(names) + 1.5, 0.34 * len(ranked) + 1.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        measure = MEASURES[name]
        scale = 100 if measure.unit == "%" else 1
        for row, method in enumerate(ranked):
            if (of := effects[method].get(name)) is None:
                continue
            colour = {1: BETTER, -1: WORSE, 0: UNTOLD}[verdict(of, name)]
            seeds = [scale * value for value in of["seeds"].values()]
            axes.plot(seeds, [row] * len(seeds), "|", color=colour, alpha=0.5, markersize=7)
            if of["low"] is not None:
                axes.plot(
                    [scale * of["low"], scale * of["high"]], [row, row], color=colour, linewidth=2
                )
            axes.plot(scale * of["mean"], row, "o", color=colour, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(measure.title, fontsize=10)
        arrow = "more is better" if measure.better > 0 else "less is better"
        axes.set_xlabel(f"{'points' if scale == 100 else 'nats'}, {arrow}", fontsize=9)
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    panels[0].set_yticks(range(len(ranked)), ranked)
    panels[0].set_ylim(-0.6, len(ranked) - 0.4)
    count = len(results["seeds"])
    figure.suptitle(
        f"what each method changed: mean, {LEVEL:.0%} interval and each of {count} paired "
        f"{'seeds' if count > 1 else 'seed'}; blue better, orange worse, grey untold",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def draw_curves(path: Path, results: Mapping[str, Any]) -> None:
    """A panel a net: losses of the training and the validation set, of each seed, with the epoch of
    the least validation loss and, with early stopping, the end."""
    arms = results["arms"]
    shown = list(arms)
    if len(shown) > MOST_PANELS:  # of a factorial design: none, each alone, all
        shown = [k for k, arm in arms.items() if len(arm["on"]) <= 1][: MOST_PANELS - 1]
        shown.append(list(arms)[-1])
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.1 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for number, (axes, label) in enumerate(zip(grid.flat, shown, strict=False)):
        for trial in (t for t in results["trials"] if t["arm"] == label):
            _draw_losses(axes, trial, arms[label]["recipe"])
        axes.set_title(label, fontsize=9)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(labelbottom=number + columns >= len(shown))  # the lowest of its column
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("cross-entropy (log scale)", fontsize=10)
    figure.suptitle(
        "training (dashed) and validation; a dot where the validation loss is least; "
        "a line where training stopped early",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _draw_losses(axes: Any, trial: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    losses = trial["history"]["validation_loss"]
    epochs = range(1, len(losses) + 1)
    for part, style, colour in (("train", "--", WORSE), ("validation", "-", BETTER)):
        values = [math.nan if v is None else v for v in trial["history"][f"{part}_loss"]]
        axes.plot(epochs, values, style, color=colour, linewidth=0.9, alpha=0.7)
    there = [(loss, epoch) for epoch, loss in zip(epochs, losses, strict=True) if loss is not None]
    if there:
        least, at = min(there)
        axes.plot(at, least, "o", color=BETTER, markersize=3.5)
    if recipe["early_stopping"] and len(losses) < recipe["epochs"]:
        axes.axvline(len(losses), color="black", linewidth=0.7, linestyle=":")
