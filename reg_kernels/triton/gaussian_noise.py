"""Gaussian noise in Triton, by the random elementwise family (_elementwise.py).

Reads x, writes y: 2 * sizeof(dtype) bytes an element, forward and backward alike.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._rng import tag
from ._elementwise import DrawnBy, Element, fresh, over, product_apart


@triton.jit
def added(x, normal, threshold, std):
    noise = std.to(x.dtype) * normal.to(x.dtype)
    return x + product_apart(noise, tl.full([1], 1.0, x.dtype))


@triton.jit
def relative(x, normal, threshold, std):
    noise = std.to(x.dtype) * normal.to(x.dtype)
    return x + product_apart(noise, x)


def _element(values: Any) -> Element:
    return Element(values, tag("gaussian"), DROPS=False, BITS=32, NORMAL=True)


ADDED, RELATIVE = _element(added), _element(relative)


def gaussian_noise(input: Tensor, std: float, multiplicative: bool, *drawn: Any) -> Tensor:
    """The op; `drawn`: rng_state, element_offset, traced_p."""
    return fresh(RELATIVE if multiplicative else ADDED, input, DrawnBy(std, *drawn))


def gaussian_noise_(input: Tensor, std: float, multiplicative: bool, *drawn: Any) -> None:
    over(RELATIVE if multiplicative else ADDED, input, DrawnBy(std, *drawn))
