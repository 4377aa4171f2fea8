"""What is shown of the measurements: tables in the terminal and in Markdown, and a chart."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._measure import COMPILE, COPY, EAGER, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
BASELINES = (COPY, EAGER, COMPILE)

RESULT_COLUMNS = (
    "benchmark",
    "implementation",
    "time",
    "copy",
    "eager",
    "compile",
    "kept",
    "peak",
    "goals",
)
GOAL_COLUMNS = ("benchmark", "goal", "measured", "")


def to_json(data: dict[str, Any]) -> str:
    """`data` as indented JSON with each list of numbers on one line, since they are long."""
    text = json.dumps(data, indent=1, allow_nan=False)
    numbers = re.compile(r"\[\s+(-?\d[\d.eE+-]*(?:,\s+-?\d[\d.eE+-]*)*)\s+\]")
    return numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def format_seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def result_rows(
    data: dict[str, Any], implementations: Container[str] | None = None
) -> list[tuple[str, ...]]:
    """A row for each benchmark and implementation of ours, all or these, as RESULT_COLUMNS.

    `copy` is the share of its bandwidth; beside eager's and torch.compile's times stands how many
    times faster ours is; behind our peak of memory stands eager's.
    """
    rows = []
    for case in data["benchmarks"]:
        found = {row["name"]: row for row in case["contenders"]}
        for name, row in found.items():
            if name in BASELINES or name in case.get("peers", ()) or "skipped" in row:
                continue
            if implementations is not None and name not in implementations:
                continue
            if "wrong" in row:
                blanks = ("",) * (len(RESULT_COLUMNS) - 3)
                rows.append((case["label"], name, "WRONG VALUES", *blanks))
                continue
            rows.append(
                (
                    case["label"],
                    name,
                    f"{format_seconds(row['median'])} ({_spread(row)}){_per_tensor(row)}",
                    f"{row['share_of_copy']:.2f}" if COPY in found and _bytes_count(case) else "",
                    _beside(row, found.get(EAGER), f"speedup_over_{EAGER}"),
                    _beside(row, found.get(COMPILE), f"speedup_over_{COMPILE}"),
                    format_bytes(row["kept_bytes"]) if "kept_bytes" in row else "",
                    _peak(row, found.get(EAGER)),
                    _verdict(row.get("goals", [])),
                )
            )
    return rows


def peer_table(
    data: dict[str, Any], implementations: Container[str] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and a row for each implementation of ours, all or these, in benchmarks that have
    peers: a peer's time, how many times faster ours is, and the peer's peak of memory."""
    cases = [case for case in data["benchmarks"] if case.get("peers")]
    peers = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    rows = []
    for case in cases:
        found = {row["name"]: row for row in case["contenders"]}
        for name, row in found.items():
            if name in BASELINES or name in peers or "median" not in row:
                continue
            if implementations is not None and name not in implementations:
                continue
            cells = []
            for peer in peers:
                cell = _beside(row, found.get(peer), f"speedup_over_{peer}")
                peak = f", {format_bytes(found[peer]['peak_bytes'])}" if cell else ""
                cells.append(cell + peak)
            rows.append((case["label"], name, *cells))
    return ("benchmark", "implementation", *peers), rows


