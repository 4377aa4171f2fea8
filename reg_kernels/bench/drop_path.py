"""Benchmarks of stochastic depth on the branch of a residual block, with and without the sum.

Bytes an element, s = sizeof(dtype): forward reads what is kept of x and writes y, (2 - P) s, and
reads the residual where there is one, s; backward reads what is kept of the gradient and writes
another, (2 - P) s, and the residual's gradient is the output's own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import functional as fused
from ._elementwise import Drawn, P, benchmark
from ._measure import BACKWARD, FORWARD, Benchmark, Scope
from ._ways import Makers

# N, C, H, W: past the caches, a late stage within them, a call whose time is the host's.
_BATCH, _TYPICAL, _SMALL = (64, 64, 56, 56), (64, 128, 14, 14), (64, 4, 2, 2)


def _eager(x: Tensor, *residual: Tensor) -> Tensor:
    """As models have it: a factor for each sample, which is multiplied in."""
    factors = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - P).div_(1 - P)
    return residual[0] + x * factors if residual else x * factors


_MAKERS = Makers(
    lambda: _eager,
    lambda backend: (
        lambda x, residual=None: fused.drop_path(x, P, residual=residual, backend=backend)
    ),
)
ALONE = Drawn("drop_path", _MAKERS, as_one=1)
ADDED = ALONE._replace(variant="with residual", residual=True)


def cases(scope: Scope) -> list[Benchmark]:
    """The branch of a block alone and with the sum, large and in either direction, then smaller."""
    result = []
    for drawn in (ADDED, ALONE):
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
    *,
    host: bool = False,
) -> Benchmark:
    transfers = 2 - P + (drawn.residual and direction == FORWARD)
    facts = {"host": host, "transfers": transfers}
    return benchmark(drawn, direction, dtype, shape, layout, scope, **facts)
