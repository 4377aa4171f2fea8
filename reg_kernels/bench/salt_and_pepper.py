"""Benchmarks of impulse noise."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as fused
from ._elementwise import Drawn, P
from ._measure import Benchmark, Scope, WrongValues
from ._noise import of_noise
from ._values import check_share
from ._ways import Makers

_LOW, _HIGH = 0.0, 3.0  # outside of the inputs


def _eager(x: Tensor) -> Tensor:
    drawn = torch.rand_like(x, dtype=torch.float32)  # bfloat16 has too few values below P
    return torch.where(drawn < P, torch.where(drawn < P / 2, _HIGH, _LOW), x)


def _check(name: str, inputs: tuple[Tensor, ...], y: Tensor) -> None:
    for value in (_LOW, _HIGH):
        check_share(name, int((y == value).sum()), y.numel(), P / 2)
    if not bool(((y == inputs[0]) | (y == _LOW) | (y == _HIGH)).all()):
        raise WrongValues(f"{name}: an element is neither x nor one of the two values")


def _check_gradient(
    name: str,
    inputs: tuple[Tensor, ...],
    y: Tensor,
    grad_output: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    if not torch.equal(gradients[0], torch.where(y.detach() == inputs[0], grad_output, 0)):
        raise WrongValues(
            f"{name}: the gradient is not grad_output where x was kept and 0 elsewhere"
        )


REPLACED = Drawn(
    "salt_and_pepper",
    Makers(
        lambda: _eager,
        lambda backend: (
            lambda x: fused.salt_and_pepper(x, P, low=_LOW, high=_HIGH, backend=backend)
        ),
    ),
    check_forward=_check,
    check_backward=_check_gradient,
)


def cases(scope: Scope) -> list[Benchmark]:
    return of_noise(scope, [REPLACED])
