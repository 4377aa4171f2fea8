"""Triton's kernels as calls and cases launch them, compiled ahead of time: nothing is spilled and
enough programs run at a time, but for what is explained."""

import json

import pytest

from bench.sass import binary, compiling, table, triton_launches
from bench.sass.findings import findings

REPORT = json.loads((compiling.ROOT / "bench" / "results" / "sass.json").read_text())


@pytest.mark.parametrize("op", triton_launches.OPS)
def test_what_is_launched_compiles_without_spilling(op):
    try:
        binary.tool("cuobjdump")
        if table.is_current_triton(REPORT, op):
            return  # the report has what would be found, and is tested itself
    except (compiling.Missing, ImportError) as missing:
        pytest.skip(str(missing))
    known = {table.key_of(row): row["stack"] for row in REPORT["launches"]}
    for row in table.faulty_launches(op):
        for finding in findings(row):
            assert finding.reason, finding
        assert row["stack"] <= known.get(table.key_of(row), 0), row
