"""Charts of the measurements, each naming the device, the commit and the versions it is of.

A .png is of few colours and holds no date, so that it is small and two charts of the same figures
are the same file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from math import log, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._measure import COMPILE, COPY, EAGER
from ._report import conditions, overview_cases
from ._results import counts_bytes, has_goals, key_of, speed_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Case = dict[str, Any]

_OURS = {"native": "#1b6ca8", "triton": "#2a9d6f"}
_OTHERS = {EAGER: ("#d95f02", "o"), COMPILE: ("#b8860b", "D"), COPY: ("#555555", "|")}
_PEERS = ("#b04a8f", "#6b8e23", "#7a5fa8", "#888888", "#8c564b")
_PER_CASE = 0.22  # inches
_DPI = 100
_COLOURS = 64  # of a .png


def draw_overview(path: Path, data: dict[str, Any]) -> None:
    """A bar an op: how many times faster ours is than eager, with torch.compile as a mark."""
    from matplotlib.figure import Figure

    cases = [case for case in overview_cases(data) if _ours(case, EAGER)]
    figure = Figure(figsize=(9, 1.7 + 0.34 * max(4, len(cases))))
    figure.set_layout_engine("constrained", rect=(0, 0, 0.97, 1))
    axes = figure.subplots()
    _label_rows(axes, (case["label"].replace(" float32", ",") for case in cases), size=9)
    figures = {EAGER: 1.03, COMPILE: 1.18}  # where they stand beside the chart, in widths of it
    beside = axes.get_yaxis_transform()
    for name, x in figures.items():
        axes.text(x, -0.75, name, transform=beside, fontsize=9, color="#666666")
    for y, case in enumerate(cases):
        row = _ours(case, EAGER)[0]
        over = {name: found for name in figures if (found := speed_over(row, name))}
        eager = over[EAGER]
        axes.barh(y, eager.median - 1, 0.62, left=1, color=_OURS[row["name"]], label="than eager")
        axes.plot((eager.lower, eager.upper), (y, y), color="#222222", linewidth=1.2)
        if COMPILE in over:
            colour, mark = _OTHERS[COMPILE]
            axes.plot(over[COMPILE].median, y, mark, color=colour, label="than torch.compile")
        for name, found in over.items():
            text = f"{found.median:.2g}×"
            axes.text(figures[name], y, text, transform=beside, fontsize=9, va="center")
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_xlabel("times faster (the line at a bar's end: quartiles of the rounds)", fontsize=9)
    _finish(figure, axes, data, path)


def draw_shares(path: Path, data: dict[str, Any]) -> None:
    """The roofline: a bar for each kernel, its share of the copy's bytes/s in the same rounds; the
    other contenders are marks on it."""
    cases = [c for c in _drawn(data) if counts_bytes(c)]
    figure, axes = _rows_of(cases, "bytes/s over Tensor.copy_'s (dashed: the copy)")
    names = _others(data)
    for y, case in enumerate(cases):
        for number, row in enumerate(_ours(case, COPY)):
            share, height = row["speed_over"][COPY][1], 0.7 / (number + 1)
            axes.barh(y, share, height, color=_OURS[row["name"]], label=row["name"])
        found = {row["name"]: row["median"] for row in case["contenders"] if "median" in row}
        for name in names:
            if name in found and COPY in found:
                _mark(axes, found[COPY] / found[name], y, name, names)
    _finish(figure, axes, data, path)


def draw_speedups(path: Path, data: dict[str, Any]) -> None:
    """How many times faster ours is than each other contender, on a logarithmic axis."""
    cases = _drawn(data)
    figure, axes = _rows_of(cases, "times faster than (dashed: level)")
    axes.set_xscale("log")
    _plain_ticks(axes)
    names = _others(data)
    for y, case in enumerate(cases):
        for row in _ours(case)[:1]:
            found = {n: over.median for n in names if (over := speed_over(row, n))}
            if found:
                reach = (*found.values(), 1.0)
                axes.plot((min(reach), max(reach)), (y, y), color="#cccccc", linewidth=2, zorder=1)
            for name, speedup in found.items():
                _mark(axes, speedup, y, name, names)
    _finish(figure, axes, data, path)


def draw_growth(path: Path, data: dict[str, Any]) -> None:
    """Time against size, or against the number of tensors: a panel for each op and axis."""
    from matplotlib.figure import Figure

    panels = _panels(data)
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for (name, cases), axes in zip(panels.items(), grid, strict=False):
        curves: dict[str, list[tuple[int, float]]] = {}
        for case in cases:
            for row in case["contenders"]:
                if "median" in row and row["name"] in (*_OURS, EAGER, COPY):
                    curves.setdefault(row["name"], []).append((_size(case), row["median"]))
        ends = []
        for contender, points in curves.items():
            colour = _OURS.get(contender) or _OTHERS[contender][0]
            width = 2.2 if contender in _OURS else 1.3
            style = ":" if contender == COPY else "-"
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, style, color=colour, linewidth=width, label=contender)
            ends.append((x[-1], y[-1], "ours" if contender in _OURS else contender, colour))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("tensors" if cases[0]["tensors"] else "elements", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.yaxis.set_major_formatter(_seconds)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.03)
        _label_ends(axes, ends)
    for axes in list(grid):
        axes.set_axis_off()
    figure.supxlabel(
        "seconds of a call; copy: Tensor.copy_ of as many bytes; an optimizer's eager: fused=True",
        fontsize=9,
    )
    _save(figure, data, path)


def _panels(data: dict[str, Any]) -> dict[str, list[Case]]:
    """The cases of a series for each op and axis; backwards alone are in the table."""
    series: dict[str, list[Case]] = {}
    for case in data["benchmarks"]:
        if case["series"] and not case["series"].endswith(" backward"):
            series.setdefault(case["series"], []).append(case)
    first: dict[tuple[str, bool], str] = {}
    for name, (case, *_) in series.items():
        first.setdefault((case["op"], bool(case["tensors"])), name)
    return {name: series[name] for name in first.values()}


def _seconds(value: float, position: int) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size * 0.999:
            return f"{value / size:.0f} {unit}"
    return f"{value * 1e6:.3g} µs"


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names curves at their right ends, one above the other where those are close."""
    low, high = map(log, axes.get_ylim())
    apart = 0.075 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    at = [log(y) for _, y, _, _ in ends]
    for _ in range(10):
        for i in range(1, len(at)):
            push = max(0.0, apart - (at[i] - at[i - 1])) / 2
            at[i - 1], at[i] = at[i - 1] - push, at[i] + push
    points = axes.get_window_extent().height * 72 / axes.figure.dpi / (high - low)
    for (x, y, text, colour), height in zip(ends, at, strict=True):
        offset = (4, (height - log(y)) * points)
        axes.annotate(
            *(text, (x, y), offset),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="center",
        )


