"""Mixup and CutMix in plain PyTorch.

Sample n of N is blended with its partner, index[n]: w x_n + (1 - w) x_index[n], where w is 0 inside
of its box and lam[n] elsewhere; then scale[c] times that plus shift[c]. A weight of exactly 1 or 0
takes one of the two, whatever the other holds.

Shapes: input (N, C, ...), or (N,) and (N, C); lam (N,) or (1,), else the float `one_lam` counts;
index (N,), else the batch reversed; boxes (N, 4) or (1, 4) as (x1, y1, x2, y2) in the last two
dimensions; scale and shift (C,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def mixup(
    input: Tensor,
    lam: Tensor | None,
    one_lam: float,
    index: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The blended batch in `dtype`, contiguous or with the channels last."""
    compute = computed_in(input.dtype, dtype)
    own = input.to(compute)
    partner = own.flip(0) if index is None else own[index]
    w, rest = _weights(input, lam, one_lam, boxes, compute)
    output = torch.where(rest == 0, own, torch.where(w == 0, partner, w * own + rest * partner))
    if scale is not None:
        output = output * _per_channel(scale, output)
    if shift is not None:
        output = output + _per_channel(shift, output)
    return in_format(output.to(dtype), channels_last)


def mixup_backward(
    grad_output: Tensor,
    lam: Tensor | None,
    one_lam: float,
    receivers: Tensor | None,
    starts: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The gradient by the input, of type `dtype`: each sample's own share of its gradient, and the
    rest of it for its partner.

    The samples whose partner is n are receivers[starts[n]:starts[n + 1]]; without, the batch is
    reversed.
    """
    grad = grad_output.to(computed_in(dtype, grad_output.dtype))
    if scale is not None:
        grad = grad * _per_channel(scale, grad)
    w, rest = _weights(grad, lam, one_lam, boxes, grad.dtype)
    for_partner = torch.where(rest == 0, torch.zeros_like(grad), rest * grad)
    if receivers is None or starts is None:
        given = for_partner.flip(0)
    else:
        samples = torch.arange(len(grad), device=grad.device)
        partners = samples.repeat_interleave(starts.diff(), output_size=len(grad))
        given = torch.zeros_like(grad).index_add(0, partners, for_partner[receivers])
    own = torch.where(w == 0, torch.zeros_like(grad), w * grad)
    return in_format((own + given).to(dtype), channels_last)


def computed_in(dtype: torch.dtype, other: torch.dtype) -> torch.dtype:
    """float64 where one of the two is, else float32."""
    return torch.float64 if torch.float64 in (dtype, other) else torch.float32


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """x, (N, C, ...), contiguous or dense with its channels innermost; no view, to which autograd
    would let nobody write."""
    if not channels_last:
        return x.contiguous()
    like = torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return x.new_empty_strided(x.shape, like.stride()).copy_(x)


def _weights(
    x: Tensor, lam: Tensor | None, one_lam: float, boxes: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """w and 1 - w, to be broadcast over x; each is rounded to `compute` once."""
    if lam is None:
        lam = torch.full((1,), one_lam, dtype=torch.float64, device=x.device)
    w = lam.double().view(-1, *[1] * (x.dim() - 1))
    if boxes is not None:
        x1, y1, x2, y2 = boxes.view(-1, 4, *[1] * (x.dim() - 1)).unbind(1)
        column = torch.arange(x.shape[-1], device=x.device)
        row = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
        inside = (row >= y1) & (row < y2) & (column >= x1) & (column < x2)
        w = torch.where(inside, torch.zeros_like(w), w)
    return w.to(compute), (1 - w).to(compute)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
