"""Benchmarks of one step of an adversarial attack, in each norm.

Bytes an element, s = sizeof(dtype): reads adv, grad and clean, and writes adv, 4 s. L2 reads all
three once before that, and L1 some times: that is not counted, since a cache holds a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import functional as fused
from ._measure import FORWARD, Benchmark, Contender, Goal, Scope, Skipped, faster
from ._values import compare
from ._ways import Makers, Way, ways

_BATCH, _TYPICAL, _SMALL = (112, 3, 224, 224), (128, 3, 32, 32), (8, 3, 8, 8)

# Of a share of an element: what a step and a radius are in L-infinity.
STEP, EPS = 2 / 255, 8 / 255
_COPY = {
    "linf": Goal("native", "at most 1.1 of a copy of as many bytes", "time_over_copy", 1.1),
    "l2": Goal("native", "at most 1.3 of a copy of as many bytes", "time_over_copy", 1.3),
}


def _radius(norm: str, shape: tuple[int, ...]) -> float:
    count = math.prod(shape[1:])
    return {"linf": 1.0, "l2": count**0.5, "l1": 0.5 * count}[norm]


def cases(scope: Scope) -> list[Benchmark]:
    """A batch of images in each norm, then smaller ones."""
    norms = ("linf", "l2", "l1")
    result = [_case(scope, norm, dtype, _BATCH) for norm in norms for dtype in scope.brief]
    result += [_case(scope, norm, dtype, _TYPICAL) for norm in norms for dtype in scope.dtypes]
    small = norms if scope.everything else norms[:1]
    for norm in small:
        result += [_case(scope, norm, d, _SMALL, host=True) for d in scope.of_small_calls]
    return result


def _goals(scope: Scope, norm: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Goal, ...]:
    if dtype != torch.float32 or shape != _BATCH or norm == "l1":
        return ()
    goals = (faster(4),) if norm == "linf" else ()
    return (*goals, *((_COPY[norm],) if scope.device.type == "cpu" else ()))


def _case(
    scope: Scope, norm: str, dtype: torch.dtype, shape: tuple[int, ...], *, host: bool = False
) -> Benchmark:
    unit = _radius(norm, shape)

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        options = {"dtype": dtype, "device": device}
        # Of the ball's surface, where a step is brought back.
        inputs = []
        for _ in range(pool):
            clean = torch.rand(shape, **options)
            away = torch.randint(2, shape, device=device).to(dtype).sub_(0.5).mul_(2 * EPS)
            inputs.append((clean + away, torch.randn(shape, **options), clean))
        found = ways(
            "adversarial_step_",
            _functions(norm, unit),
            direction=FORWARD,
            device=device,
            dtype=dtype,
            size=math.prod(shape) * dtype.itemsize,
            compiled=scope.compiled,
        )
        return [
            way if isinstance(way, Skipped) else _contender(way, norm, unit, inputs)
            for way in found
        ]

    return Benchmark(
        op="adversarial_step",
        variant=norm,
        direction=FORWARD,
        dtype=dtype,
        shape=shape,
        bytes=4 * math.prod(shape) * dtype.itemsize,
        prepare=prepare,
        requires_grad=False,
        host=host,
        goals=_goals(scope, norm, dtype, shape),
    )


def _functions(norm: str, unit: float) -> Makers:
    """Functions of adv, grad and clean that write over adv. Eager's is as attacks are written; the
    L1 ball's threshold by sorting."""
    step, eps = STEP * unit, EPS * unit

    def ours(backend: str | None) -> Callable[..., Tensor]:
        def call(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
            return fused.adversarial_step_(
                adv, grad, clean, step, eps, norm, 0.0, 1.0, backend=backend
            )

        return call

    def eager(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        return adv.copy_(stepped(adv, grad, clean, step, eps, norm))

    return Makers(lambda: eager, ours)


def stepped(adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float, norm: str) -> Tensor:
    """The formula in the tensors' dtype."""
    if norm == "linf":
        way = (adv + step * grad.sign() - clean).clamp(-eps, eps)
        return (clean + way).clamp(0, 1)
    shape = (-1, *[1] * (adv.dim() - 1))
    order = 1 if norm == "l1" else 2
    lengths = torch.linalg.vector_norm(grad.flatten(1), order, 1)
    way = adv + step * grad / lengths.clamp(min=1e-10).view(shape) - clean
    length = torch.linalg.vector_norm(way.flatten(1), order, 1).view(shape)
    if norm == "l2":
        way = way * (eps / length).clamp(max=1)
    else:
        sums = way.flatten(1).abs().sort(1, descending=True).values.cumsum(1) - eps
        level = sums / torch.arange(1, sums.shape[1] + 1, dtype=way.dtype, device=way.device)
        threshold = level.amax(1).clamp(min=0).view(shape)
        way = way.sign() * (way.abs() - threshold).clamp(min=0)
    return (clean + way).clamp(0, 1)


def _contender(
    way: Way, norm: str, unit: float, inputs: list[tuple[Tensor, Tensor, Tensor]]
) -> Contender:
    def check() -> None:
        adv, grad, clean = inputs[0]
        y = way.function(adv.clone(), grad, clean)
        check_values(f"adversarial_step {norm}, {way.name}", norm, unit, inputs[0], y)

    return Contender(
        way.name, lambda i: way.function(*inputs[i % len(inputs)]), check, way.within, way.may_fail
    )


def check_values(
    name: str, norm: str, unit: float, inputs: tuple[Tensor, Tensor, Tensor], y: Tensor
) -> None:
    """Raises WrongValues unless y is what the step makes of adv, grad and clean, to some roundings
    of values around 1: sums of 16 bits are far off in eager."""

    def truth(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        wide = (x.double() for x in (adv, grad, clean))
        return stepped(*wide, STEP * unit, EPS * unit, norm)

    allowed = (4 if norm == "linf" else 16) * torch.finfo(y.dtype).eps
    compare(f"{name}: output", y, truth, inputs, allowed, 1.0)
