"""Impulse noise in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._elementwise import by_elements
from ._philox import half_words, tag


def salt_and_pepper(
    input: Tensor,
    p: float,
    salt_vs_pepper: float,
    low: float,
    high: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y = high where u < p salt_vs_pepper, low where u < p, else x; u = half-word / 65536, one an
    element in storage order. Both bounds are rounded to multiples of 1/65536."""

    def values(x: Tensor, p: float, rng_state: Tensor) -> Tensor:
        salt, p = (round(share * 65536) / 65536 for share in (p * salt_vs_pepper, p))
        drawn = half_words(rng_state, tag("impulses"), element_offset, x.numel())
        u = drawn.view(x.shape).to(x.dtype) * 2.0**-16
        impulse = torch.where(u < salt, torch.full_like(x, high), torch.full_like(x, low))
        return torch.where(u < p, impulse, x)

    return by_elements(input, p, traced_p, rng_state, values)
