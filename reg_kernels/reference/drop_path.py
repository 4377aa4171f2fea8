"""Stochastic depth in plain PyTorch: whole samples of a residual branch are dropped.

G. Huang et al., "Deep networks with stochastic depth", ECCV 2016; as a layer, DropPath, from G.
Larsson et al., "FractalNet", ICLR 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._philox import half_words, tag
from .dropout import rate

_TAG = tag("droppath")


def drop_path(
    input: Tensor,
    residual: Tensor | None,
    p: float,
    scale_by_keep: bool,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y[n] = residual[n] + s x[n] for a sample that is kept, residual[n] for one that is dropped.

    One draw for each sample of an input [N, ...]; s is 65536 / T, or 1 without `scale_by_keep`.
    `traced_p`, a float64 tensor, takes the place of `p` in a compiled program.
    """
    threshold, scale = rate(p if traced_p is None else float(traced_p))
    compute = torch.promote_types(input.dtype, torch.float32)
    keep = half_words(rng_state.to(input.device), _TAG, element_offset, len(input)) < threshold
    scale = torch.tensor(scale if scale_by_keep else 1.0, dtype=compute, device=input.device)
    branch = torch.where(keep.view(-1, *[1] * (input.dim() - 1)), input.to(compute) * scale, 0)
    y = torch.empty_like(input)
    return y.copy_(branch if residual is None else residual.to(compute) + branch)
