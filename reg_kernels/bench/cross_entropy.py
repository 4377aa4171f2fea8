"""Benchmarks of cross-entropy: pairs of labels, smoothed and plain ones, probabilities.

Bytes of a logit, s = sizeof(dtype): the loss with its gradient reads it and writes the gradient,
2 s; the loss alone reads it, s. Class probabilities are read once more, s. Labels do not count. On
the CPU `Tensor.copy_` moves three transfers for two that are counted, so that the floor is 2/3 of
its time where gradients are streamed.

The upstream gradient is 1, as in `loss.backward()`, and every call makes a gradient of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional as fused
from .._mixed_target import MixedTarget
from ._logits import (
    CLASSES,
    SMALL,
    Truth,
    contender,
    default_dtype,
    draw_labels,
    draw_logits,
    fits,
    has_goals,
    loss_inputs,
    vocabulary,
)
from ._measure import BOTH, COMPILE, FORWARD, Benchmark, Contender, Goal, Scope, Skipped, faster
from ._peers import LIGER, peer
from ._ways import Inputs, Makers, Way, ways

LAM = 0.3

_COPY = Goal("native", "at most 1.6 of copy_'s time", "time_over_copy", 1.6)
_HOST = Goal("native", "at most eager's time", "time_over_eager", 1)

_SEGMENTATION = (8, 21, 512, 512)


class Kind(NamedTuple):
    """What the target is."""

    variant: str
    pair: bool = False
    probabilities: bool = False
    smoothing: float = 0.0


PAIR = Kind("pair", pair=True)
SMOOTHED = Kind("smoothed", smoothing=0.1)
LABELS = Kind("labels")
PROBABILITIES = Kind("probabilities", probabilities=True)

_KINDS = (PAIR, SMOOTHED, LABELS, PROBABILITIES)


def cases(scope: Scope) -> list[Benchmark]:
    """A vocabulary's logits, with their gradient and without; then images and small batches."""
    result = [
        _case(scope, kind, direction, dtype, shape, layout)
        for kind, direction, dtype, shape, layout in _points(scope)
        if fits(scope.device, shape, dtype)
    ]
    directions = (BOTH, FORWARD) if scope.everything else (BOTH,)
    for place in itertools.product((PAIR, LABELS), directions, scope.of_small_calls):
        result.append(_case(scope, *place, SMALL, host=True))
    return result


