"""What is shown of the measurements: tables in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from math import prod
from typing import Any, NamedTuple

from ._isas import implementation
from ._measure import COMPILE, COPY, EAGER, format_bytes
from ._results import Ratio, counts_bytes, has_goals, is_kernel, is_ours, isa_of, speed_over

SHOWN = ("native", "triton")  # what pages show: the other implementations are in the JSON
SHORT = ("benchmark", "ours", EAGER, COMPILE, "ratio")

Case = dict[str, Any]
Row = tuple[str, ...]
Wanted = Callable[[Case], bool]  # whether a benchmark is to be shown


class Table(NamedTuple):
    title: str
    columns: Row
    rows: list[Row]
    legend: str = ""
    words: int = 2  # so many first columns are words, and the others figures

    def markdown(self) -> str:
        """The table with its legend; nothing where there is no row."""
        if not self.rows:
            return ""
        rule = tuple("---" if i < self.words else "---:" for i in range(len(self.columns)))
        lines = (
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
            for line in (self.columns, rule, *self.rows)
        )
        return "\n".join(lines) + (f"\n\n{self.legend}" if self.legend else "")


def format_seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


# The tables


def result_table(
    data: dict[str, Any], shown: Container[str] | None = None, wanted: Wanted = is_kernel
) -> Table:
    """Each wanted benchmark by each implementation of ours, all or those that are `shown`."""
    rows: list[Row] = []
    for case, found, row in _measured(data, wanted, shown):
        time, copy = _time(row), speed_over(row, COPY)
        if case["tensors"] and row["median"] / case["tensors"] < _SMALL_TENSOR:
            time += f", {row['median'] / case['tensors'] * 1e6:.3g} µs a tensor"
        rows.append(
            (
                case["label"],
                row["name"],
                time,
                f"{copy.median:.2f}" if copy and counts_bytes(case) else "",
                _beside(row, found, EAGER),
                _beside(row, found, COMPILE),
                format_bytes(row["kept_bytes"]) if "kept_bytes" in row else "",
                _peak(row, found),
                _verdict(row.get("goals", [])),
            )
        )
    return Table(
        "times",
        ("benchmark", "implementation", "time", COPY, EAGER, COMPILE, "kept", "peak", "goals"),
        [*rows, *_wrong_rows(data, wanted, shown, columns=9)],
        "Times are medians. `copy`: bytes/s over those of `Tensor.copy_` in the same rounds. "
        "`eager`, `compile`: their time, and how many times faster ours is, with quartiles. "
        "`kept`: bytes saved for the backward, inputs included. `peak`: bytes allocated at the "
        "peak of a call beyond what it returns, and eager's.",
    )


def peer_table(data: dict[str, Any], shown: Container[str] | None = None) -> Table:
    """Ours beside the peers of each benchmark that has some."""
    names = list(dict.fromkeys(n for c in data["benchmarks"] if is_kernel(c) for n in c["peers"]))
    rows: list[Row] = []
    for case, found, row in _measured(data, lambda c: is_kernel(c) and bool(c["peers"]), shown):
        cells = []
        for name in names:
            cell = _beside(row, found, name)
            cells.append(cell and f"{cell}, {format_bytes(found[name]['peak_bytes'])}")
        rows.append((case["label"], row["name"], *cells))
    return Table(
        "peers: time, how many times faster, peak",
        ("benchmark", "implementation", *names),
        rows,
        "`fused`, `foreach`: torch.optim's step with that option; `optimi`: torch-optimi's, "
        "`liger`: Liger-Kernel's, `timm`: timm's. Each with its time, how many times faster ours "
        "is, and its peak.",
    )


def rate_table(data: dict[str, Any], shown: Container[str] | None = None) -> Table:
    """The training steps of whole networks."""

    def wanted(case: Case) -> bool:
        return bool(case["items"]) and not case["series"]

    rows: list[Row] = []
    for case, found, row in _measured(data, wanted, shown):
        eager = found.get(EAGER, {})
        rates = [
            f"{case['items'] / of['median']:.3g} {case['unit']}" if "median" in of else ""
            for of in (row, eager)
        ]
        if over := speed_over(row, EAGER):
            rates[1] += f", {_times(over)}"
        rows.append((case["label"], row["name"], _time(row), *rates, _peak(row, found)))
    return Table(
        "training steps",
        ("training step", "implementation", "time", "a second", EAGER, "peak"),
        [*rows, *_wrong_rows(data, wanted, shown, columns=6)],
        "Forward, loss, backward and the optimizer's step. `eager`: the same network with "
        "PyTorch's layers and optimizer, and how many times faster ours is, with quartiles. "
        "`peak`: bytes allocated at the peak of a step, and eager's.",
    )


def growth_table(data: dict[str, Any]) -> Table:
    """Each point of a curve, by the implementation that is chosen automatically."""
    rows: list[Row] = []
    for case, found, row in _measured(data, lambda case: bool(case["series"])):
        size = f"{case['tensors']} tensors" if case["tensors"] else _shape(case)
        copy = speed_over(row, COPY)
        share = f"{copy.median:.2f}" if copy else ""
        rows.append((case["series"], size, _time(row), share, _beside(row, found, EAGER)))
    return Table(
        "growth",
        ("curve", "size", "time", COPY, EAGER),
        rows,
        "Time against size: ours, its share of the copy's bytes/s, and eager's time (an "
        "optimizer's with `fused=True`).",
    )


def small_table(data: dict[str, Any]) -> Table:
    """The parts of a small call's time on a GPU."""
    figures = ("host_median", "device_median", "graph_median", "graph_note")
    rows: list[Row] = []
    for case in data["benchmarks"]:
        for row in case["contenders"]:
            if not row.keys() & set(figures):
                continue
            both = case["wall"]  # the host's time and the GPU's together
            times = {
                "host": row.get("host_median", row["median"] if case["host"] else None),
                "device": row.get("device_median", None if both or case["host"] else row["median"]),
                "graph": row.get("graph_median"),
            }
            cells = ["" if t is None else format_seconds(t) for t in times.values()]
            cells[-1] = cells[-1] or row.get("graph_note", "")
            rows.append((case["label"], row["name"], *cells))
    return Table(
        "small calls",
        ("benchmark", "contender", "host", "device", "graph"),
        rows,
        "Small calls on the GPU: the host's time until a call is queued, the GPU's until it is "
        "done, and that of a replayed CUDA graph.",
    )


