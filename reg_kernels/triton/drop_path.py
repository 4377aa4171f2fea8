"""drop_path in Triton, by the random elementwise family (_elementwise.py): a draw for each sample.

Reads x of the samples that are kept, and the residual where there is one, and writes y.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._layout import dense_like
from .._rng import tag
from ._elementwise import Draw, launch_rows


@triton.jit
def kept_values(x, half_word, threshold, scale):
    return tl.where(half_word < threshold, x, 0.0)


@triton.jit
def scaled_values(x, half_word, threshold, scale):
    scale = scale.to(x.dtype)
    # A product that a compiler sees it may join with the residual's sum in one rounding; pairs of
    # float32 even where it is told not to. This one adds -0, which it cannot know.
    product = tl.fma(x, scale, -(scale - scale))
    return tl.where(half_word < threshold, product, 0.0)


def drop_path(
    input: Tensor,
    residual: Tensor | None,
    p: float,
    scale_by_keep: bool,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """The op; input (N, ...) dense with its samples outermost, the residual likewise."""
    output = dense_like(input)
    launch_rows(
        *(scaled_values if scale_by_keep else kept_values, tag("droppath"), input, output),
        Draw(p, rng_state, element_offset, traced_p),
        samples=1,
        rows=len(input),
        residual=residual,
        reads_dropped=False,
    )
    return output
