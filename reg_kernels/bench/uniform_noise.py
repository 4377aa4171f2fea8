"""Benchmarks of uniform noise."""

from __future__ import annotations

import functools
import math

import torch

from .. import functional as fused
from ._elementwise import Drawn
from ._measure import Benchmark, Scope
from ._noise import check_moments, of_noise
from ._ways import Makers

_AMPLITUDE = 0.1
ADDED = Drawn(
    "uniform_noise",
    Makers(
        lambda: lambda x: x + torch.empty_like(x).uniform_(-_AMPLITUDE, _AMPLITUDE),
        lambda backend: lambda x: fused.uniform_noise(x, _AMPLITUDE, backend=backend),
    ),
    check_forward=functools.partial(check_moments, relative=False, std=_AMPLITUDE / math.sqrt(3)),
)


def cases(scope: Scope) -> list[Benchmark]:
    return of_noise(scope, [ADDED])
