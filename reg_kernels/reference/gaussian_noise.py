"""Gaussian noise in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ._elementwise import by_elements, with_noise
from ._philox import normals, tag


def gaussian_noise(
    input: Tensor,
    std: float,
    multiplicative: bool,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y = x + std z or x + std z x, one normal number an element in storage order."""

    def values(x: Tensor, std: float, rng_state: Tensor) -> Tensor:
        z = normals(rng_state, tag("gaussian"), element_offset, x.numel())
        return with_noise(x, std, z.view(x.shape), multiplicative)

    return by_elements(input, std, traced_p, rng_state, values)
