"""What is shown of the measurements: tables in the terminal and in Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from ._measure import COMPILE, COPY, EAGER, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 2
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
RATE_COLUMNS = ("training step", "implementation", "time", "a second", "eager", "peak")
GROWTH_COLUMNS = ("curve", "size", "time", "copy", "eager")
SMALL_COLUMNS = ("benchmark", "contender", "host", "device", "graph")

RESULT_LEGEND = (
    "Times are medians, with quartiles. `copy`: bytes/s over those of `Tensor.copy_` in the same "
    "run. `eager`, `compile`: their time, and how many times faster ours is. `kept`: bytes saved "
    "for the backward, inputs included. `peak`: bytes allocated at the peak of a call beyond what "
    "it returns, and eager's."
)
PEER_LEGEND = (
    "`fused`, `foreach`: torch.optim's step with that option; `optimi`: torch-optimi's, `liger`: "
    "Liger-Kernel's, `timm`: timm's. Each with its time, how many times faster ours is, and its "
    "peak."
)
RATE_LEGEND = (
    "Forward, loss, backward and the optimizer's step. `eager`: the same network with PyTorch's "
    "layers and optimizer, and how many times faster ours is. `peak`: bytes allocated at the peak "
    "of a step, and eager's."
)
GROWTH_LEGEND = (
    "Time against size: ours, its share of the copy's bytes/s, and eager's time (an optimizer's "
    "with `fused=True`)."
)
SMALL_LEGEND = (
    "Small calls on the GPU: the host's time until a call is queued, the GPU's until it is done, "
    "and that of a replayed CUDA graph."
)

Wanted = Callable[[dict[str, Any]], bool]  # whether a benchmark is to be shown


def is_kernel(case: dict[str, Any]) -> bool:
    """Whether a benchmark is of one op at one size, and neither of a network nor of a curve."""
    return not case.get("items") and not case.get("series")


def has_goals(case: dict[str, Any]) -> bool:
    """Whether a benchmark of one op has a goal."""
    return is_kernel(case) and any(row.get("goals") for row in case["contenders"])


def is_ours(case: dict[str, Any], name: str) -> bool:
    return name not in BASELINES and name not in case.get("peers", ())


def counts_bytes(case: dict[str, Any]) -> bool:
    """Whether it is bytes that a benchmark's time goes by, and not calls."""
    return case["bytes"] is not None and not case["host"] and not case.get("wall", False)


def key_of(case: dict[str, Any]) -> str:
    """What tells a benchmark from the others of its report."""
    series = case.get("series", "")
    return f"{series}: {case['label']}" if series else case["label"]


def to_json(data: dict[str, Any]) -> str:
    """`data` as indented JSON, floats to 7 digits and each list of numbers on one line."""
    text = json.dumps(_rounded(data), indent=1, allow_nan=False)
    numbers = re.compile(r"\[\s+(-?\d[\d.eE+-]*(?:,\s+-?\d[\d.eE+-]*)*)\s+\]")
    return numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(of) for of in value]
    # Past what a clock tells; the files are a third smaller.
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value


def format_seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def result_rows(
    data: dict[str, Any],
    implementations: Container[str] | None = None,
    wanted: Wanted = is_kernel,
) -> list[tuple[str, ...]]:
    """A row for each wanted benchmark and implementation of ours, all or these, as RESULT_COLUMNS.

    `copy` is the share of its bandwidth; beside eager's and torch.compile's times stands how many
    times faster ours is; behind our peak of memory stands eager's.
    """
    rows = []
    for case in filter(wanted, data["benchmarks"]):
        found = {row["name"]: row for row in case["contenders"]}
        for name, row in found.items():
            if not is_ours(case, name) or "skipped" in row:
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
                    f"{row['share_of_copy']:.2f}"
                    if "share_of_copy" in row and counts_bytes(case)
                    else "",
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
    cases = [case for case in data["benchmarks"] if case.get("peers") and is_kernel(case)]
    peers = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    rows = []
    for case in cases:
        found = {row["name"]: row for row in case["contenders"]}
        for name, row in found.items():
            if not is_ours(case, name) or "median" not in row:
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


