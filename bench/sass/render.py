"""sass.md from sass.json."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from .findings import Finding, findings
from .gpus import GPUS
from .table import key_of

# A row stands for its kernel if its types are alike and among these, and its indices have 32 bits.
_MATTERS = ("float", "bfloat16", "float32")
_TYPE = re.compile(r"\b(unsigned char|b?float(?:16|32)?|double|unsigned long)\b")

HEAD = """# Machine code of every kernel, and what it predicts

Made by `make sass-report` from the disassembly for sm_80, sm_90 and sm_100. Nothing in it was
measured on a GPU: every figure about time is predicted from published rates (bench/sass/gpus.py).

- **registers**, **occupancy** (percent of resident threads, by registers, static shared memory and
  launch bounds; shared memory that a CUDA launch asks for is not in the code): sm_80 / 90 / 100.
- **loads**, **stores**: widths in bytes, times how many, of a thread in one trip of the hot path,
  and **instructions** for 16 bytes moved and for an element, on sm_90.
- **predicted**: clocks for the bytes over clocks for the instructions. Below 1 the kernel is
  predicted to be bound by instructions, at that share of the bandwidth, and by the units named; at
  1 or more it is bound by bytes.
"""


def matters(kernel: str) -> bool:
    types = _TYPE.findall(kernel)
    return len(set(types)) <= 1 and all(kind in _MATTERS for kind in types)


def _accesses(widths: dict[str, int]) -> str:
    return " ".join(f"{w}x{n}" for w, n in sorted(widths.items(), key=lambda i: -int(i[0])))


def _line(kernel: str, rows: dict[int, dict[str, Any]]) -> str:
    def of_all(field: str) -> str:
        return " / ".join(str(row[field]) for row in rows.values())

    hot = next(iter(rows[90]["hot"]), None) if 90 in rows else None
    moved, rate, each = "", "", ""
    if hot:
        moved = f"{_accesses(hot['loads'])} | {_accesses(hot['stores'])}"
        count = sum(hot["kinds"].values())
        size = sum(int(w) * n for k in ("loads", "stores") for w, n in hot[k].items())
        rate = f"{16 * count / size:.0f}"
        each = f"{count / hot['elements']:.1f}" if hot["elements"] else ""
    bounds = {
        gpu: f"{share:.2f}" + (f" {pipe}" if share < 1 else "")
        for row in rows.values()
        for path in row["hot"]
        for gpu, (share, pipe) in path["bounds"].items()
    }
    predicted = " | ".join(bounds.get(gpu.name, "") for gpu in GPUS)
    return (
        f"| {kernel} | {of_all('registers')} | {of_all('occupancy')} | {moved or ' | '} "
        f"| {rate} | {each} | {predicted} |"
    )


def _grouped(all_findings: Iterable[Finding]) -> Iterator[tuple[tuple[str, str], list[Finding]]]:
    """The findings, grouped by what is found and by the kernel without its types."""

    def group(finding: Finding) -> tuple[str, str]:
        return finding.what, finding.kernel.split("<")[0]

    for key, members in itertools.groupby(sorted(all_findings, key=group), key=group):
        yield key, list(members)


def render(report: dict[str, Any]) -> str:
    """The whole of sass.md."""
    rows = sorted(report["kernels"], key=key_of)
    names = ", ".join(f"{tool} {version}" for tool, version in report["versions"].items())
    lines = [HEAD, f"Compiled with {names}: {len(rows)} kernels, counting architectures.", ""]
    columns = ["kernel", "registers", "occupancy %", "loads", "stores", "instructions / 16 B"]
    columns += ["an element", *(f"predicted {gpu.name}" for gpu in GPUS)]
    for source, of_source in itertools.groupby(rows, key=lambda row: row["source"]):
        lines += [f"## {source}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for kernel, instances in itertools.groupby(of_source, key=lambda row: row["kernel"]):
            if matters(kernel):
                lines.append(_line(kernel, {row["architecture"]: row for row in instances}))
        lines.append("")
    lines += ["## Findings", "", "| what | kernel | where, and how much | why it is left |"]
    lines.append("|---|---|---|---|")
    found = (f for row in [*rows, *report["launches"]] for f in findings(row))
    for (what, kernel), members in _grouped(found):
        reasons = sorted({f.reason or "**not explained**" for f in members})
        details = sorted({f"sm_{f.architecture}: {f.detail}" for f in members})
        more = f" and {len(details) - 3} more" if len(details) > 3 else ""
        lines.append(
            f"| {what} | {kernel} ({len(members)}) | {'; '.join(details[:3])}{more} "
            f"| {'; '.join(reasons)} |"
        )
    return "\n".join([*lines, ""])
