"""Comparing what contenders computed, in float64 and in parts, so that memory is left for large
tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._measure import WrongValues

_PART = 2**20  # elements of a part: caches hold so many in float64


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike along their first dimension."""
    shape = tensors[0].shape
    rows = max(1, _PART // max(1, shape[1:].numel()))
    return zip(*(t.split(rows) for t in tensors), strict=True)


@torch.no_grad()
def compare(
    name: str,
    actual: Tensor,
    expected: Callable[..., Tensor | tuple[Tensor, Tensor]],
    sources: tuple[Tensor, ...],
    allowed: float,
    floor: float = 1e-30,
) -> None:
    """Raises WrongValues unless `actual` is `expected(*sources)`, elementwise and in float64.

    The error is relative to the expected value. `expected` may return a size beside the value, such
    as that of terms that cancel: then the error is relative to the size. Neither counts as less
    than `floor`.
    """
    for got, *part in parts(actual, *sources):
        found = expected(*part)
        value, size = found if isinstance(found, tuple) else (found, found.abs())
        error = ((got.double() - value).abs() / size.clamp(min=floor)).max()
        if not error <= allowed:
            raise WrongValues(f"{name} is off by {float(error):.2e}, allowed {allowed:.2e}")


def check_share(name: str, dropped: int, count: int, p: float) -> None:
    """Raises WrongValues unless `dropped` of `count` is p to within 5 standard deviations."""
    share = dropped / count
    if abs(share - p) > 5 * math.sqrt(p * (1 - p) / count):
        raise WrongValues(f"{name}: {share:.4%} of {count} were dropped, p is {p:.0%}")
