"""Stochastic depth in plain PyTorch (G. Huang et al., ECCV 2016): whole samples are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from ._philox import half_words, tag
from .dropout import rate


def drop_path(
    input: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    p: float,
    scale_by_keep: bool,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y[n] = residual[n] + layer_scale m[n] x[n], m = 0, 1 or the scale: one draw a sample of x
    [N, ...]. `layer_scale` broadcasts against x, in the type of computing.
    `traced_p`, a float64 tensor, takes the place of `p` in a compiled program."""
    threshold, scale = rate(p if traced_p is None else float(traced_p))
    compute, device = torch.promote_types(input.dtype, torch.float32), input.device
    drawn = half_words(rng_state.to(device), tag("droppath"), element_offset, len(input))
    kept = (drawn < threshold).view(-1, *[1] * (input.dim() - 1))
    factor = torch.tensor(scale if scale_by_keep else 1.0, dtype=compute, device=device)
    if layer_scale is not None:
        factor = layer_scale * factor
    branch = torch.where(kept, input.to(compute) * factor, 0)  # a product with 0 would keep a NaN
    y = branch if residual is None else residual.to(compute) + branch
    return torch.empty_like(input).copy_(y)
