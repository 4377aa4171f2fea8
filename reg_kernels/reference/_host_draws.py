"""What is drawn on the host for a batch, by torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ._philox import philox4x32

_TRIES = 10


def draw_words(key: int, epoch: int, indices: Tensor, groups: Tensor) -> Tensor:
    counters = (groups | _signed(epoch << 32)).unsqueeze(1)
    words = philox4x32(torch.tensor(_signed(key)), indices.unsqueeze(0), counters)
    return (torch.stack(words, 1).double() * 2.0**-32).view(-1, len(indices))


def _signed(x: int) -> int:
    return x - (x >> 63 << 64)


def first_rectangle(
    u: Tensor, stretches: Tensor, size: Tensor, low: float, span: float, is_crop: bool
) -> tuple[Tensor, int]:
    target = (u[:_TRIES] * span + low) * (size[0] * size[1])
    sides = torch.stack((target * stretches, target / stretches)).sqrt_().round_()
    if is_crop:
        sides = sides.flip(0)
        valid = ((sides > 0) & (sides <= size.unsqueeze(1))).all(0)
    else:
        valid = (sides < size.unsqueeze(1)).all(0)
    # How many candidates there are from the first valid one on.
    left = (valid * torch.arange(_TRIES, 0, -1).unsqueeze(1)).amax(0)
    chosen = (_TRIES - left).clamp_(max=_TRIES - 1)
    height, width = sides.gather(1, chosen.expand(2, 1, -1)).squeeze(1)
    height = height * ((left > 0) & (width > 0))
    sides = torch.stack((height, width))
    corner = ((size - sides + 1) * u[2 * _TRIES : 2 * _TRIES + 2]).floor_().clamp_(min=0)
    return torch.cat((corner, sides)), int((left > 0).sum())
