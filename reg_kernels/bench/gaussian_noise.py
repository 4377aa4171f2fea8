"""Benchmarks of Gaussian noise, added and relative to the input."""

from __future__ import annotations

import functools

import torch

from .. import functional as fused
from ._elementwise import Drawn
from ._measure import Benchmark, Goal, Scope
from ._noise import check_gradient, check_moments, of_noise
from ._ways import Makers

_STD = 0.1
_GOALS = (
    Goal("native", "at most 2 of copy_'s time", "time_over_copy", 2.0),
    Goal("native", "at least 8 times eager's speed", "speedup_over_eager", 8, True),
)
ADDED = Drawn(
    "gaussian_noise",
    Makers(
        lambda: lambda x: x + _STD * torch.randn_like(x),
        lambda backend: lambda x: fused.gaussian_noise(x, _STD, backend=backend),
    ),
    check_forward=functools.partial(check_moments, relative=False, std=_STD),
)
RELATIVE = Drawn(
    "gaussian_noise",
    Makers(
        lambda: lambda x: x * (1 + _STD * torch.randn_like(x)),
        lambda backend: (
            lambda x: fused.gaussian_noise(x, _STD, multiplicative=True, backend=backend)
        ),
    ),
    variant="multiplicative",
    check_forward=functools.partial(check_moments, relative=True, std=_STD),
    check_backward=check_gradient,
)


def cases(scope: Scope) -> list[Benchmark]:
    return of_noise(scope, [ADDED, RELATIVE], _GOALS)
