"""Compiles every CUDA and Triton kernel and predicts from the machine code what bounds it.

Writes bench/results/sass.{json,md}; the tests compile again what has changed since. Needs nvcc, and
triton for its kernels and its disassembler, but no GPU. Compiles MAX_JOBS (2) sources at a time,
and each only once.

Exit code: 0; 1 for a finding that is not explained (bench/sass/findings.py); 2 where a tool is
missing or something does not compile.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from reg_kernels import _console
from reg_kernels.cli._files import write_whole

from .sass import binary, compiling, table
from .sass.compiling import Missing
from .sass.findings import findings
from .sass.render import render

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
SCHEMA = 2


def to_json(report: dict[str, Any]) -> str:
    """One kernel a line, so that a diff shows just the kernels that changed."""

    def lines(key: str) -> str:
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in report[key])
        return f'"{key}": [\n{rows}\n]'

    head = json.dumps({k: v for k, v in report.items() if k not in ("launches", "kernels")})
    return f"{head[:-1]}, {lines('launches')}, {lines('kernels')}}}\n"


def main() -> int:
    try:
        versions = table.versions()
        for name in ("cuobjdump", "nvdisasm"):
            binary.tool(name)
        with _console.progress() as progress:
            task = progress.add_task("compiling", total=len(table.tasks()))

            def done(part: str) -> None:
                progress.update(task, advance=1, description=part)

            rows = table.build(done)
    except (Missing, ImportError, RuntimeError, TimeoutError) as error:
        print(f"sass-report: {error}", file=sys.stderr)
        return 2
    report = {
        "schema": SCHEMA,
        "versions": versions,
        "sources": {path.stem: compiling.digest_of_source(path) for path in compiling.CUDA_SOURCES},
        "triton_launches": table.digests_of_triton(),
        "launches": [row for row in rows if "widths" not in row],
        "kernels": [row for row in rows if "widths" in row],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / "sass.json", lambda path: path.write_text(to_json(report)))
    write_whole(RESULTS / "sass.md", lambda path: path.write_text(render(report)))
    found = [finding for row in rows for finding in findings(row)]
    unexplained = [finding for finding in found if finding.reason is None]
    for finding in unexplained:
        where = f"{finding.kernel} on sm_{finding.architecture}"
        print(f"not explained: {where}: {finding.what}, {finding.detail}")
    print(
        f"{len(report['kernels'])} kernels, {len(found)} predicted findings, {len(unexplained)} "
        f"not explained: {RESULTS / 'sass.md'}"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