def isa_table(data: dict[str, Any]) -> Table:
    """The native CPU code by instruction set, of what has goals."""
    isas = _isas_of(data)
    rows: list[Row] = []
    for case in filter(has_goals, data["benchmarks"]):
        found = {isa_of(row, data): row for row in case["contenders"] if "median" in row}
        cells: list[str] = []
        for isa in isas:
            over = speed_over(found.get(isa, {}), EAGER)
            copy = speed_over(found.get(isa, {}), COPY)
            cells.append(_times(over) if over else "")
            cells.append(f"{copy.median:.2f}" if copy and counts_bytes(case) else "")
        if any(cells):
            rows.append((case["label"], *cells))
    return Table(
        "instruction sets",
        ("benchmark", *(f"{isa}: {what}" for isa in isas for what in (EAGER, COPY))),
        rows,
        "The native code held to each instruction set: how many times faster than eager it is, "
        "with quartiles, and its share of the copy's bytes/s.",
        words=1,
    )


def goal_table(data: dict[str, Any]) -> Table:
    """Where each figure that has a goal stands, by instruction set or, where there are none, by
    implementation."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for case in data["benchmarks"]:
        for row in case["contenders"]:
            column = isa_of(row, data) or row["name"]
            for goal in row.get("goals", []):
                verdict = {True: " met", False: " MISSED", None: ""}[goal["met"]]
                cells = rows.setdefault((case["label"], goal["text"]), {})
                cells[column] = _value(goal) + verdict
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    return Table(
        "goals",
        ("benchmark", "goal", *columns),
        [(*place, *(cells.get(column, "") for column in columns)) for place, cells in rows.items()],
    )


def _isas_of(data: dict[str, Any]) -> list[str]:
    """The instruction sets that native CPU code was measured by, the first of them the first."""
    rows = (row for case in data["benchmarks"] for row in case["contenders"] if "median" in row)
    return list(dict.fromkeys(isa for row in rows if (isa := isa_of(row, data))))


def overview_cases(data: dict[str, Any]) -> list[Case]:
    """A benchmark an op: in float32, of its largest shape, the first of them, and where the op has
    goals one that has a goal."""
    chosen: dict[str, Case] = {}
    for case in data["benchmarks"]:
        if case["series"] or case["host"] or case["dtype"] != "float32":
            continue
        best = chosen.get(case["op"])
        if best is None or _importance(case) > _importance(best):
            chosen[case["op"]] = case
    return list(chosen.values())


def _importance(case: Case) -> tuple[bool, int]:
    return any(row.get("goals") for row in case["contenders"]), prod(case["shape"])


def overview_table(data: dict[str, Any]) -> Table:
    """A row an op: what somebody wants to know first."""
    rows = [
        (case["label"].replace(" float32", ","), *_short(row, found))
        for case, found, row in _measured(
            {"benchmarks": overview_cases(data)}, lambda case: True, SHOWN
        )
    ]
    return Table("overview", SHORT, rows, words=1)


def short_table(data: dict[str, Any]) -> Table:
    """A row a benchmark: the implementation that its op takes here, beside eager and compile; one
    for each instruction set where there are several."""
    rows: list[Row] = []
    for case in data["benchmarks"]:
        found = {row["name"]: row for row in case["contenders"]}
        ours = [row for name, row in found.items() if is_ours(case, name)]
        ours = [row for row in ours if "median" in row or "wrong" in row]
        chosen = [r for r in ours if implementation(r["name"]) == implementation(ours[0]["name"])]
        for row in chosen:
            label = f"{case['label']}, {isa_of(row, data)}" if len(chosen) > 1 else case["label"]
            cells = ("WRONG VALUES", "", "", "") if "wrong" in row else _short(row, found)
            rows.append((label, *cells))
    return Table("times", SHORT, rows, words=1)


# Pages


def headline(data: dict[str, Any], shown: Container[str] = SHOWN) -> str:
    """What a reader wants first: networks, and the benchmarks that were found worth a goal."""
    results = result_table(data, shown, has_goals)
    without_goals = results._replace(
        columns=results.columns[:-1], rows=[row[:-1] for row in results.rows]
    )
    return _page(
        _conditions_in_markdown(data),
        rate_table(data, shown).markdown(),
        without_goals.markdown(),
        isa_table(data).markdown(),
    )


def markdown(data: dict[str, Any], shown: Container[str] = SHOWN) -> str:
    """Conditions, results and goals of one run."""
    return _page(
        _conditions_in_markdown(data),
        result_table(data, shown).markdown(),
        isa_table(data).markdown(),
        peer_table(data, shown).markdown(),
        small_table(data).markdown(),
        rate_table(data, shown).markdown(),
        growth_table(data).markdown(),
        goal_table(data).markdown(),
        "\n".join(f"- {line}" for line in notes(data)),
    )


def _page(*parts: str) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"


def conditions(data: dict[str, Any]) -> list[str]:
    """The lines above every table: device, commit, versions, settings."""
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)
    device = data["device"]
    told = [f"{name} {device[name]}" for name in ("family", "model", "driver") if device.get(name)]
    lines = [
        ", ".join([device["name"], *told]),
        f"commit {format_commit(data['commit'])}, {data['date']}",
        versions,
    ]
    if device["type"] == "cpu":
        warm = "keeps freed memory" if data["allocator"] else "as it is by default"
        isa = next(iter(_isas_of(data)), device["isa"]) or "no native code"
        lines.append(f"{data['threads']} threads, {isa}, malloc {warm}")
    if data.get("options", {}).get("quick"):
        lines.append("few rounds, float32 and no torch.compile: a look, and no measurement")
    return lines


def _conditions_in_markdown(data: dict[str, Any]) -> str:
    return "\n".join(f"{line}  " for line in conditions(data)).rstrip()


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


def format_commit(commit: dict[str, Any] | None) -> str:
    if commit is None:
        return "unknown"
    note = {True: " with changes", False: "", None: " (as stated, not verified)"}[commit["dirty"]]
    return commit["hash"][:12] + note


# Rows and cells

_SMALL_TENSOR = 20e-6  # seconds a tensor: their number is what counts then


def _measured(
    data: dict[str, Any], wanted: Wanted, shown: Container[str] | None = None
) -> Iterator[tuple[Case, dict[str, Case], Case]]:
    """Of each wanted benchmark, each of our implementations, all or those that are `shown`, that
    was timed: the benchmark, its contenders by name, and the implementation's figures."""
    for case in filter(wanted, data["benchmarks"]):
        found = {row["name"]: row for row in case["contenders"]}
        for name, row in found.items():
            if "median" in row and is_ours(case, name) and (shown is None or name in shown):
                yield case, found, row


