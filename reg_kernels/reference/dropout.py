"""Dropout with inverted scaling, in plain PyTorch.

N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15
(2014); whole channels as in J. Tompson et al., "Efficient object localization using convolutional
networks", CVPR 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_storage_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """x with its dimensions permuted into storage order, contiguous, and the permutation."""
    if x.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(x):
        return x.contiguous(), list(range(x.dim()))
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), x.size(d)), reverse=True)
    return x.permute(order), order


def _permuted_back(y: Tensor, order: list[int], like: Tensor) -> Tensor:
    """y with its dimensions as they were, in the strides of `like` where those are dense."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(like)
    if order == sorted(order) and (y.stride() == like.stride() or not dense):
        return y
    y = y.permute([order.index(d) for d in range(len(order))])
    # A tensor of its own, since autograd lets nobody write to a view that an op made. Dimensions of
    # size 1 can have any stride.
    return torch.empty_strided(y.shape, like.stride(), dtype=y.dtype, device=y.device).copy_(y)


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
    p = p if traced_p is None else float(traced_p)
    compute = _compute_dtype(input.dtype)
    x, order = _in_storage_order(input)
    m = multipliers(x.numel(), p, rng_state.to(x.device), element_offset, compute)
    return _permuted_back((x.to(compute) * m.view(x.shape)).to(x.dtype), order, input)


def feature_dropout(
    input: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y[n, c] = x[n, c] * m[n C + c]: one draw for each channel of an input [N, C, ...]."""
    p = p if traced_p is None else float(traced_p)
    compute = _compute_dtype(input.dtype)
    n, c = input.shape[:2]
    m = multipliers(n * c, p, rng_state.to(input.device), element_offset, compute)
    return (input.to(compute) * m.view(n, c, *[1] * (input.dim() - 2))).to(input.dtype)
