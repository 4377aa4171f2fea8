"""Benchmarks of distillation: the divergence from a teacher's logits beside the loss of labels.

Bytes of a logit, s = sizeof(dtype): the loss with its gradient reads student and teacher and writes
the student's gradient, 3 s; the loss alone reads them, 2 s. Labels do not count. On the CPU
`Tensor.copy_` moves three transfers for two that are counted, so that the floor is 2/3 of its time
where gradients are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional as fused
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
from ._ways import Makers, ways

ALPHA = 0.5

_GOALS = (faster(3), faster(1.3, COMPILE))
# The copy is of as many bytes as the loss moves, one and a half times those of a copy of logits.
_COPY = Goal(
    "native",
    "at most 1.67 of copy_'s time: 2.5 of that for one tensor of logits",
    "time_over_copy",
    2.5 / 1.5,
)


def cases(scope: Scope) -> list[Benchmark]:
    """A vocabulary's logits with their gradient and without; another temperature, small batches."""
    shape = vocabulary(scope.device)
    points = [(BOTH, 2.0), (FORWARD, 2.0)]
    places = [(*point, default_dtype(scope), shape) for point in points]
    if scope.everything:
        points.append((BOTH, 1.5))
        places = [(*point, dtype, shape) for dtype in scope.dtypes for point in points]
    places += [(BOTH, 2.0, dtype, CLASSES) for dtype in scope.dtypes]
    result = [_case(scope, *place) for place in places if fits(scope.device, place[3], place[2])]
    for dtype in scope.of_small_calls:
        for direction in (BOTH, FORWARD) if scope.everything else (BOTH,):
            result.append(_case(scope, direction, 2.0, dtype, SMALL, host=True))
    return result


def _case(
    scope: Scope,
    direction: str,
    temperature: float,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    host: bool = False,
) -> Benchmark:
    requires_grad = direction == BOTH
    goals: tuple[Goal, ...] = ()
    if requires_grad and has_goals(scope.device, dtype, shape):
        goals = (*_GOALS, _COPY) if scope.device.type == "cpu" else _GOALS
    size = torch.Size(shape).numel() * dtype.itemsize

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        def draw() -> Tensor:
            return draw_logits(shape, dtype, device, "contiguous")

        arguments = [
            (draw().requires_grad_(requires_grad), draw(), draw_labels(shape, device))
            for _ in range(pool)
        ]
        student, teacher, labels = arguments[0]
        truth = Truth(
            student, [(1.0, labels)], teacher=teacher, temperature=temperature, alpha=ALPHA
        )
        inputs = loss_inputs(arguments)
        makers = _functions(temperature)
        return [
            way
            if isinstance(way, Skipped)
            else contender("distillation", way, truth, direction, inputs)
            for way in ways(
                "distillation",
                makers,
                direction=direction,
                device=device,
                dtype=dtype,
                size=size,
                compiled=scope.compiled,
            )
        ]

    return Benchmark(
        op="distillation",
        variant=f"T={temperature:g}",
        direction=direction,
        dtype=dtype,
        shape=shape,
        bytes=(2 + requires_grad) * size,
        prepare=prepare,
        requires_grad=requires_grad,
        host=host,
        goals=goals,
    )


def _functions(temperature: float) -> Makers:
    """Functions of student, teacher and labels. Eager's is as one writes it."""
    T = temperature

    def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q, p = F.log_softmax(student / T, 1), F.softmax(teacher / T, 1)
        soft = F.kl_div(log_q, p, reduction="batchmean") * T**2
        return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, labels)

    def ours(backend: str | None) -> Callable[..., Tensor]:
        options = {"temperature": T, "alpha": ALPHA, "backend": backend}
        return lambda *arguments: fused.distillation_loss(*arguments, **options)

    return Makers(lambda: eager, ours)