def _wrong_rows(
    data: dict[str, Any], wanted: Wanted, shown: Container[str] | None, columns: int
) -> Iterator[Row]:
    """A row for each of ours that computed something else."""
    for case in filter(wanted, data["benchmarks"]):
        for row in case["contenders"]:
            name = row["name"]
            if "wrong" in row and is_ours(case, name) and (shown is None or name in shown):
                yield (case["label"], name, "WRONG VALUES", *[""] * (columns - 3))


def _shape(case: Case) -> str:
    return "×".join(map(str, case["shape"]))


def _time(row: Case) -> str:
    return format_seconds(row["median"])


def _beside(row: Case, found: dict[str, Case], other: str) -> str:
    """The other's time, and how many times faster ours is."""
    over = speed_over(row, other)
    return f"{_time(found[other])}, {_times(over)}" if over else ""


def _short(row: Case, found: dict[str, Case]) -> Row:
    """Ours, eager's and compile's time, and how many times faster than eager ours is."""
    columns = (row, found.get(EAGER, {}), found.get(COMPILE, {}))
    times = (_time(of) if "median" in of else "" for of in columns)
    over = speed_over(row, EAGER)
    return (*times, _times(over) if over else "")


def _times(ratio: Ratio) -> str:
    """The median, and the quartiles where they show as something else."""
    lower, median, upper = (f"{of:.0f}" if of >= 9.95 else f"{of:.2g}" for of in ratio)
    return f"{median}×" if lower == median == upper else f"{median}× ({lower}–{upper})"


def _peak(row: Case, found: dict[str, Case]) -> str:
    if "peak_bytes" not in row:
        return ""
    text, eager = format_bytes(row["peak_bytes"]), found.get(EAGER, {})
    return f"{text} ({format_bytes(eager['peak_bytes'])})" if "peak_bytes" in eager else text


def _value(goal: dict[str, Any]) -> str:
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
