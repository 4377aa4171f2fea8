"""Charts of the measurements, each naming the device, the commit and the versions it is of.

An .svg holds text and no date, so that two charts of the same figures are the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._measure import COMPILE, COPY, EAGER
from ._report import conditions, counts_bytes, key_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = {"native": "#1b6ca8", "triton": "#2a9d6f"}
_OTHERS = {EAGER: ("#d95f02", "o"), COMPILE: ("#b8860b", "D"), COPY: ("#555555", "|")}
_PEERS = ("#b04a8f", "#6b8e23", "#7a5fa8", "#888888", "#8c564b")
_PER_CASE = 0.2  # inches


def draw_shares(path: Path, data: dict[str, Any]) -> None:
    """The roofline: a bar for each kernel, its share of the copy's bytes/s in the same rounds; the
    other contenders are marks on it."""
    cases = [c for c in _plain(data) if counts_bytes(c)]
    figure, axes = _rows_of(cases, data, "bytes/s over Tensor.copy_'s (dashed: the copy)")
    for y, case in enumerate(cases):
        for number, row in enumerate(_ours(case, "share_of_copy")):
            colour, height = _OURS[row["name"]], 0.7 / (number + 1)
            axes.barh(y, row["share_of_copy"], height, color=colour, label=row["name"])
        _marks(axes, y, case, "share_of_copy", _others(data))
    _finish(figure, axes, path)


def draw_speedups(path: Path, data: dict[str, Any]) -> None:
    """How many times faster ours is than each other contender, on a logarithmic axis."""
    cases = _plain(data)
    figure, axes = _rows_of(cases, data, "times faster than (dashed: level)")
    axes.set_xscale("log")
    names = _others(data)
    for y, case in enumerate(cases):
        for row in _ours(case, "median")[:1]:
            found = {n: row[f"speedup_over_{n}"] for n in names if f"speedup_over_{n}" in row}
            if found:
                reach = (*found.values(), 1.0)
                axes.plot((min(reach), max(reach)), (y, y), color="#cccccc", linewidth=2, zorder=1)
            for name, speedup in found.items():
                colour, mark = _style(name, names)
                axes.plot(speedup, y, mark, color=colour, markersize=5, label=name)
    _finish(figure, axes, path)


def draw_growth(path: Path, data: dict[str, Any]) -> None:
    """Time against size, or against the number of tensors: one chart for each series."""
    from matplotlib.figure import Figure

    series: dict[str, list[dict[str, Any]]] = {}
    for case in data["benchmarks"]:
        if case.get("series"):
            series.setdefault(case["series"], []).append(case)
    columns = min(3, max(1, len(series)))
    rows = max(1, -(-len(series) // columns))
    figure = Figure(figsize=(4 * columns, 3.2 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    others = _others(data)
    for (name, cases), axes in zip(series.items(), grid, strict=False):
        curves: dict[str, list[tuple[int, float]]] = {}
        for case in cases:
            for row in case["contenders"]:
                if "median" in row and (row["name"] in _OURS or row["name"] in (*others, COPY)):
                    curves.setdefault(row["name"], []).append((_size(case), row["median"]))
        for contender, points in curves.items():
            ours = contender in _OURS
            colour = _OURS[contender] if ours else _style(contender, others)[0]
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, ".-", color=colour, label=contender, linewidth=1.6 if ours else 1.0)
        axes.set_xscale("log", base=10 if cases[0]["tensors"] else 2)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("tensors" if cases[0]["tensors"] else "elements", fontsize=8)
        axes.set_ylabel("seconds", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    for axes in list(grid):
        axes.set_axis_off()
    figure.suptitle("\n".join(conditions(data)), fontsize=8)
    _save(figure, path)


def _plain(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that are no points of a curve."""
    return [case for case in data["benchmarks"] if not case.get("series")]


def _size(case: dict[str, Any]) -> int:
    if case["tensors"]:
        return int(case["tensors"])
    count = 1
    for extent in case["shape"]:
        count *= extent
    return count


def _ours(case: dict[str, Any], figure: str) -> list[dict[str, Any]]:
    """Our contenders that have this figure and are made for speed, in the order of choice: not the
    reference, nor an instruction set below the CPU's own."""
    return [row for row in case["contenders"] if row["name"] in _OURS and figure in row]


def _others(data: dict[str, Any]) -> list[str]:
    peers = (peer for case in data["benchmarks"] for peer in case.get("peers", ()))
    return [EAGER, COMPILE, *dict.fromkeys(peers)]


def _style(name: str, others: list[str]) -> tuple[str, str]:
    if name in _OTHERS:
        return _OTHERS[name]
    peers = [other for other in others if other not in _OTHERS]
    return _PEERS[peers.index(name) % len(_PEERS)], "s"


def _marks(axes: Axes, y: float, case: dict[str, Any], figure: str, names: list[str]) -> None:
    for row in case["contenders"]:
        if row["name"] in names and figure in row:
            colour, mark = _style(row["name"], names)
            axes.plot(row[figure], y, mark, color=colour, markersize=4, label=row["name"])


def _rows_of(cases: list[dict[str, Any]], data: dict[str, Any], label: str) -> tuple[Figure, Axes]:
    """A figure with a line for each case."""
    # A Figure of its own, without pyplot: no display is looked for and no global state is touched.
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.set_size_inches(10, 1.6 + _PER_CASE * max(4, len(cases)))
    axes = figure.subplots()
    axes.axvline(1.0, color="#444444", linewidth=1, linestyle="--", zorder=0.5)
    axes.set_yticks(range(len(cases)), [key_of(case) for case in cases], fontsize=7)
    axes.set_ylim(max(len(cases), 1) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_title("\n".join(conditions(data)), fontsize=8)
    return figure, axes


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
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
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    svg = path.suffix == ".svg"
    with matplotlib.rc_context({"svg.hashsalt": "reg_kernels", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if svg else None)
