"""Triton's kernels as the cases launch them, compiled ahead of time: no spills but those known."""

import json
import re

import pytest

from support import bench_module

bench_module("sass_report")  # brings bench/ into the path
from sass import binary, compiling, table  # noqa: E402

REPORT = compiling.ROOT / "bench" / "results" / "sass.json"
# (op, pattern of "kernel dtype case", bytes at most): open, each of them. In planes of 21 classes a
# tile holds all classes of its positions.
KNOWN = [
    ("cross_entropy", r" float64 .*4x21x65x67 contiguous", 1136),
    ("cross_entropy", r"4x21x65x67 contiguous", 112),
    ("cross_entropy", r"cross_entropy_kernel (float64 .*50257|float32 .*5x8193)", 16),
    ("distillation", r"distillation_kernel float16 .*3x50257 misaligned", 8),
    ("batch_norm", r"forward_kernel b?float16 .*16x64x29x31 channels_last", 8),
]


@pytest.mark.parametrize("op", table.TRITON_OPS)
def test_what_the_cases_launch_does_not_spill(op):
    report = json.loads(REPORT.read_text())
    held = report.get("launches", {}).get(op, {})
    try:
        current = held.get("digest") == table.digest_of_triton(op)
        binary.tool("cuobjdump")
        found = held["spills"] if current else table.spills(op)
    except (compiling.Missing, ImportError) as missing:
        pytest.skip(str(missing))
    for kernel, dtype, case, size in found:
        what = f"{kernel} {dtype} {case}"
        allowed = [n for o, pattern, n in KNOWN if o == op and re.search(pattern, what)]
        assert size <= max(allowed, default=0), what
