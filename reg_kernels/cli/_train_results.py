"""What `train` shows of its metrics: a picture and a table."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .. import _console
from ._trainer.training import ATTACKED


def draw(path: Path, metrics: dict[str, Any]) -> None:
    """Curves of accuracy and loss, of training and test sets, by recipe."""
    # A Figure of its own, without pyplot: no display is looked for and no global state is touched.
    colours = {"plain": "#d95f02", "regularised": "#1b6ca8", "augmented": "#3a7d44"}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    settled = []
    for axes, measure in zip(panels, ("accuracy", "loss"), strict=True):
        for name, runs in _by_recipe(metrics).items():
            history = _means([run["history"] for run in runs])
            epochs = [row["epoch"] for row in history]
            best = statistics.fmean(run["final"]["best_epoch"] for run in runs)
            if runs[0]["early_stopping"]:
                axes.axvline(best, color=colours[name], linewidth=0.8, linestyle=":")
            for part, style in (("train", "--"), ("test", "-")):
                values = [row[f"{part}_{measure}"] for row in history]
                label = f"{name}, {part}"
                if measure == "accuracy":
                    label += f" ({values[-1]:.1%})"
                    settled += values[len(values) // 10 :]
                axes.plot(
                    epochs,
                    values,
                    style,
                    color=colours[name],
                    linewidth=1.8 if part == "test" else 1.2,
                    marker="o" if len(epochs) == 1 else None,
                    label=label,
                )
            if measure == "accuracy" and ATTACKED in runs[0]["final"]:
                values = [row[ATTACKED] for row in history]
                settled += values[len(values) // 10 :]
                label = f"{name}, test attacked ({values[-1]:.1%})"
                axes.plot(epochs, values, ":", color=colours[name], linewidth=1.8, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(measure)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if measure == "accuracy":  # the other panel has the same lines
            axes.legend(frameon=False)
    # The climb of the first epochs would squeeze the gap, which the chart is about.
    panels[0].set_ylim(max(0.0, min(settled) - 0.02), 1.005)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].set_yscale("log")
    panels[1].set_ylabel("cross-entropy (log scale)")
    gaps = ", ".join(f"{name} {100 * final['gap']:.1f}" for name, final in _finals(metrics).items())
    sizes, seeds = metrics["images"], metrics["options"]["seeds"]
    figure.suptitle(
        f"{sizes['train']} training images, {sizes['test']} test images"
        f"{f', means of {seeds} seeds' if seeds > 1 else ''}\n"
        f"train minus test accuracy, in points: {gaps}"
    )
    figure.savefig(path, dpi=130)


def _by_recipe(metrics: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each recipe, one for each seed."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in metrics["runs"].values():
        runs.setdefault(run["recipe"], []).append(run)
    return runs


def _means(histories: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Row by row, the mean over the seeds of each measure, as far as all of them went."""
    return [
        {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        for rows in zip(*histories, strict=False)
    ]


def _finals(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By recipe, the means over the seeds of what training ended with."""
    return {
        name: _means([[run["final"]] for run in runs])[0]
        for name, runs in _by_recipe(metrics).items()
    }


def print_results(metrics: dict[str, Any]) -> None:
    """A table with a row for each recipe and, of several seeds, how they compare."""
    seconds, seeds = metrics["seconds_per_epoch"], metrics["options"]["seeds"]
    finals, runs = _finals(metrics), _by_recipe(metrics)
    attacked = any(ATTACKED in final for final in finals.values())
    stops = any(run["early_stopping"] for of in runs.values() for run in of)
    sparse = any(run["l1"] for of in runs.values() for run in of)
    columns = ["net", "train", "test", "gap", *(["test attacked"] if attacked else [])]
    columns += [*(["best epoch"] if stops else []), *(["exact zeros"] if sparse else [])]
    if seconds:
        columns += ["s/epoch PyTorch", f"s/epoch fused ({seconds['fused_implementation']})"]
    rows = []
    for name, final in finals.items():
        cells = [
            name,
            f"{final['train_accuracy']:.2%}",
            f"{final['test_accuracy']:.2%}",
            f"{100 * final['gap']:.2f} points",
        ]
        cells += [f"{final[ATTACKED]:.2%}"] if attacked else []
        cells += [f"{final['best_epoch']:g} of {final['epochs']:g}"] if stops else []
        cells += [f"{final['zeros']:,.0f} of {final['weights']:,.0f}"] if sparse else []
        if seconds:
            cells += [f"{seconds[name][kind]:.4f}" for kind in ("eager", "fused")]
        rows.append(tuple(cells))
    _console.print_table(f"means of {seeds} seeds" if seeds > 1 else "", columns, rows, words=1)
    if seeds == 1:
        return
    for before, after in itertools.pairwise(runs):
        gains = [
            100 * (run["final"]["test_accuracy"] - other["final"]["test_accuracy"])
            for run, other in zip(runs[after], runs[before], strict=True)
        ]
        print(
            f"{after} against {before}, on the test set: {statistics.fmean(gains):+.2f} points "
            f"({min(gains):+.2f} to {max(gains):+.2f}), better for {sum(g > 0 for g in gains)} of "
            f"{seeds} seeds"
        )
