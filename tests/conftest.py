"""Settings that have to stand before torch and triton are imported."""

import os
import sys
from pathlib import Path

os.environ.setdefault("MAX_JOBS", "2")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "triton")]

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
