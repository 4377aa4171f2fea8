"""Dropout with inverted scaling, in plain PyTorch.

N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15
(2014); whole channels as in J. Tompson et al., "Efficient object localization using convolutional
networks", CVPR 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._elementwise import by_elements, compute_dtype
from ._philox import half_words, tag

_TAG = tag("dropout1")


def rate(p: float) -> tuple[int, float]:
    """The threshold T = round((1 - p) 65536) below which a half-word keeps, and 65536 / T.

    An element is kept with probability T / 65536 exactly, and the scale is the inverse of that, so
    the expectation is exact. Nothing is kept, and the scale is 0, where T is 0.
    """
    threshold = round((1.0 - p) * 65536)
    return threshold, 65536 / threshold if threshold else 0.0


def multipliers(
    count: int, p: float, rng_state: Tensor, element_offset: int, dtype: torch.dtype
) -> Tensor:
    """What `count` mask elements multiply their input by: `[count]`, 0 or the scale."""
    threshold, scale = rate(p)
    keep = half_words(rng_state, _TAG, element_offset, count) < threshold
    # The scale is rounded once, to the type that is computed in.
    return keep.to(dtype) * torch.tensor(scale, dtype=dtype, device=keep.device)


def dropout(
    input: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y = x * m, m in {0, 65536 / T}, one draw an element in storage order; any shape.

    `traced_p`, a float64 tensor, takes the place of `p` in a compiled program.
    """

    def values(x: Tensor, p: float, rng_state: Tensor) -> Tensor:
        return x * multipliers(x.numel(), p, rng_state, element_offset, x.dtype).view(x.shape)

    return by_elements(input, p, traced_p, rng_state, values)


def feature_dropout(
    input: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y[n, c] = x[n, c] * m[n C + c]: one draw for each channel of an input [N, C, ...]."""
    p = p if traced_p is None else float(traced_p)
    compute = compute_dtype(input.dtype)
    n, c = input.shape[:2]
    m = multipliers(n * c, p, rng_state.to(input.device), element_offset, compute)
    return (input.to(compute) * m.view(n, c, *[1] * (input.dim() - 2))).to(input.dtype)
