"""Impulse noise in Triton, by the random elementwise family (_elementwise.py).

Reads x, writes y: 2 * sizeof(dtype) bytes an element, forward and backward alike.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._rng import tag
from ._elementwise import DrawnBy, Element, fresh, over


@triton.jit
def replaced(x, half_word, threshold, p, salt_share, low, high):
    u = half_word.to(x.dtype) * 1.52587890625e-05  # 2^-16
    impulse = tl.where(u < salt_share.to(x.dtype), high.to(x.dtype), low.to(x.dtype))
    return tl.where(u < p.to(x.dtype), impulse, x)


REPLACED = Element(replaced, tag("impulses"), DROPS=False, OPTIONS=True)


def salt_and_pepper(
    input: Tensor, p: float, salt_share: float, low: float, high: float, *drawn: Any
) -> Tensor:
    """The op; `drawn`: rng_state, element_offset, traced_p."""
    return fresh(REPLACED, input, DrawnBy(p, *drawn), (salt_share, low, high))


def salt_and_pepper_(
    input: Tensor, p: float, salt_share: float, low: float, high: float, *drawn: Any
) -> None:
    over(REPLACED, input, DrawnBy(p, *drawn), (salt_share, low, high))
