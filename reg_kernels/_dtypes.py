"""The element types that the kernels take, and how messages name a type."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def named(kind: torch.dtype | torch.layout) -> str:
    """A dtype or a layout as messages name it, without torch's name before it."""
    return str(kind).removeprefix("torch.")


SUPPORTED = ", ".join(map(named, DTYPES))
