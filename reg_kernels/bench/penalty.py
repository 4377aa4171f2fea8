"""Benchmarks of the L1 and L2 penalties over a list of tensors.

Bytes an element, s = sizeof(dtype): forward reads it, s; backward reads it again and writes its
gradient, 2 s. On the CPU `Tensor.copy_` moves three transfers for two that are counted, so that the
floor is 2/3 of its time where gradients are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import functional as fused
from ._measure import BOTH, FORWARD, Benchmark, Contender, Scope, Skipped
from ._values import compare, parts
from ._ways import Inputs, Makers, Way, calls, ways

_TENSORS = 16
# Elements of each tensor: more than caches hold, a typical number, and so few that the time of a
# call is the host's.
_NUMEL, _NUMEL_GPU = 2**20, 6_250_000
_TYPICAL, _SMALL = 2**16, 64


def cases(scope: Scope) -> list[Benchmark]:
    """Either penalty of large parameters, forward and with its gradient; then of smaller ones."""
    large = _NUMEL_GPU if scope.device.type == "cuda" else _NUMEL
    return [
        _case(scope, power, dtype, direction, numel, host=numel == _SMALL)
        for numel, dtypes, directions in (
            (large, scope.brief, (FORWARD, BOTH)),
            (_TYPICAL, scope.dtypes, (FORWARD, BOTH) if scope.everything else (BOTH,)),
            (_SMALL, scope.of_small_calls, (FORWARD, BOTH) if scope.everything else (BOTH,)),
        )
        for dtype in dtypes
        for power in (1, 2)
        for direction in directions
    ]


def _case(
    scope: Scope,
    power: int,
    dtype: torch.dtype,
    direction: str,
    numel: int,
    *,
    host: bool = False,
) -> Benchmark:
    size = _TENSORS * numel * dtype.itemsize

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        options = {"dtype": dtype, "device": device}
        arguments = [
            tuple(torch.randn(numel, **options).requires_grad_() for _ in range(_TENSORS))
            for _ in range(pool)
        ]
        result = torch.promote_types(dtype, torch.float32)
        grads = [torch.full((), 0.5, dtype=result, device=device) for _ in range(pool)]
        inputs = Inputs(arguments, arguments, grads)
        found = ways(
            "penalty",
            _functions(power),
            direction=direction,
            device=device,
            dtype=dtype,
            size=size,
            compiled=scope.compiled,
        )
        return [
            way if isinstance(way, Skipped) else _contender(way, power, direction, inputs)
            for way in found
        ]

    return Benchmark(
        op="penalty",
        variant=f"l{power}",
        direction=direction,
        dtype=dtype,
        shape=(_TENSORS * numel,),
        tensors=_TENSORS,
        bytes=size if direction == FORWARD else 3 * size,
        prepare=prepare,
        host=host,
    )


def _functions(power: int) -> Makers:
    """Functions of a list's tensors. Eager's is as one writes it: it sums 16 bits in float32."""

    def eager(*tensors: Tensor) -> Tensor:
        result = torch.promote_types(tensors[0].dtype, torch.float32)
        return sum((x.abs() if power == 1 else x.square()).sum(dtype=result) for x in tensors)

    def ours(backend: str | None) -> Callable[..., Tensor]:
        penalty = fused.l1_penalty if power == 1 else fused.l2_penalty
        return lambda *tensors: penalty(tensors, backend=backend)

    return Makers(lambda: eager, ours)


def _contender(way: Way, power: int, direction: str, inputs: Inputs) -> Contender:
    of = calls(way.function, inputs)
    tensors, grad = inputs.arguments[0], inputs.grads[0]

    def check() -> None:
        y, *gradients = of.both(0) if direction == BOTH else (of.forward(0),)
        check_values(f"l{power}_penalty, {way.name}", power, tensors, y, gradients, grad, way.ours)

    return Contender(way.name, of.of(direction), check, way.within, way.may_fail)


def check_values(
    name: str,
    power: int,
    tensors: Sequence[Tensor],
    y: Tensor,
    gradients: Sequence[Tensor],
    grad: Tensor,
    ours: bool,
) -> None:
    """Raises WrongValues unless y is the penalty and `gradients`, if there are any, are right.

    Ours sums in float64. Eager sums in float32, and rounds 16-bit values before.
    """
    dtype = tensors[0].dtype
    eps = torch.finfo(dtype).eps
    total = torch.stack(list(_sums(tensors, power))).sum().reshape(1)
    rounding = torch.finfo(y.dtype).eps
    allowed = 2 * rounding if ours else max(1024 * rounding, eps)
    compare(f"{name}: sum", y.detach().reshape(1), lambda total: total, (total,), allowed)

    def slope(x: Tensor) -> Tensor:
        x = x.double()
        return (x.sgn() if power == 1 else 2 * x) * float(grad)

    for i, (x, gradient) in enumerate(zip(tensors, gradients, strict=bool(gradients))):
        compare(f"{name}: gradient of tensor {i}", gradient, slope, (x,), 2 * eps)


def _sums(tensors: Sequence[Tensor], power: int) -> Iterator[Tensor]:
    """Sums of |x|^power in float64 over parts of the tensors."""
    for x in tensors:
        for (part,) in parts(x.detach()):
            yield part.double().abs().pow(power).sum()
