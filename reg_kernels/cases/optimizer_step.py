"""The optimizers' inputs: a list of parameters, and the gradients of a few steps.

What is compared is the parameters after the steps; their state shows in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import optim
from ..reference.optimizer_step import soft_threshold
from . import Case
from .dropout import _contiguous, _misaligned, _strided, _transposed

STEPS = 4
_EDGES = ((), (0,), (1,), (3, 5), (63,), (8, 8), (65,), (513,))
_LARGE = ((8191,), (90_001,), (3,), (128, 65))

Layout = Callable[[Tensor], Tensor]


def _inputs(shapes: tuple[tuple[int, ...], ...], layout: Layout) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(len(shapes))

        def values(shape: tuple[int, ...]) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return layout(x.to(dtype).to(device))

        # Parameters, then the gradients of each step.
        return tuple(values(shape) for _ in range(1 + STEPS) for shape in shapes)

    return make


def _run(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    tensors: tuple[Tensor, ...],
    after: Callable[[Tensor], Tensor] = lambda p: p,
) -> Tensor:
    """All parameters after the steps, one behind the other."""
    count = len(tensors) // (1 + STEPS)
    params = []
    for x in tensors[:count]:
        x = x.detach()
        # In the input's own strides, dense or not: as much memory as it spans.
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True) if n)
        memory = torch.zeros(max(span, 1), dtype=x.dtype, device=x.device)
        params.append(memory.as_strided(x.shape, x.stride()).copy_(x).requires_grad_())
    optimizer = make(params)
    for step in range(STEPS):
        grads = tensors[count * (step + 1) : count * (step + 2)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.detach()
        optimizer.step()
        with torch.no_grad():
            for p in params:
                p.copy_(after(p))
    return torch.cat([p.detach().reshape(-1) for p in params])


def _case(
    ours: type[torch.optim.Optimizer],
    theirs: type[torch.optim.Optimizer],
    shapes: tuple[tuple[int, ...], ...],
    layout: Layout = _contiguous,
    l1: float = 0.0,
    lr: float = 0.05,
    **options: Any,
) -> Case:
    small = sum(torch.Size(shape).numel() for shape in shapes) <= 2100
    words = [ours.__name__, "edges" if shapes is _EDGES else "large", layout.__name__[1:]]
    words += ["l1"] if l1 else []
    words += [f"{key}={value}" for key, value in options.items()]
    if theirs is not torch.optim.SGD:
        options["eps"] = 1e-3  # torch's loop computes in float16, where 1e-8 is 0

    def function(*tensors: Tensor, backend: str | None = None) -> Tensor:
        def make(params: list[Tensor]) -> torch.optim.Optimizer:
            return ours(params, lr=lr, l1=l1, backend=backend, **options)

        return _run(make, tensors)

    def oracle(*tensors: Tensor) -> Tensor:
        def make(params: list[Tensor]) -> torch.optim.Optimizer:
            return theirs(params, lr=lr, foreach=False, **options)

        return _run(make, tensors, lambda p: soft_threshold(p, lr * l1) if l1 else p)

    return Case(
        op="optimizer_step_",
        name=" ".join(words),
        inputs=_inputs(shapes, layout),
        function=function,
        oracle=oracle,
        small=small,
        exact=False,
        differentiable=False,
        traced=False,  # a plan is made of addresses
    )


_ADAMW = (optim.AdamW, torch.optim.AdamW)
_ADAM = (optim.Adam, torch.optim.Adam)
_SGD = (optim.SGD, torch.optim.SGD)

CASES = [
    _case(*_ADAMW, _EDGES),
    _case(*_ADAMW, _EDGES, _transposed),
    _case(*_ADAMW, _EDGES, _strided),
    _case(*_ADAMW, _EDGES, _misaligned, weight_decay=0.2),
    _case(*_ADAMW, _EDGES, amsgrad=True, maximize=True),
    _case(*_ADAMW, _EDGES, l1=0.3, weight_decay=0.1),
    _case(*_ADAMW, _EDGES, betas=(0.4, 0.7)),
    _case(*_ADAMW, _LARGE),
    _case(*_ADAMW, _LARGE, amsgrad=True, l1=0.1),
    _case(*_ADAM, _EDGES, weight_decay=0.1),
    _case(*_ADAM, _LARGE, amsgrad=True, weight_decay=0.1),
    _case(*_SGD, _EDGES),
    _case(*_SGD, _EDGES, _misaligned, momentum=0.9, weight_decay=0.1),
    _case(*_SGD, _EDGES, momentum=0.9, nesterov=True, maximize=True),
    _case(*_SGD, _EDGES, momentum=0.9, dampening=0.3, l1=0.2),
    _case(*_SGD, _LARGE, momentum=0.9, nesterov=True, weight_decay=0.1),
]
