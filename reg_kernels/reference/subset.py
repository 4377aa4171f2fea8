"""Subsets of a batch's samples in plain PyTorch: gathered, and added to."""

from __future__ import annotations

import torch
from torch import Tensor


def subset(input: Tensor, kept: Tensor, dropped: Tensor, scale: float) -> Tensor:
    """y[k] = scale x[kept[k]], of x [N, ...]; kept [K] and dropped [N - K] have each once."""
    compute = torch.promote_types(input.dtype, torch.float32)
    return (input.index_select(0, kept).to(compute) * scale).to(input.dtype)


def subset_add(
    input: Tensor, residual: Tensor | None, kept: Tensor, dropped: Tensor, scale: float
) -> Tensor:
    """y[kept[k]] = residual[kept[k]] + scale x[k], of x [K, ...], and y[n] = residual[n] for the
    other ones of [N, ...]; without a residual it is 0."""
    compute = torch.promote_types(input.dtype, torch.float32)
    samples = len(kept) + len(dropped)
    if residual is None:
        y = input.new_zeros(samples, *input.shape[1:], dtype=compute)
    else:
        y = residual.to(compute)
    return y.index_add(0, kept, input.to(compute) * scale).to(input.dtype)