def _drawn(data: dict[str, Any]) -> list[Case]:
    """The benchmarks that have a line in a chart: those with goals, networks, and the largest of
    each op. All are in the tables."""
    overview = overview_cases(data)
    return [
        case
        for case in data["benchmarks"]
        if has_goals(case) or case in overview or (case["items"] and not case["series"])
    ]


def _size(case: Case) -> int:
    return int(case["tensors"] or prod(case["shape"]))


def _ours(case: Case, over: str | None = None) -> list[Case]:
    """Our contenders that were timed, beside `over` where that is given, and are made for speed, in
    the order of choice: not the reference, nor an instruction set below the CPU's own."""
    return [
        row
        for row in case["contenders"]
        if row["name"] in _OURS and "median" in row and (over is None or speed_over(row, over))
    ]


def _others(data: dict[str, Any]) -> list[str]:
    peers = (peer for case in data["benchmarks"] for peer in case["peers"])
    return [EAGER, COMPILE, *dict.fromkeys(peers)]


def _mark(axes: Axes, x: float, y: float, name: str, names: list[str]) -> None:
    if name in _OTHERS:
        colour, mark = _OTHERS[name]
    else:
        peers = [other for other in names if other not in _OTHERS]
        colour, mark = _PEERS[peers.index(name) % len(_PEERS)], "s"
    axes.plot(x, y, mark, color=colour, markersize=4, label=name)


def _rows_of(cases: list[Case], label: str) -> tuple[Figure, Axes]:
    """A figure with a line for each case."""
    # A Figure of its own, without pyplot: no display is looked for and no global state is touched.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + _PER_CASE * max(4, len(cases))), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="#444444", linewidth=1, linestyle="--", zorder=0.5)
    _label_rows(axes, map(key_of, cases), size=8)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    return figure, axes


def _label_rows(axes: Axes, labels: Iterable[str], size: int) -> None:
    labels = list(labels)
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set_ylim(max(len(labels), 1) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, axes: Axes, data: dict[str, Any], path: Path) -> None:
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))  # one of each
    if known:
        figure.legend(
            known.values(),
            known.keys(),
            loc="outside lower center",
            ncols=len(known),
            frameon=False,
            fontsize=8,
        )
    _save(figure, data, path)


def _save(figure: Figure, data: dict[str, Any], path: Path) -> None:
    figure.suptitle("\n".join(conditions(data)), fontsize=8)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    if path.suffix != ".png":
        figure.savefig(path)
        return
    from PIL import Image  # matplotlib writes .png by it

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    image = Image.open(drawn, formats=["PNG"]).convert("RGB")
    image = image.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE)
    image.save(path, "PNG", optimize=True)
