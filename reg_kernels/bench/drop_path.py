"""Benchmarks of stochastic depth on the branch of a residual block, with and without the sum.

Bytes an element, s = sizeof(dtype): forward reads what is kept of x and writes y, (2 - P) s, and
reads the residual where there is one, s; backward reads what is kept of the gradient and writes
another, (2 - P) s, and the residual's gradient is the output's own. A layer scale's gradient reads
what is kept of the gradient and of x, 2 (1 - P) s more.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import functional as fused
from ._elementwise import Drawn, P, benchmark
from ._measure import BACKWARD, FORWARD, Benchmark, Goal, Scope, faster
from ._ways import Function, Makers

# N, C, H, W: past the caches, a late stage within them, a call whose time is the host's.
_BATCH, _TYPICAL, _SMALL = (64, 64, 56, 56), (64, 128, 14, 14), (64, 4, 2, 2)


def _makers(p: float) -> Makers:
    def eager(x: Tensor, *beside: Tensor) -> Tensor:
        """As models have it: a factor for each sample, which is multiplied in."""
        factors = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - p).div_(1 - p)
        for layer_scale in beside[1:]:
            x = x * layer_scale
        return beside[0] + x * factors if beside else x * factors

    def ours(backend: str | None) -> Function:
        return lambda x, residual=None, layer_scale=None: fused.drop_path(
            x, p, residual=residual, layer_scale=layer_scale, backend=backend
        )

    return Makers(lambda: eager, ours)


ALONE = Drawn("drop_path", _makers(P), as_one=1)
ADDED = ALONE._replace(variant="with residual", residual=True)
SCALED = ADDED._replace(variant="with layer scale", layer_scale=True)
HALVES = [
    drawn._replace(variant=f"{drawn.variant}, p=0.5", makers=_makers(0.5), p=0.5)
    for drawn in (ADDED, SCALED)
]
# Of 64 MiB in float32, where half of the branch is not read.
_HALF_SHAPE = (256, 64, 32, 32)
_GOALS = (
    Goal("native", "at most 0.9 of copy_'s time", "time_over_copy", 0.9),
    faster(4),
)


def cases(scope: Scope) -> list[Benchmark]:
    """The branch of a block alone, with the sum, and with a layer scale as well: large and in
    either direction, then smaller."""
    goals = _GOALS if scope.device.type == "cpu" else ()
    result = [
        _case(scope, half, FORWARD, torch.float32, _HALF_SHAPE, goals=goals) for half in HALVES
    ]
    for drawn in (ADDED, SCALED, ALONE):
        case = functools.partial(_case, scope, drawn)
        result += [case(FORWARD, dtype, _SMALL, host=True) for dtype in scope.of_small_calls]
        for dtype in scope.brief:
            for layout in ("contiguous", "channels_last") if scope.everything else ("contiguous",):
                result += [case(d, dtype, _BATCH, layout) for d in (FORWARD, BACKWARD)]
        directions = (FORWARD, BACKWARD) if scope.everything else (FORWARD,)
        result += [case(d, dtype, _TYPICAL) for dtype in scope.dtypes for d in directions]
    return result


def _case(
    scope: Scope,
    drawn: Drawn,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    **facts: Any,
) -> Benchmark:
    of_scale = 2 * (1 - drawn.p) if drawn.layer_scale else 0
    transfers = 2 - drawn.p + (drawn.residual if direction == FORWARD else of_scale)
    facts["transfers"] = transfers
    return benchmark(drawn, direction, dtype, shape, layout, scope, **facts)