def rate_rows(
    data: dict[str, Any], implementations: Container[str] | None = None
) -> list[tuple[str, ...]]:
    """A row for each network and implementation of ours, all or these, as RATE_COLUMNS."""
    rows = []
    for case in data["benchmarks"]:
        found = {row["name"]: row for row in case["contenders"] if "items_per_second" in row}
        for row in case["contenders"]:
            name = row["name"]
            if not case.get("items") or not is_ours(case, name) or case.get("series"):
                continue
            if implementations is not None and name not in implementations:
                continue
            if "wrong" in row:
                rows.append((case["label"], name, "WRONG VALUES", "", "", ""))
            if name not in found:
                continue
            eager = found.get(EAGER)
            theirs = ""
            if eager is not None:
                theirs = f"{_rate(case, eager)} ({_times(row[f'speedup_over_{EAGER}'])})"
            time = f"{format_seconds(row['median'])} ({_spread(row)})"
            rows.append((case["label"], name, time, _rate(case, row), theirs, _peak(row, eager)))
    return rows


def growth_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each point of a curve and the first implementation of ours, as GROWTH_COLUMNS."""
    rows = []
    for case in data["benchmarks"]:
        if not case.get("series"):
            continue
        found = {row["name"]: row for row in case["contenders"] if "median" in row}
        row = next((row for name, row in found.items() if is_ours(case, name)), None)
        if row is None:
            continue
        size = (
            f"{case['tensors']} tensors" if case["tensors"] else "×".join(map(str, case["shape"]))
        )
        share = f"{row['share_of_copy']:.2f}" if "share_of_copy" in row else ""
        eager = _beside(row, found.get(EAGER), f"speedup_over_{EAGER}")
        rows.append((case["series"], size, format_seconds(row["median"]), share, eager))
    return rows


def small_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each contender of a small call on a GPU, as SMALL_COLUMNS."""
    rows = []
    for case in data["benchmarks"]:
        for row in case["contenders"]:
            if not row.keys() & {"host_median", "device_median", "graph_median", "graph_note"}:
                continue
            both = case.get("wall", False)  # the host's time and the GPU's together
            times = {
                "host": row.get("host_median", row["median"] if case["host"] else None),
                "device": row.get("device_median", None if both or case["host"] else row["median"]),
                "graph": row.get("graph_median"),
            }
            cells = ["" if t is None else format_seconds(t) for t in times.values()]
            cells[-1] = cells[-1] or row.get("graph_note", "")
            rows.append((case["label"], row["name"], *cells))
    return rows


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
    if data.get("options", {}).get("quick"):
        lines.append("few rounds, float32 and no torch.compile: a look, and no measurement")
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


def headline(data: dict[str, Any], implementations: Container[str]) -> str:
    """What a reader wants first: networks, the benchmarks that have goals, and which are missed."""
    parts = [_conditions_in_markdown(data)]
    if rows := rate_rows(data, implementations):
        parts += [markdown_table(RATE_COLUMNS, rows), RATE_LEGEND]
    if rows := result_rows(data, implementations, has_goals):
        parts += [markdown_table(RESULT_COLUMNS, rows), RESULT_LEGEND]
    if missed := [row for row in goal_rows(data) if row[-1] == "MISSED"]:
        parts += [
            "Goals that were missed:",
            markdown_table(GOAL_COLUMNS[:-1], [r[:-1] for r in missed]),
        ]
    return "\n\n".join(parts) + "\n"


def markdown(data: dict[str, Any]) -> str:
    """Conditions, results and goals of one run."""
    parts = [
        _conditions_in_markdown(data),
        markdown_table(RESULT_COLUMNS, result_rows(data)),
        RESULT_LEGEND,
    ]
    columns, rows = peer_table(data)
    if rows:
        parts += [markdown_table(columns, rows), PEER_LEGEND]
    if rows := small_rows(data):
        parts += [markdown_table(SMALL_COLUMNS, rows), SMALL_LEGEND]
    if rows := rate_rows(data):
        parts += [markdown_table(RATE_COLUMNS, rows), RATE_LEGEND]
    if rows := growth_rows(data):
        parts += [markdown_table(GROWTH_COLUMNS, rows), GROWTH_LEGEND]
    if rows := goal_rows(data):
        parts.append(markdown_table(GOAL_COLUMNS, rows))
    if lines := notes(data):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def _conditions_in_markdown(data: dict[str, Any]) -> str:
    return "\n".join(f"{line}  " for line in conditions(data)).rstrip()


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], words: int = 2) -> str:
    """A table whose first `words` columns are words, and the others figures."""
    lines = [columns, tuple("---" if i < words else "---:" for i in range(len(columns))), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


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


def _rate(case: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{row['items_per_second']:.3g} {case['unit']}"


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
