"""Adversarial steps' inputs: each norm, normalised or not, at the edges of tiles, in every layout.

The truth is what papers write: a step, a projection by sorting, a clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from . import Case
from .dropout import _channels_last, _contiguous, _misaligned, _strided, _transposed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def _inputs(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], spread: float, options: Any
) -> Any:
    """adv, grad and clean: somewhere around the ball's surface, some elements in their bounds."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(len(shape))

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        clean = draw().mul(0.3).add(0.5).clamp(0, 1)
        if "std" in options:
            mean, std = (_per_channel(options.get(k, 0.0), clean) for k in ("mean", "std"))
            clean = (clean - mean) / std
        grad = draw()
        grad.view(-1)[::7] = 0.0
        values = (clean + spread * draw(), grad, clean)
        return tuple(layout(x.to(dtype).to(device)) for x in values)

    return make


def _per_channel(values: Any, x: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=x.dtype, device=x.device)
    return values.view(-1, *[1] * (x.dim() - 2)) if values.dim() else values


def _oracle(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Any,
    eps: Any,
    norm: str,
    lower: float,
    upper: float,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Tensor:
    """In the input's own dtype; in pixels, and back."""
    step_size, eps = (
        torch.as_tensor(v, dtype=torch.float64, device=adv.device)
        .to(adv.dtype)
        .view(-1, *[1] * (adv.dim() - 1))
        for v in (step_size, eps)
    )
    scale = _per_channel(std, adv)
    lower, upper = ((bound - _per_channel(mean, adv)) / scale for bound in (lower, upper))
    if norm == "linf":
        moved = adv + step_size / scale * grad.sgn()
        moved = torch.minimum(torch.maximum(moved, clean - eps / scale), clean + eps / scale)
        return torch.minimum(torch.maximum(moved, lower + 0 * adv), upper + 0 * adv)
    if adv.numel() == 0:
        return adv.clone()
    order = 1 if norm == "l1" else 2
    grad = grad / scale
    way = (adv - clean) * scale + step_size * grad / _norm(grad, order).clamp(min=1e-7)
    length = _norm(way, order)
    if norm == "l2":
        way = torch.where(length > eps, way * (eps / length), way)
    else:
        rows = way.abs().reshape(len(way), -1).sort(1, descending=True).values
        count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
        level = (rows.cumsum(1) - eps.view(-1, 1)) / count
        level = level.max(1).values.view(length.shape)
        way = torch.where(length > eps, way.sgn() * (way.abs() - level).clamp(min=0), way)
    moved = clean + way / scale
    return torch.minimum(torch.maximum(moved, lower + 0 * adv), upper + 0 * adv)


def _norm(x: Tensor, order: int) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), -1), order, 1).view(-1, *[1] * (x.dim() - 1))


# In units of what a sample's ball is made of: the radius of an element's share in each norm.
_UNITS = {"linf": lambda count: 1.0, "l1": float, "l2": lambda count: count**0.5}


def _case(
    norm: str,
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor] = _contiguous,
    each: bool = False,
    **options: Any,
) -> Case:
    """`each`: every sample has a step and a radius of its own, of which one is 0."""
    unit = _UNITS[norm](torch.Size(shape[1:]).numel())
    steps: Any = 0.02 * unit
    radii: Any = 0.06 * unit
    if each:
        steps = steps * torch.linspace(-1, 1, shape[0], dtype=torch.float64)
        radii = radii * torch.linspace(0, 2, shape[0], dtype=torch.float64)
    spread = 0.06 / (STD[0] if "std" in options else 1.0)
    words = [norm, "x".join(map(str, shape)), layout.__name__[1:], *options]
    words += ["each"] if each else []

    def function(adv: Tensor, grad: Tensor, clean: Tensor, backend: str | None = None) -> Tensor:
        # In adv's own strides, dense or not: as much memory as it spans.
        x = adv.detach()
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True) if n)
        copy = x.new_zeros(max(span, 1)).as_strided(x.shape, x.stride()).copy_(x)
        own = [v.to(x.device) if isinstance(v, Tensor) else v for v in (steps, radii)]
        return F.adversarial_step_(
            copy, grad.detach(), clean.detach(), *own, norm, 0.0, 1.0, **options, backend=backend
        )

    def oracle(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        return _oracle(adv, grad, clean, steps, radii, norm, 0.0, 1.0, **options)

    return Case(
        op="adversarial_step_",
        name=" ".join(words),
        inputs=_inputs(shape, layout, spread, options),
        function=function,
        oracle=oracle,
        small=torch.Size(shape).numel() <= 2100,
        exact=False,
        differentiable=False,
    )


_NORMALISED: dict[str, Any] = {"mean": MEAN, "std": STD}
CASES = [
    case
    for norm in ("linf", "l1", "l2")
    for case in (
        _case(norm, (3, 3, 5, 7)),
        _case(norm, (3, 3, 5, 7), _channels_last, each=True, **_NORMALISED),
        _case(norm, (2, 3, 9, 9), each=True, **_NORMALISED),
        _case(norm, (2, 3, 5, 3), _transposed, std=0.3),
        _case(norm, (3, 5), _strided),
        _case(norm, (2, 513), _misaligned, each=True),
        _case(norm, (8,)),
        _case(norm, (3, 0)),
        _case(norm, (2, 3, 60, 77), **_NORMALISED),
        _case(norm, (3, 20_001), each=True),
    )
]
