"""Benchmarks of a residual block whose branch has half of the samples: all of it but the branch.

Bytes an element, s = sizeof(dtype), K / N = 1 / 2: gathering reads and writes s / 2 each; adding
reads the batch and what came of the branch, and writes: 2.5 s. Backward moves as much the other way
round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.subset import Subset, add_of_subset
from ._measure import BACKWARD, FORWARD, Benchmark, Contender, Goal, Scope, Skipped, faster
from ._values import compare
from ._ways import Function, Inputs, Makers, Way, calls, in_layout, ways

# N, C, H, W: past the caches, a late stage within them, a call whose time is the host's.
_LARGE, _TYPICAL, _SMALL = (256, 64, 32, 32), (64, 128, 14, 14), (64, 4, 2, 2)
_SCALE = 2.0
_GOALS = (
    Goal("native", "at most 1.1 of copy_'s time", "time_over_copy", 1.1),
    faster(1.2),
)


def cases(scope: Scope) -> list[Benchmark]:
    """Large and in either direction, then smaller."""
    goals = _GOALS if scope.device.type == "cpu" else ()
    case = functools.partial(_case, scope)
    result = [case(FORWARD, dtype, _SMALL, host=True) for dtype in scope.of_small_calls]
    for dtype in scope.brief:
        for layout in ("contiguous", "channels_last") if scope.everything else ("contiguous",):
            held = goals if dtype == torch.float32 and layout == "contiguous" else ()
            result += [case(d, dtype, _LARGE, layout, goals=held) for d in (FORWARD, BACKWARD)]
    return result + [case(FORWARD, dtype, _TYPICAL) for dtype in scope.dtypes]


def _case(
    scope: Scope,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    *,
    goals: tuple[Goal, ...] = (),
    host: bool = False,
) -> Benchmark:
    size = math.prod(shape) * dtype.itemsize

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        order = torch.randperm(shape[0], device=device)
        subset = Subset(order[: shape[0] // 2].sort().values, order[shape[0] // 2 :])

        def values() -> Tensor:
            return in_layout(torch.randn(shape, dtype=dtype, device=device), layout)

        arguments = [(values().requires_grad_(),) for _ in range(pool)]
        grads = [values() for _ in range(pool if direction == BACKWARD else 0)]
        inputs = Inputs(arguments, arguments, grads)
        options = (direction, device, dtype, size, scope.compiled)
        return [
            way if isinstance(way, Skipped) else _contender(way, subset, direction, inputs)
            for way in ways("subset", _makers(subset), *options)
        ]

    return Benchmark(
        op="subset",
        variant="",
        direction=direction,
        dtype=dtype,
        shape=shape,
        bytes=round(3.5 * size),
        prepare=prepare,
        layout=layout,
        goals=goals,
        host=host,
    )


def _makers(subset: Subset) -> Makers:
    def eager(x: Tensor) -> Tensor:
        return x.index_add(0, subset.kept, x.index_select(0, subset.kept), alpha=_SCALE)

    def ours(backend: str | None) -> Function:
        return lambda x: add_of_subset(x, lambda x: x, subset, _SCALE, backend)

    return Makers(lambda: eager, ours)


def _contender(way: Way, subset: Subset, direction: str, inputs: Inputs) -> Contender:
    of = calls(way.function, inputs)

    def check() -> None:
        (x,) = inputs.arguments[0]
        source = inputs.grads[0] if direction == BACKWARD else x.detach()
        (y, *_) = of.backward(0) if direction == BACKWARD else (of.forward(0),)
        factor = torch.ones(len(x), *[1] * (x.dim() - 1), device=x.device)
        factor[subset.kept] += _SCALE
        allowed = 1.51 * torch.finfo(x.dtype).eps  # for three roundings
        compare(way.name, y.detach(), lambda x, f: x.double() * f, (source, factor), allowed)

    return Contender(way.name, of.of(direction), check, way.within, way.may_fail)