def goal_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each goal, as GOAL_COLUMNS: where each figure stands against its floor."""
    rows = []
    for case in data["benchmarks"]:
        for row in case["contenders"]:
            for goal in row.get("goals", []):
                verdict = {True: "met", False: "MISSED", None: ""}[goal["met"]]
                text = f"{row['name']}: {goal['text']}"
                rows.append((case["label"], text, _measured(goal), verdict))
    return rows


def notes(data: dict[str, Any]) -> list[str]:
    """Contenders that did not run, or ran wrong, and why: one line for each reason."""
    cases: dict[str, list[str]] = {}
    for case in data["benchmarks"]:
        for row in case["contenders"]:
            if "wrong" in row:
                cases.setdefault(f"WRONG VALUES: {row['wrong']}", []).append(case["label"])
            elif "skipped" in row:
                text = f"{row['name']} was not measured: {row['skipped']}"
                cases.setdefault(text, []).append(case["label"])
    lines = [
        text if len(where) == len(data["benchmarks"]) else f"{text} ({len(where)} benchmarks)"
        for text, where in cases.items()
    ]
    return lines + [f"left out: {row['label']}: {row['reason']}" for row in data["left_out"]]


def wrong(data: dict[str, Any]) -> list[str]:
    """What contenders computed wrongly."""
    return [row["wrong"] for c in data["benchmarks"] for row in c["contenders"] if "wrong" in row]


def conditions(data: dict[str, Any]) -> list[str]:
    """The lines above every table: device, commit, versions, settings."""
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)
    device = data["device"]
    where = device["name"] + (f", driver {device['driver']}" if device["driver"] else "")
    lines = [where, f"commit {format_commit(data['commit'])}, {data['date']}", versions]
    if device["type"] == "cpu":
        warm = "keeps freed memory" if data["allocator"] else "as it is by default"
        lines.append(f"{data['threads']} threads, {data['isa'] or 'no native code'}, malloc {warm}")
    return lines


def format_commit(commit: dict[str, Any] | None) -> str:
    if commit is None:
        return "unknown"
    note = {True: " with changes", False: "", None: " (as stated, not verified)"}[commit["dirty"]]
    return commit["hash"][:12] + note


def rich_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    previous = None
    for row in rows:
        style = "bold red" if "MISSED" in row or "WRONG VALUES" in row else ""
        cells = [Text(cell) for cell in row]
        if row[0] == previous:
            cells[0] = Text("")
        previous = row[0]
        table.add_row(*cells, style=style)
    return table


def markdown(data: dict[str, Any], implementations: Container[str] | None = None) -> str:
    """Conditions, results and goals of one run; of all implementations of ours, or of these."""
    parts = [
        "\n".join(f"{line}  " for line in conditions(data)).rstrip(),
        markdown_table(RESULT_COLUMNS, result_rows(data, implementations)),
        "Times are medians, with quartiles. `copy`: bytes/s over those of `Tensor.copy_` in the "
        "same run. `eager`, `compile`: their time, and how many times faster ours is. `kept`: "
        "bytes saved for the backward, inputs included. `peak`: bytes allocated at the peak of a "
        "call beyond what it returns, and eager's.",
    ]
    columns, rows = peer_table(data, implementations)
    if rows:
        parts.append(markdown_table(columns, rows))
        parts.append(
            "`fused`, `foreach`: torch.optim's step with that option; `optimi`: torch-optimi's "
            "Triton kernels; `liger`: Liger-Kernel's. Each with its time, how many times faster "
            "ours is, and its peak."
        )
    if rows := goal_rows(data):
        parts.append(markdown_table(GOAL_COLUMNS, rows))
    if lines := notes(data):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], words: int = 2) -> str:
    """A table whose first `words` columns are words, and the others figures."""
    lines = [columns, tuple("---" if i < words else "---:" for i in range(len(columns))), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def draw(path: Path, data: dict[str, Any]) -> None:
    """A bar for each benchmark and contender: the share of the copy's bandwidth."""
    # A Figure of its own, without pyplot: no display is looked for and no global state is touched.
    from matplotlib.figure import Figure

    cases = [case for case in data["benchmarks"] if _bytes_count(case)]
    names = list(
        dict.fromkeys(
            row["name"]
            for case in cases
            for row in case["contenders"]
            if "share_of_copy" in row and row["name"] != COPY
        )
    )
    palette = ("#1b6ca8", "#4f9bd0", "#9cc9e8", "#2a9d6f", "#86cbb0", "#7a5fa8")
    peers = list(dict.fromkeys(name for case in cases for name in case.get("peers", ())))
    ours = [name for name in names if name not in (*BASELINES, *peers)]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(ours)}
    greys = ("#555555", "#888888", "#bbbbbb")
    colours |= {name: greys[i % len(greys)] for i, name in enumerate(peers)}
    colours |= {EAGER: "#d95f02", COMPILE: "#f0b072"}

    ticks, labels = [], []
    seen = set()
    y = 0.0
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for case in cases:
        bars = [r for r in case["contenders"] if r["name"] in names and "share_of_copy" in r]
        for offset, row in enumerate(bars):
            name = row["name"]
            label = None if name in seen else name
            seen.add(name)
            share = row["share_of_copy"]
            axes.barh(y + offset, share, height=0.85, color=colours[name], label=label)
            text = f" {share:.2f}" if share >= 0.1 else f" {share:.1g}"
            axes.text(share, y + offset, text, va="center", fontsize=7)
        ticks.append(y + max(0, len(bars) - 1) / 2)
        labels.append(case["label"])
        y += len(bars) + 1
    figure.set_size_inches(10, max(3.0, 1.2 + 0.19 * y))
    axes.axvline(1.0, color="#444444", linewidth=1, linestyle="--")
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(max(y, 1.0) - 0.5, -1)
    axes.set_xlabel("bytes/s over Tensor.copy_ (dashed: as fast as the copy)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    if seen:
        figure.legend(loc="outside lower center", ncols=len(seen), frameon=False, fontsize=8)
    axes.set_title(f"{data['device']['name']}, torch {data['versions']['torch']}", fontsize=10)
    figure.savefig(path, dpi=130)


def _bytes_count(case: dict[str, Any]) -> bool:
    """Whether it is bytes that a benchmark's time goes by, and not calls."""
    return not case["host"] and not case.get("wall", False)


def _spread(row: dict[str, Any]) -> str:
    lower, upper = row["quartiles"]
    low, high = format_seconds(lower), format_seconds(upper)
    # One unit is enough where both have the same.
    if low.split()[1] == high.split()[1]:
        low = low.split()[0]
    return f"{low}–{high}"


def _beside(row: dict[str, Any], other: dict[str, Any] | None, figure: str) -> str:
    if other is None or "median" not in other or figure not in row:
        return ""
    return f"{format_seconds(other['median'])} ({_times(row[figure])})"


def _times(speedup: float) -> str:
    return f"{speedup:.0f}×" if speedup >= 9.95 else f"{speedup:.2g}×"


def _per_tensor(row: dict[str, Any]) -> str:
    """Where tensors are so small that their number is what counts."""
    seconds = row.get("seconds_per_tensor", 1)
    return f", {seconds * 1e6:.3g} µs a tensor" if seconds < 20e-6 else ""


def _peak(row: dict[str, Any], eager: dict[str, Any] | None) -> str:
    if "peak_bytes" not in row:
        return ""
    text = format_bytes(row["peak_bytes"])
    if eager is None or "peak_bytes" not in eager:
        return text
    return f"{text} ({format_bytes(eager['peak_bytes'])})"


def _measured(goal: dict[str, Any]) -> str:
    if goal["value"] is None:
        return "not measured"
    if goal["figure"].endswith("_bytes"):
        return format_bytes(goal["value"])
    return f"{goal['value']:.3g}"


def _verdict(goals: list[dict[str, Any]]) -> str:
    known = [goal["met"] for goal in goals if goal["met"] is not None]
    if not known:
        return ""
    return "met" if all(known) else f"MISSED {known.count(False)} of {len(known)}"
