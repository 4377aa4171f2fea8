"""The penalties' inputs: lists of tensors at the edges of lanes and chunks, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from . import Case
from .dropout import _contiguous, _misaligned, _strided, _transposed

_EDGES = ((), (0,), (1,), (3, 5), (31,), (8, 4), (33,), (513,))
_SMALL = ((2, 3), (5,), ())
_LARGE = ((8191,), (8192,), (8193,), (90_001,), (3,))


def _inputs(shapes: tuple[tuple[int, ...], ...], layout: Callable[[Tensor], Tensor]) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(len(shapes))
        return tuple(
            layout(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device))
            for s in shapes
        )

    return make


def _case(
    power: int,
    shapes: tuple[tuple[int, ...], ...],
    layout: Callable[[Tensor], Tensor] = _contiguous,
    gradient: bool = False,
) -> Case:
    """`gradient`: what is called is the gradient by the first tensor."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    ours = F.l1_penalty if power == 1 else F.l2_penalty

    def function(*tensors: Tensor, backend: str | None = None) -> Tensor:
        return ours(tensors, backend=backend)

    def oracle(*tensors: Tensor) -> Tensor:
        return sum((x.abs() if power == 1 else x * x).sum() for x in tensors)

    def of(penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor, **options: Any) -> Tensor:
            leaves = [x.detach().requires_grad_() for x in tensors]
            return torch.autograd.grad(penalty(*leaves, **options), leaves[0])[0]

        return call

    return Case(
        op="penalty_backward" if gradient else "penalty",
        name=f"l{power} {len(shapes)} tensors of {numel} {layout.__name__[1:]}",
        inputs=_inputs(shapes, layout),
        function=of(function) if gradient else function,
        oracle=of(oracle) if gradient else oracle,
        small=numel <= 2100,
        exact=False,
        differentiable=not gradient,
    )


CASES = [
    _case(power, shapes, layout)
    for power in (1, 2)
    for shapes, layout in (
        (_EDGES, _contiguous),
        (_SMALL, _contiguous),
        (_EDGES, _transposed),
        (_EDGES, _strided),
        (_EDGES, _misaligned),
        (_LARGE, _contiguous),
    )
]
CASES += [
    _case(power, shapes, gradient=True)
    for power in (1, 2)
    for shapes in (((3, 5),), ((513,), (0,)), _LARGE)
]
