"""Stochastic depth in Triton: reads x of the samples that are kept and the residual, writes y."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._layout import dense_like
from .._rng import tag
from ._elementwise import DrawnBy, Element, LayerScale, launch_rows, product_apart


@triton.jit
def kept_values(x, half_word, threshold, scale):
    return tl.where(half_word < threshold, x, 0.0)


@triton.jit
def scaled_values(x, half_word, threshold, scale):
    return tl.where(half_word < threshold, product_apart(x, scale.to(x.dtype)), 0.0)


KEPT, SCALED = (Element(f, tag("droppath"), False) for f in (kept_values, scaled_values))


def drop_path(
    x: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    p: float,
    scaled: bool,
    *drawn: Any,
) -> Tensor:
    """The op; `drawn`: rng_state, element_offset, traced_p."""
    op, y = SCALED if scaled else KEPT, dense_like(x)
    beside = {"residual": residual, "layer_scale": None}
    if layer_scale is not None:
        missing = x.dim() - layer_scale.dim()
        # One number is that of a channel which all elements lie in.
        inner = next(
            (x.stride(d + missing) for d, n in enumerate(layer_scale.shape) if n > 1), x.numel()
        )
        beside["layer_scale"] = LayerScale(layer_scale, layer_scale.numel(), inner)
    launch_rows(op, x, y, DrawnBy(p, *drawn), samples=1, rows=len(x), **beside)
    return y
