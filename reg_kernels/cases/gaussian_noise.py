"""Gaussian noise's inputs, with noise that is added and noise that is relative to the input."""

from __future__ import annotations

import functools

from torch import Tensor

from .. import functional as F
from ..reference._philox import normals, tag
from ._noise import noise_cases
from .dropout import state

STD = 0.7


def _oracle(variant: str, x: Tensor, offset: int) -> Tensor:
    z = normals(state(x.device), tag("gaussian"), offset, x.numel()).to(x.dtype)
    return x + STD * z * (x if variant else 1)


CASES = noise_cases(
    "gaussian_noise",
    {
        "": functools.partial(F.gaussian_noise, std=STD),
        "multiplicative": functools.partial(F.gaussian_noise, std=STD, multiplicative=True),
    },
    _oracle,
)
