"""Dropout and channel dropout in Triton, by the random elementwise family (_elementwise.py).

Reads x, writes y: 2 * sizeof(dtype) bytes an element, forward and backward alike.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import is_channels_last
from .._rng import TAG_DROPOUT
from ._elementwise import DrawnBy, Element, fresh, launch_rows, over


@triton.jit
def dropout_values(x, half_word, threshold, scale):
    """x m in the type of x."""
    return x * tl.where(half_word < threshold, scale.to(x.dtype), 0.0)


DROPOUT = Element(dropout_values, TAG_DROPOUT)


def _launch_features(x: Tensor, y: Tensor, drawn: tuple[Any, ...]) -> None:
    samples, channels = x.shape[:2]
    launch_rows(
        *(DROPOUT, x, y, DrawnBy(*drawn)),
        samples=samples,
        rows=channels,
        rows_last=is_channels_last(x),
    )


def dropout(input: Tensor, *drawn: Any) -> Tensor:
    """The op; `drawn`: what DrawnBy has."""
    return fresh(DROPOUT, input, DrawnBy(*drawn))


def dropout_(input: Tensor, *drawn: Any) -> None:
    over(DROPOUT, input, DrawnBy(*drawn))


def feature_dropout(input: Tensor, *drawn: Any) -> Tensor:
    """The op's result as a fresh tensor; input (N, C, ...) contiguous or channels last."""
    y = torch.empty_like(input)
    _launch_features(input, y, drawn)
    return y


def feature_dropout_(input: Tensor, *drawn: Any) -> None:
    """The same over such an input."""
    _launch_features(input, input, drawn)