def sized(scope: Scope, elements: int) -> list[Benchmark]:
    """Points of growth curves: rows of 1,024 classes with a label each, and their gradient."""
    return [_case(scope, LABELS, BOTH, torch.float32, (elements // 1024, 1024))]


Point = tuple[Kind, str, torch.dtype, tuple[int, ...], str]  # direction second, layout last


def _points(scope: Scope) -> Iterator[Point]:
    shape = vocabulary(scope.device)
    if not scope.everything:
        for kind, direction in ((PAIR, BOTH), (SMOOTHED, BOTH), (SMOOTHED, FORWARD)):
            yield kind, direction, default_dtype(scope), shape, "contiguous"
        for kind, dtype in itertools.product((PAIR, SMOOTHED), scope.dtypes):
            yield kind, BOTH, dtype, CLASSES, "contiguous"
        for kind in (LABELS, PROBABILITIES):
            yield kind, BOTH, default_dtype(scope), CLASSES, "contiguous"
        return
    for dtype in scope.dtypes:
        for kind, direction in itertools.product(_KINDS, (BOTH, FORWARD)):
            yield kind, direction, dtype, shape, "contiguous"
        for kind in _KINDS:
            yield kind, BOTH, dtype, CLASSES, "contiguous"
        for layout in ("contiguous", "channels_last"):
            yield LABELS, BOTH, dtype, _SEGMENTATION, layout


def _goals(
    device: torch.device, kind: Kind, direction: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Goal, ...]:
    on_cpu = device.type == "cpu"
    if on_cpu and direction == BOTH and shape == SMALL:
        return (_HOST,)
    if direction != BOTH or not has_goals(device, dtype, shape):
        return ()
    if kind is PAIR:
        return (faster(4), faster(2.5, COMPILE), *((_COPY,) if on_cpu else ()))
    return (faster(2), faster(1.4, COMPILE)) if kind is SMOOTHED else ()


def _case(
    scope: Scope,
    kind: Kind,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    *,
    host: bool = False,
) -> Benchmark:
    requires_grad = direction == BOTH
    size = torch.Size(shape).numel() * dtype.itemsize
    for_liger = not kind.pair and not kind.probabilities and len(shape) == 2

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        arguments = []
        for _ in range(pool):
            logits = draw_logits(shape, dtype, device, layout).requires_grad_(requires_grad)
            if kind.probabilities:
                targets = (draw_logits(shape, dtype, device, layout).softmax(1),)
            else:
                targets = tuple(draw_labels(shape, device) for _ in range(1 + kind.pair))
            arguments.append((logits, *targets))
        inputs = loss_inputs(arguments)
        truth = _truth(kind, *arguments[0])
        entries: list[Contender | Skipped] = []
        makers = _functions(kind)
        for way in ways(
            "cross_entropy",
            makers,
            direction=direction,
            device=device,
            dtype=dtype,
            size=size,
            compiled=scope.compiled,
        ):
            if isinstance(way, Skipped):
                entries.append(way)
            elif not way.ours and (reason := _overflow(kind, dtype, shape)) is not None:
                entries.append(Skipped(way.name, reason))
            else:
                entries.append(contender("cross_entropy", way, truth, direction, inputs))
        if for_liger:
            entries.append(_liger(kind, truth, direction, inputs))
        return entries

    return Benchmark(
        op="cross_entropy",
        variant=kind.variant,
        direction=direction,
        dtype=dtype,
        shape=shape,
        bytes=(1 + requires_grad + kind.probabilities) * size,
        prepare=prepare,
        layout=layout,
        requires_grad=requires_grad,
        host=host,
        peers=(LIGER,) if scope.device.type == "cuda" and for_liger else (),
        goals=_goals(scope.device, kind, direction, dtype, shape),
    )


def _truth(kind: Kind, logits: Tensor, *targets: Tensor) -> Truth:
    shares = (LAM, 1 - LAM) if kind.pair else (1.0,)
    return Truth(logits, list(zip(shares, targets, strict=True)), kind.smoothing)


def _functions(kind: Kind) -> Makers:
    """Functions of logits and targets. Eager's is as one writes it."""

    def eager(logits: Tensor, target: Tensor, *partner: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target, label_smoothing=kind.smoothing)
        if not partner:
            return loss
        return LAM * loss + (1 - LAM) * F.cross_entropy(logits, *partner)

    def ours(backend: str | None) -> Callable[..., Tensor]:
        def function(logits: Tensor, target: Tensor, *partner: Tensor) -> Tensor:
            mixed = MixedTarget(target, *partner, LAM) if partner else target
            options = {"label_smoothing": kind.smoothing, "backend": backend}
            return fused.cross_entropy(logits, mixed, **options)

        return function

    return Makers(lambda: eager, ours)


def _overflow(kind: Kind, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why torch has no loss in float16, whose numbers end at 65504, or None where it has one."""
    classes = shape[1]
    if dtype != torch.float16:
        return None
    if kind.smoothing > 0 and classes * math.log(classes) > 65504:
        return "torch sums a position's log-probabilities in float16, and overflows"
    if not kind.probabilities and torch.Size(shape).numel() // classes > 65504:
        return "torch counts the positions in float16, and overflows"
    return None


def _liger(kind: Kind, truth: Truth, direction: str, inputs: Inputs) -> Contender | Skipped:
    """Liger-Kernel's cross-entropy. It waits for the GPU in either direction; its time includes
    that."""
    if inputs.grads[0].device.type != "cuda":
        return Skipped(LIGER, "its Triton kernels need a GPU")
    liger = peer(LIGER, "liger_kernel.transformers.functional")
    if isinstance(liger, Skipped):
        return liger

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return liger.liger_cross_entropy(logits, target, label_smoothing=kind.smoothing)

    # It writes the gradient over the logits, so it gets logits of its own.
    own = [
        (logits.detach().clone().requires_grad_(logits.requires_grad), target)
        for logits, target in inputs.arguments
    ]
    way = Way(LIGER, function, False, contextlib.nullcontext, True)
    entry = contender("cross_entropy", way, truth, direction, loss_inputs(own))

    def check() -> None:
        with torch.no_grad():
            own[0][0].copy_(inputs.arguments[0][0])
        entry.check()

    return dataclasses.replace(entry, check=check)
