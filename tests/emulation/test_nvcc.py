"""Every CUDA source compiles for every architecture without a warning, a spill or local memory."""

import json

import pytest

import toolchain

REPORT = toolchain.compiling.ROOT / "bench" / "results" / "sass.json"


def test_there_are_sources():
    assert toolchain.CUDA_SOURCES


@pytest.mark.parametrize("source", toolchain.CUDA_SOURCES, ids=lambda source: source.stem)
def test_compiles(source):
    toolchain.skip_if_compiled_for(json.loads(REPORT.read_text()), source)
    result = toolchain.compile_cuda(source, *toolchain.torch_flags())
    assert result.code == 0, str(result)
