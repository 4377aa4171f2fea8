"""Uniform noise in Triton, by the random elementwise family (_elementwise.py).

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
def added(x, word, threshold, amplitude):
    uniform = word.to(tl.int32, bitcast=True).to(x.dtype) * 4.656612873077393e-10  # 2^-31
    noise = amplitude.to(x.dtype) * uniform
    return x + product_apart(noise, tl.full([1], 1.0, x.dtype))


@triton.jit
def relative(x, word, threshold, amplitude):
    uniform = word.to(tl.int32, bitcast=True).to(x.dtype) * 4.656612873077393e-10  # 2^-31
    noise = amplitude.to(x.dtype) * uniform
    return x + product_apart(noise, x)


def _element(values: Any) -> Element:
    return Element(values, tag("uniforms"), DROPS=False, BITS=32)


ADDED, RELATIVE = _element(added), _element(relative)


def uniform_noise(input: Tensor, amplitude: float, multiplicative: bool, *drawn: Any) -> Tensor:
    """The op; `drawn`: rng_state, element_offset, traced_p."""
    return fresh(RELATIVE if multiplicative else ADDED, input, DrawnBy(amplitude, *drawn))


def uniform_noise_(input: Tensor, amplitude: float, multiplicative: bool, *drawn: Any) -> None:
    over(RELATIVE if multiplicative else ADDED, input, DrawnBy(amplitude, *drawn))
