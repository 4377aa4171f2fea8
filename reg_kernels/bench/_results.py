"""What a report keeps of a measurement, and how that lies in a file.

A measurement holds the seconds of every round. A report is committed: of each contender it keeps
the median, and of ours how many times faster it was than the others, taken within a round, with
quartiles. That is what two reports are compared by. Each benchmark is one line, so that the
difference of two reports names the benchmarks that changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import _isas
from ._measure import COMPILE, COPY, EAGER

SCHEMA = 3
BASELINES = (COPY, EAGER, COMPILE)
DIGITS = 4  # of a figure in a report: a ratio is known to two or three

_FACTS = ("schema", "commit", "date", "device", "versions")  # of the report and its parts
_DEFAULTS = {
    "host": False,
    "wall": False,
    "cold": False,
    "tensors": 0,
    "peers": [],
    "items": 0,
    "unit": "",
    "series": "",
}
_OF_CASE = ("label", "op", "dtype", "shape", "bytes", *_DEFAULTS)
_OF_CONTENDER = (
    *("name", "isa", "median", "speed_over", "kept_bytes", "peak_bytes"),
    *("host_median", "device_median", "graph_median", "graph_note"),
    *("goals", "skipped", "wrong"),
)
_OF_GOAL = ("text", "figure", "value", "met")


class Ratio(NamedTuple):
    """How many times faster one contender was than another, over the rounds."""

    lower: float  # quartile
    median: float
    upper: float


class Key(NamedTuple):
    """What a ratio is of."""

    benchmark: str
    implementation: str
    other: str


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


def isa_of(row: dict[str, Any], data: dict[str, Any]) -> str | None:
    """The instruction set of a contender; older reports leave it to its name and the device."""
    return row.get("isa") or _isas.of_name(row["name"], data["device"].get("isa"))


def speed_over(row: dict[str, Any], other: str) -> Ratio | None:
    """How many times faster than `other` a contender was; None where one of them did not run."""
    found = row.get("speed_over", {}).get(other)
    return None if found is None else Ratio(*found)


def ratios(data: dict[str, Any]) -> Iterator[tuple[Key, Ratio]]:
    """The ratios of every implementation of ours."""
    for case in data["benchmarks"]:
        for row in case["contenders"]:
            if not is_ours(case, row["name"]):
                continue
            for other, found in row.get("speed_over", {}).items():
                # What calls cost the host has nothing to do with bytes.
                if other != COPY or counts_bytes(case):
                    yield Key(key_of(case), row["name"], other), Ratio(*found)


def condensed(figures: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a report that states `facts` keeps of a measurement, or of what was kept before."""
    kept = {k: v for k, v in figures.items() if k not in _FACTS or v != facts.get(k)}
    return rounded({**kept, "benchmarks": [_condensed(c) for c in figures["benchmarks"]]}, DIGITS)


def _condensed(case: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for row in case["contenders"]:
        kept = {key: row[key] for key in _OF_CONTENDER if key in row}
        if not is_ours(case, row["name"]):
            kept.pop("speed_over", None)
        if "goals" in kept:
            kept["goals"] = [{key: goal[key] for key in _OF_GOAL} for goal in kept["goals"]]
        rows.append(kept)
    described = {k: case[k] for k in _OF_CASE if k in case and case[k] != _DEFAULTS.get(k, ...)}
    return {**described, "contenders": rows}


def expanded(kept: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `condensed` made, with the facts of its report and what it left to be understood."""
    stated = {key: facts[key] for key in _FACTS if key in facts}
    return {**stated, **kept, "benchmarks": [{**_DEFAULTS, **c} for c in kept["benchmarks"]]}


def to_json(data: dict[str, Any]) -> str:
    """`data` as JSON, floats to 7 digits, each dictionary of a list on a line of its own."""
    return _lines(rounded(data, 7), "") + "\n"  # past what a clock tells


def _lines(value: Any, indent: str) -> str:
    within = indent + " "
    if isinstance(value, dict) and not _is_flat(value):
        of = [f"{within}{json.dumps(key)}: {_lines(item, within)}" for key, item in value.items()]
        return "{\n" + ",\n".join(of) + f"\n{indent}}}"
    if isinstance(value, list) and not _is_flat(value):
        of = [f"{within}{_line(item)}" for item in value]
        return "[\n" + ",\n".join(of) + f"\n{indent}]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _is_flat(value: Any) -> bool:
    """Whether no list in it holds a dictionary."""
    if isinstance(value, dict):
        return all(_is_flat(item) for item in value.values())
    return not (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def rounded(value: Any, digits: int) -> Any:
    """`value` with every float in it to so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value
