"""Uniform noise in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ._elementwise import by_elements, with_noise
from ._philox import tag, words


def uniform_noise(
    input: Tensor,
    amplitude: float,
    multiplicative: bool,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    """y = x + amplitude u or x + amplitude u x, u from -1 to 1, one draw of 32 bits an element in
    storage order.

    """

    def values(x: Tensor, amplitude: float, rng_state: Tensor) -> Tensor:
        drawn = words(rng_state, tag("uniforms"), element_offset, x.numel())
        u = (drawn - ((drawn >> 31) << 32)).to(x.dtype) * 2.0**-31
        return with_noise(x, amplitude, u.view(x.shape), multiplicative)

    return by_elements(input, amplitude, traced_p, rng_state, values)
