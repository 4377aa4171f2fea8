"""Uniform noise's inputs, with noise that is added and noise that is relative to the input."""

from __future__ import annotations

import functools

from torch import Tensor

from .. import functional as F
from ..reference._philox import tag, words
from ._noise import noise_cases
from .dropout import state

AMPLITUDE = 0.7


def _oracle(variant: str, x: Tensor, offset: int) -> Tensor:
    drawn = words(state(x.device), tag("uniforms"), offset, x.numel())
    u = (((drawn + 2**31) % 2**32 - 2**31).double() / 2**31).to(x.dtype)
    return x + AMPLITUDE * u * (x if variant else 1)


CASES = noise_cases(
    "uniform_noise",
    {
        "": functools.partial(F.uniform_noise, amplitude=AMPLITUDE),
        "multiplicative": functools.partial(
            F.uniform_noise, amplitude=AMPLITUDE, multiplicative=True
        ),
    },
    _oracle,
)
