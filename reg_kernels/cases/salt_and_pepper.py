"""Impulse noise's inputs, with the usual values and with others."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import functional as F
from ..reference._philox import half_words, tag
from ._noise import noise_cases
from .dropout import P, state

SALT, LOW, HIGH = 0.2, -1.5, 2.25


def _oracle(variant: str, x: Tensor, offset: int) -> Tensor:
    drawn = half_words(state(x.device), tag("impulses"), offset, x.numel())
    low, high, salt = (LOW, HIGH, SALT) if variant else (0.0, 1.0, 0.5)
    y = torch.where(drawn < round(P * 65536), low, x)
    return torch.where(drawn < round(P * salt * 65536), high, y)


CASES = noise_cases(
    "salt_and_pepper",
    {
        "": functools.partial(F.salt_and_pepper, p=P),
        "of values": functools.partial(
            F.salt_and_pepper, p=P, salt_vs_pepper=SALT, low=LOW, high=HIGH
        ),
    },
    _oracle,
)
