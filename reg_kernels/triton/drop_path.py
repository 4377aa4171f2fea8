"""Stochastic depth in Triton: reads x of the samples that are kept and the residual, writes y."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._layout import dense_like
from .._rng import tag
from ._elementwise import DrawnBy, launch_rows, product_apart


@triton.jit
def kept_values(x, half_word, threshold, scale):
    return tl.where(half_word < threshold, x, 0.0)


@triton.jit
def scaled_values(x, half_word, threshold, scale):
    return tl.where(half_word < threshold, product_apart(x, scale.to(x.dtype)), 0.0)


def drop_path(x: Tensor, residual: Tensor | None, p: float, scaled: bool, *drawn: Any) -> Tensor:
    """The op; `drawn`: rng_state, element_offset, traced_p."""
    values, y = scaled_values if scaled else kept_values, dense_like(x)
    options = {"samples": 1, "rows": len(x), "residual": residual, "reads_dropped": False}
    launch_rows(values, tag("droppath"), x, y, DrawnBy(p, *drawn), **options)
    return y
