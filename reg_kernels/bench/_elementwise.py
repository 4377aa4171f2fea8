"""What the benchmarks of the random elementwise family share: inputs, contenders and their checks.

All elements of an input, a residual and a layer scale lie in [1, 2). So one that is 0 in a result
was dropped, as was one that is the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dropout import rate
from ._measure import BACKWARD, Benchmark, Contender, Scope, Skipped, WrongValues
from ._values import check_share, compare
from ._ways import Inputs, Makers, Way, calls, in_layout, ways

P = 0.1


class Drawn(NamedTuple):
    """An op of the family as its benchmarks call it, on (x,), (x, residual) or (x, residual,
    layer_scale)."""

    op: str
    makers: Makers
    as_one: int | None = None  # dimensions from this one on are kept or dropped together
    variant: str = ""
    residual: bool = False
    layer_scale: bool = False
    p: float = P
    # Of an op that does not keep or drop, what raises WrongValues by (name, inputs, y) and by
    # (name, inputs, y, grad_output, gradients).
    check_forward: Callable[..., None] | None = None
    check_backward: Callable[..., None] | None = None


def benchmark(
    drawn: Drawn,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    scope: Scope,
    *,
    transfers: float = 2,
    **facts: Any,
) -> Benchmark:
    """`transfers`: elements that are read or written, for each of the input."""
    size = math.prod(shape) * dtype.itemsize
    requires_grad = facts.get("requires_grad", True)

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        def values(shape: tuple[int, ...]) -> Tensor:
            x = torch.rand(shape, dtype=dtype, device=device).mul_(0.99).add_(1)
            return in_layout(x, layout) if len(shape) > 3 else x

        shapes = [shape] * (1 + drawn.residual)
        shapes += [(shape[1], *[1] * (len(shape) - 2))] if drawn.layer_scale else []
        arguments = [
            tuple(values(given).requires_grad_(requires_grad) for given in shapes)
            for _ in range(pool)
        ]
        grads = [values(shape) for _ in range(pool if direction == BACKWARD else 0)]
        inputs = Inputs(arguments, arguments, grads)
        options = (direction, device, dtype, size, scope.compiled)
        return [
            way if isinstance(way, Skipped) else _contender(way, drawn, direction, inputs)
            for way in ways(drawn.op, drawn.makers, *options)
        ]

    return Benchmark(
        op=drawn.op,
        variant=drawn.variant,
        direction=direction,
        dtype=dtype,
        shape=shape,
        bytes=round(transfers * size),
        prepare=prepare,
        layout=layout,
        **facts,
    )


def _contender(way: Way, drawn: Drawn, direction: str, inputs: Inputs) -> Contender:
    of = calls(way.function, inputs)
    scale = rate(drawn.p)[1] if way.ours else 1 / (1 - drawn.p)
    name = " ".join(filter(None, (drawn.op, drawn.variant))) + f", {way.name}"

    def factor(given: tuple[Tensor, ...]) -> float | Tensor:
        return given[2].detach().double() * scale if drawn.layer_scale else scale

    def forward(name: str, given: tuple[Tensor, ...], y: Tensor) -> None:
        check_forward(name, drawn.as_one, given[:2], y, factor(given), drawn.p)

    def backward(
        name: str,
        given: tuple[Tensor, ...],
        y: Tensor,
        grad_output: Tensor,
        gradients: tuple[Tensor, ...],
    ) -> None:
        check_backward(name, given[:2], y, grad_output, gradients[:2], factor(given))
        if drawn.layer_scale:
            check_sum(f"{name}: the layer scale's gradient", given, y, grad_output, gradients[2])

    def check() -> None:
        y = of.outputs()[0] if direction == BACKWARD else of.forward(0)
        (drawn.check_forward or forward)(name, inputs.arguments[0], y)
        if direction == BACKWARD:
            values = (inputs.arguments[0], y, inputs.grads[0], of.backward(0))
            (drawn.check_backward or backward)(name, *values)

    return Contender(way.name, of.of(direction), check, way.within, way.may_fail)


def _kept(y: Tensor, residual: Sequence[Tensor]) -> Tensor:
    return y != (residual[0] if residual else 0)


def check_forward(
    name: str,
    as_one: int | None,
    inputs: tuple[Tensor, ...],
    y: Tensor,
    scale: float | Tensor,
    p: float = P,
) -> None:
    """Raises WrongValues unless y is x with a share p of it dropped and the rest scaled, plus the
    residual: `inputs` are (x,) or (x, residual).

    The share has to be within 5 standard deviations; what is `as_one` has to be dropped as a whole.
    """
    x, *residual = (t.detach() for t in inputs)
    y = y.detach()
    dropped = ~_kept(y, residual)
    if as_one is not None:
        wholes = dropped.flatten(as_one)
        dropped = wholes.all(as_one)
        if not torch.equal(dropped, wholes.any(as_one)):
            raise WrongValues(f"{name}: what is dropped as a whole is dropped in part")
    check_share(name, int(dropped.sum()), dropped.numel(), p)
    _compare(f"{name}: output", y, x, _kept(y, residual), scale, *residual)


def check_backward(
    name: str,
    inputs: tuple[Tensor, ...],
    y: Tensor,
    grad_output: Tensor,
    gradients: tuple[Tensor, ...],
    scale: float | Tensor,
) -> None:
    """Raises WrongValues unless the gradient by x is grad_output with the mask that y shows, and
    that by a residual grad_output itself."""
    residual = [t.detach() for t in inputs[1:]]
    kept = _kept(y.detach(), residual)
    _compare(f"{name}: gradient", gradients[0], grad_output, kept, scale)
    if residual and not torch.equal(gradients[1], grad_output):
        raise WrongValues(f"{name}: the residual's gradient is not grad_output")


def check_sum(
    name: str, inputs: tuple[Tensor, ...], y: Tensor, grad_output: Tensor, gradient: Tensor
) -> None:
    """Raises WrongValues unless a layer scale's gradient is the sum of grad_output times what the
    residual and the layer scale have left of y."""
    _, residual, layer_scale = (t.detach().double() for t in inputs)
    terms = grad_output.double() * (y.detach().double() - residual) / layer_scale
    expected = terms.sum_to_size(layer_scale.shape)
    error = float(((gradient.double() - expected).abs() / expected.abs().clamp(min=1)).max())
    # What is taken off y is of its size, and all terms are positive.
    if not error <= 16 * torch.finfo(y.dtype).eps:
        raise WrongValues(f"{name} is off by {error:.2e}")


def _compare(
    name: str,
    actual: Tensor,
    source: Tensor,
    kept: Tensor,
    scale: float | Tensor,
    *residual: Tensor,
) -> None:
    """Raises unless actual = source * scale where it is kept and 0 elsewhere, plus the residual."""
    # Two roundings, PyTorch rounding the scale to the dtype before it multiplies; the sum's beside,
    # and the product's with a layer scale.
    roundings = 2 + bool(residual) + isinstance(scale, Tensor)
    allowed = torch.finfo(source.dtype).eps * (roundings / 2 + 0.01)

    def expected(source: Tensor, kept: Tensor, *residual: Tensor) -> Tensor:
        product = torch.where(kept, source.double() * scale, 0.0)
        return product + residual[0].double() if residual else product

    compare(name, actual, expected, (source, kept, *residual), allowed)
