"""What several test files need: the implementations of this machine, and the house's rng_state."""

from __future__ import annotations

import pytest
import torch

from reg_kernels import backends
from reg_kernels.cases.dropout import state as rng_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = backends.DTYPES
DTYPE_IDS = [str(d).removeprefix("torch.") for d in DTYPES]


def implementations(device: str = DEVICE) -> list[object]:
    """The implementations as parameters; one that cannot run is skipped with its reason."""
    parameters = []
    for name in backends.NAMES:
        reason = backends.why_not(name, device, torch.float32)
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def isas() -> list[str]:
    """The instruction sets that the native CPU kernels can run on this machine."""
    if backends.why_not("native", "cpu", torch.float32) is not None:
        return []
    from reg_kernels import _C

    best = _C.isa()
    names = ["baseline", "avx2", "avx512"]
    return names[: names.index(best) + 1]


__all__ = ["DEVICE", "DTYPES", "DTYPE_IDS", "implementations", "isas", "rng_state"]
