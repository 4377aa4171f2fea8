"""Every CUDA source compiles for every architecture without a warning, a spill or local memory."""

import importlib.util
from pathlib import Path

import pytest

import toolchain

SOURCES = sorted((toolchain.CSRC / "cuda").glob("*.cu"))


def torch_flags():
    """As setup.py sets them. A CPU build of torch has all the headers that are needed."""
    torch = importlib.util.find_spec("torch")  # not imported: that takes seconds
    if torch is None:
        pytest.skip("torch, whose headers the CUDA sources include, is not installed")
    include = Path(torch.origin).parent / "include"
    return ["-isystem", str(include), "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]


def test_there_are_sources():
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles(source):
    result = toolchain.compile_cuda(source, *torch_flags())
    assert result.code == 0, str(result)
