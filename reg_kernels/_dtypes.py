"""The element types that the kernels take, and how messages name a type."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def named(kind: torch.dtype | torch.layout) -> str:
    """A dtype or a layout as messages name it, without torch's name before it."""
    return str(kind).removeprefix("torch.")


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels compute a type in: float32, or float64 for that. torch.promote_types
    says the same, and an exported program would hold its call."""
    return torch.float64 if dtype == torch.float64 else torch.float32


SUPPORTED = ", ".join(map(named, DTYPES))
