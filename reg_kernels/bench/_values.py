"""What contenders computed, compared in float64; in parts, so that large tensors leave room."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._measure import WrongValues

_PART = 2**20  # elements that are looked at in one go: in float64, what caches hold


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

    The error is relative to the expected value, or to what `expected` gives beside it, such as the
    size of terms that cancel; where that is smaller, to `floor`.
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
