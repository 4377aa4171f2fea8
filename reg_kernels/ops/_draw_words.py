"""Philox words of many counters, as numbers in [0, 1): in C++, or by the reference's formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference._philox import philox4x32


def draw_words(key: int, epoch: int, indices: Tensor, groups: Tensor) -> Tensor:
    """float64 (4 G, N), four words of 32 bits over 2^32 of each counter (index, group, epoch).

    Args:
        key: of 64 bits, not negative.
        epoch: below 2^32.
        indices: int64 (N,), on the CPU, contiguous.
        groups: int64 (G,), below 2^32, likewise.
    """
    count, samples = len(groups), len(indices)
    if _IN_C is None:
        counters = (groups | _signed(epoch << 32)).unsqueeze(1)
        words = philox4x32(torch.tensor(_signed(key)), indices.unsqueeze(0), counters)
        return (torch.stack(words, 1).double() * 2.0**-32).view(4 * count, samples)
    out = torch.empty(4 * count, samples, dtype=torch.float64)
    places = (indices.data_ptr(), samples, groups.data_ptr(), count, out.data_ptr())
    _IN_C(key, epoch, *places)
    return out


def _signed(x: int) -> int:
    return x - (x >> 63 << 64)


def _in_c() -> Any:
    """That of csrc/draw_words.cpp, or None where it is not built."""
    try:
        from .. import _C

        return _C.draw_words
    except (ImportError, AttributeError):
        return None


_IN_C = _in_c()
