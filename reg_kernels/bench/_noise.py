"""What the benchmarks of noise share. Forward reads x and writes y, 2 * sizeof(dtype) bytes an
element; so does a backward, where noise is relative to x or replaces it. The gradient of noise that
is added is the output's own."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ._elementwise import Drawn, benchmark
from ._measure import BACKWARD, FORWARD, Benchmark, Goal, Scope, WrongValues
from ._values import compare

_LARGE, _TYPICAL = 64 * 2**20, (32, 64, 14, 14)  # bytes; N, C, H, W
_SMALL = (16,)


def check_moments(
    name: str, inputs: tuple[Tensor, ...], y: Tensor, *, relative: bool, std: float
) -> None:
    """Raises WrongValues unless the noise in y has a mean of 0 and this deviation, to within 5
    standard errors of theirs and the output's rounding."""
    x = inputs[0].detach().double()
    noise = (y.detach().double() - x) / (x if relative else 1)
    count, rounding = noise.numel(), 2 * torch.finfo(y.dtype).eps
    mean, square = float(noise.mean()), float(noise.square().mean())
    if abs(mean) > 5 * std / math.sqrt(count) + rounding:
        raise WrongValues(f"{name}: the noise has a mean of {mean:.2e}")
    # A normal square's variance is 2; a uniform one's is less.
    if abs(square / std**2 - 1) > 5 * math.sqrt(2 / count) + rounding / std**2:
        raise WrongValues(
            f"{name}: the noise has a deviation of {math.sqrt(square):.4f}, not {std}"
        )


def check_gradient(
    name: str,
    inputs: tuple[Tensor, ...],
    y: Tensor,
    grad_output: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Raises WrongValues unless the gradient is that of y = x m, with the m that y shows."""

    def expected(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        multiplier = y.double() / x.double()
        return grad.double() * multiplier, grad.double() * (1 + multiplier.abs())

    sources = (grad_output, inputs[0].detach(), y.detach())
    compare(f"{name}: gradient", gradients[0], expected, sources, 4 * torch.finfo(y.dtype).eps)


def of_noise(scope: Scope, kinds: list[Drawn], goals: tuple[Goal, ...] = ()) -> list[Benchmark]:
    """Small calls, a typical and a large one, of each kind; `goals` are for the first kind's large
    forward in float32 on the CPU. A kind whose backward is no kernel has no check of it."""
    result = []
    for drawn in kinds:
        case = functools.partial(_case, scope, drawn)
        result += [case(FORWARD, dtype, _SMALL, host=True) for dtype in scope.of_small_calls]
        directions = [FORWARD]
        directions += [BACKWARD] if drawn.check_backward else []
        for dtype in scope.dtypes:
            for direction in directions:
                held = drawn is kinds[0] and direction == FORWARD and dtype == torch.float32
                held = held and scope.device.type == "cpu"
                shape = (_LARGE // dtype.itemsize,)
                result.append(case(direction, dtype, shape, goals=goals if held else ()))
            result.append(case(FORWARD, dtype, _TYPICAL))
    return result


def _case(
    scope: Scope,
    drawn: Drawn,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    host: bool = False,
    goals: tuple[Goal, ...] = (),
) -> Benchmark:
    return benchmark(*(drawn, direction, dtype, shape, "contiguous", scope), host=host, goals=goals)
