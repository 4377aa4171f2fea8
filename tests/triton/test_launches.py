"""Triton's kernels as calls and cases launch them, compiled ahead of time for every architecture:
nothing spilled, 16 bytes an access, and room for enough threads, but for what is explained."""

import importlib.metadata
import json

import pytest

from support import bench_module

bench_module("sass_report")  # brings bench/ into the path
from sass import binary, compiling, table, triton_launches  # noqa: E402
from sass.findings import findings  # noqa: E402

REPORT = json.loads((compiling.ROOT / "bench" / "results" / "sass.json").read_text())


def by_launch(rows):
    return {table.key_of(row): row for row in rows}


@pytest.mark.parametrize("op", triton_launches.OPS)
def test_launches_compile_as_they_should(op):
    try:
        binary.tool("cuobjdump")
        same = REPORT["versions"]["triton"] == importlib.metadata.version("triton")
    except (compiling.Missing, ImportError) as missing:
        pytest.skip(str(missing))
    if same and REPORT["triton_sources"][op] == table.digest_of_triton(op):
        return  # the report has what would be found; that it is explained is tested beside it
    found = table.faulty_launches(op)
    assert [f for row in found for f in findings(row) if f.reason is None] == []
    known = by_launch(REPORT["launches"])
    for launch, row in by_launch(found if same else []).items():
        assert row["stack"] <= known.get(launch, {"stack": 0})["stack"], launch
