"""Benchmarks of dropout and channel dropout.

Forward reads x and writes y, backward reads the gradient and writes another: 2 * sizeof(dtype)
bytes an element either way. The mask is drawn again, never read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from .. import functional as fused
from .. import nn
from ._elementwise import Drawn, P, benchmark
from ._measure import BACKWARD, FORWARD, Benchmark, Goal, Scope
from ._ways import Makers

_MIB = 2**20
_LARGE_CPU = 64 * _MIB
# N, C, then L, or H, W of a ResNet's first stage and of a late one, or D, H, W: past the caches,
# a typical one within them, and a call whose time is the host's.
_CHANNELS = {
    "dropout1d": ((64, 64, 4096), (32, 64, 196), (2, 8, 4)),
    "dropout2d": ((64, 64, 56, 56), (32, 64, 14, 14), (2, 8, 2, 2)),
    "dropout3d": ((8, 64, 32, 32, 32), (4, 64, 8, 14, 14), (2, 8, 1, 2, 2)),
}

_KEPT = Goal("native", "keeps 16 bytes for backward", "kept_bytes", 16)
_HOST_CPU = Goal("native", "at most 1.5 of nn.Dropout's time", "time_over_eager", 1.5)
_HOST_GRAD = Goal("native", "at most 1.3 of nn.Dropout's time", "time_over_eager", 1.3)
_HOST_GPU = Goal("native", "at most 1.3 of eager's time", "time_over_eager", 1.3)
# The second where `copy_` itself reads what it overwrites.
_CPU_FP32 = tuple(
    Goal("native", f"at most {limit:g} of copy_'s time", "time_over_copy", limit)
    for limit in (1.0, 0.85)
)
_CPU_BF16 = Goal("native", "at most 1.3 of copy_'s time", "time_over_copy", 1.3)
_CPU_BF16_HALF = Goal("native", "at most 1.5 of copy_'s time", "time_over_copy", 1.5)
_CPU_EAGER = Goal("native", "at least 50 times eager's speed", "speedup_over_eager", 50, True)
_GPU = (
    Goal("native", "at least 0.92 of copy bandwidth", "share_of_copy", 0.92, True),
    Goal("native", "ahead of eager", "speedup_over_eager", 1, True),
    Goal("native", "ahead of torch.compile", "speedup_over_compile", 1, True),
)


def cases(scope: Scope) -> list[Benchmark]:
    """Small calls, elements by size, and channels by shape and layout; forward and backward."""
    result = []
    on_gpu = scope.device.type == "cuda"
    for dtype in scope.of_small_calls:
        for direction, requires_grad in ((FORWARD, False), (FORWARD, True), (BACKWARD, True)):
            goals = (_HOST_GRAD if requires_grad else _HOST_CPU,)
            if on_gpu:
                goals = (_HOST_GPU,) if direction == FORWARD else ()
            case = functools.partial(_case, "dropout", direction, dtype, (16,), "contiguous")
            result.append(case(scope, requires_grad=requires_grad, host=True, goals=goals))
    for size in _sizes(scope.device):
        for dtype in scope.dtypes:
            for direction in (FORWARD, BACKWARD):
                goals = _goals(scope.device, direction, dtype, size)
                shape = (size // dtype.itemsize,)
                result.append(
                    _case("dropout", direction, dtype, shape, "contiguous", scope, goals=goals)
                )
    if not on_gpu and torch.bfloat16 in scope.dtypes:
        place = ("dropout", FORWARD, torch.bfloat16, (_LARGE_CPU // 4,), "contiguous", scope)
        result.append(_case(*place, goals=(_CPU_BF16_HALF,)))  # as many elements as in float32
    for op in _CHANNELS:
        result += _of_channels(scope, op)
    return result


def _of_channels(scope: Scope, op: str) -> Iterator[Benchmark]:
    large, typical, small = _CHANNELS[op]
    brief = op != "dropout2d" and not scope.everything
    directions = (FORWARD,) if brief else (FORWARD, BACKWARD)
    for dtype in scope.brief:
        for layout in ("contiguous", "channels_last") if op == "dropout2d" else ("contiguous",):
            for direction in directions:
                yield _case(op, direction, dtype, large, layout, scope)
    for dtype in scope.dtypes:
        for direction in (FORWARD, BACKWARD) if scope.everything else (FORWARD,):
            yield _case(op, direction, dtype, typical, "contiguous", scope)
    for dtype in scope.of_small_calls:
        yield _case(op, FORWARD, dtype, small, "contiguous", scope, host=True)


def sized(scope: Scope, elements: int) -> list[Benchmark]:
    """Points of growth curves: float32 in one dimension, either direction."""
    case = functools.partial(_case, "dropout", dtype=torch.float32, shape=(elements,))
    return [case(d, layout="contiguous", scope=scope) for d in (FORWARD, BACKWARD)]


def _sizes(device: torch.device) -> list[int]:
    """Bytes of an input; those that goals are about come first where time may be short."""
    if device.type != "cuda":
        return [_MIB, _LARGE_CPU]
    # Every contender's outputs, saved masks and gradients are there at the same time.
    memory = torch.cuda.get_device_properties(device).total_memory
    return [s for s in (64 * _MIB, 256 * _MIB, 1024 * _MIB, _MIB) if 16 * s <= memory]


def _goals(device: torch.device, direction: str, dtype: torch.dtype, size: int) -> tuple[Goal, ...]:
    if size < 64 * _MIB or dtype not in (torch.float32, torch.bfloat16):
        return ()
    kept = (_KEPT,) if direction == FORWARD else ()
    if device.type == "cuda":
        return (*_GPU, *kept)
    if dtype == torch.bfloat16:
        return (_CPU_BF16, *kept)
    return (*_CPU_FP32, *((_CPU_EAGER,) if direction == FORWARD else ()), *kept)


def _case(
    op: str,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    scope: Scope,
    *,
    requires_grad: bool = True,
    host: bool = False,
    goals: tuple[Goal, ...] = (),
) -> Benchmark:
    drawn = Drawn(op, _modules(op) if host else _functions(op), 2 if op in _CHANNELS else None)
    facts = {"requires_grad": requires_grad, "host": host, "goals": goals}
    return benchmark(drawn, direction, dtype, shape, layout, scope, **facts)


def _functions(op: str) -> Makers:
    eager, ours = getattr(F, op), getattr(fused, op)
    return Makers(
        lambda: lambda x: eager(x, P, True),
        lambda backend: lambda x: ours(x, P, True, backend=backend),
    )


def _modules(op: str) -> Makers:
    """Layers, which is what a small call's time on the host is about."""
    name = op.capitalize()
    return Makers(
        lambda: getattr(torch.nn, name)(P),
        lambda backend: getattr(nn, name)(P, backend=backend),
    )
