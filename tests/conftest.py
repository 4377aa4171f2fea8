"""Settings that have to stand before triton is imported, and one seed for every test."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Helper modules that tests share.
sys.path[:0] = [str(Path(__file__).parent / d) for d in ("", "triton", "emulation")]

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
