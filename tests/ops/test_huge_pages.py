"""Large results are asked for in huge pages, which the kernel says of a mapping: flag hg."""

import re
from pathlib import Path

import pytest
import torch

from reg_kernels import augment
from reg_kernels import functional as F
from reg_kernels._memory import empty_bytes

from support import isas

MAPPINGS = Path("/proc/self/smaps")
pytestmark = [
    pytest.mark.skipif(not isas(), reason="the native library was not built"),
    pytest.mark.skipif(
        not (MAPPINGS.exists() and Path("/sys/kernel/mm/transparent_hugepage").exists()),
        reason="this kernel has no huge pages",
    ),
]
COUNT = 10 * 2**20  # floats: of 32 MiB and more malloc makes a mapping of their own


def is_hinted(x):
    middle = x.data_ptr() + x.numel() * x.element_size() // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", MAPPINGS.read_text()):
        begin, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if begin <= middle < end:
            return " hg" in mapping[mapping.index("VmFlags:") :]
    raise AssertionError("nowhere")


def pipeline():
    side = 1870  # of 3 channels: as many
    return augment.Pipeline(augment.CenterCrop(side), augment.ToDtype(torch.float32))(
        torch.zeros(1, 3, side, side, dtype=torch.uint8)
    )


RESULTS = {
    "dropout": lambda: F.dropout(torch.zeros(COUNT), 0.5),
    "mixup": lambda: F.mixup(torch.zeros(2, COUNT // 2), torch.tensor(0.5)),
    "pipeline": pipeline,
    "pixels": lambda: empty_bytes(4 * COUNT),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_large_result_is_hinted(name):
    assert is_hinted(RESULTS[name]())


def test_what_others_allocate_is_not():
    assert not is_hinted(torch.empty(COUNT))
