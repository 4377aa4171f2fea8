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
def multiple(share):
    """To multiples of 1/65536; adding and taking off 1.5 2^52 rounds to the nearest integer."""
    return ((share * 65536.0 + 6755399441055744.0) - 6755399441055744.0) * 1.52587890625e-05


@triton.jit
def replaced(x, half_word, threshold, p, salt_vs_pepper, low, high):
    u = half_word.to(x.dtype) * 1.52587890625e-05  # 2^-16
    impulse = tl.where(
        u < multiple(p * salt_vs_pepper).to(x.dtype), high.to(x.dtype), low.to(x.dtype)
    )
    return tl.where(u < multiple(p).to(x.dtype), impulse, x)


REPLACED = Element(replaced, tag("impulses"), DROPS=False, OPTIONS=True)


def salt_and_pepper(
    input: Tensor, p: float, salt_vs_pepper: float, low: float, high: float, *drawn: Any
) -> Tensor:
    """The op; `drawn`: rng_state, element_offset, traced_p."""
    return fresh(REPLACED, input, DrawnBy(p, *drawn), (salt_vs_pepper, low, high))


def salt_and_pepper_(
    input: Tensor, p: float, salt_vs_pepper: float, low: float, high: float, *drawn: Any
) -> None:
    over(REPLACED, input, DrawnBy(p, *drawn), (salt_vs_pepper, low, high))
