"""L1 and L2 penalties over lists of tensors: schema, fake, gradient, the public functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._dtensor import ShardSums, check_sharded, is_dtensor, shard_sums
from .._dtypes import DTYPES, named
from .._tensor_table import TensorTable, dtype_number
from ..reference import penalty as reference
from ._checks import Entry, check_dtype, check_tensor, refuse
from ._modes import below_autograd, is_batched, watcher
from ._registry import register
from ._route import Route, formula
from ._table import TablePart, tables

# The sum of the table's first row into number `slot` of `sums`; of |x| for power 1, x^2 for 2.
_SUM = TablePart(
    "penalty",
    "penalty_table",
    "int dtype, int power, Tensor(a!) sums, int slot, Tensor(b!) scratch",
)
_GRADIENT = TablePart(
    "penalty", "penalty_backward_table", "int dtype, int power, Tensor grad_output"
)


def sum_into(
    table: TensorTable,
    tensors: list[Tensor],
    power: int,
    sums: Tensor,
    slot: int,
    backend: str,
) -> None:
    """sums[slot] = the sum of |x|^power over `tensors`, of one device and dtype, which are the
    first row of `table`; float64, no synchronisation."""
    if backend == "reference":
        sums[slot] = _PENALTY.overloads[backend](tensors, power)
        return
    kind = dtype_number(tensors[0].dtype)
    _SUM.function(backend)(*table.head, kind, power, sums, slot, table.scratch)


def _result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def _check(op: str, tensors: list[Tensor], power: int, grad_output: Tensor | None = None) -> None:
    """Raises RuntimeError where a kernel would read past what is there."""
    if not tensors:
        raise RuntimeError(f"{op}: tensors must be at least one, got none")
    if power not in (1, 2):
        Entry(op, tensors[0]).refuse("power", "1 or 2", power)
    for i, x in enumerate(tensors):
        call, name = Entry(op, x), f"tensors[{i}]"
        call.check_floats(x, name)
        call.check_memory(x, name)
    if grad_output is not None:
        if grad_output.numel() != 1:
            Entry(op, grad_output).refuse("grad_output", "one number", grad_output)
        Entry(op, grad_output).check_memory(grad_output, "grad_output")


def _forward(backend: str) -> Any:
    def run(tensors: list[Tensor], power: int) -> Tensor:
        _check("penalty", tensors, power)
        if backend == "reference":
            return reference.penalty(tensors, power)
        device = tensors[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for table, dense in tables(tensors):
            sums = torch.empty(1, dtype=torch.float64, device=dense[0].device)
            sum_into(table, dense, power, sums, 0, backend)
            total += sums[0].to(device)
        return total.to(_result_dtype(tensors))

    return run


def _backward(backend: str) -> Any:
    def run(tensors: list[Tensor], grad_output: Tensor, power: int) -> list[Tensor]:
        _check("penalty_backward", tensors, power, grad_output)
        if backend == "reference":
            return reference.penalty_backward(tensors, grad_output, power)
        grads = [torch.empty_like(x) for x in tensors]
        for table, dense in tables(tensors, grads):
            incoming = grad_output.to(dense[0].device, torch.float64).reshape(1)
            kind = dtype_number(dense[0].dtype)
            _GRADIENT.function(backend)(*table.head, kind, power, incoming)
        return grads

    return run


class _Penalty(torch.autograd.Function):
    """The sum over all tensors."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        route, overload, rest = call
        ctx.save_for_backward(*tensors)
        ctx.call = (overload, route.backward, *rest)
        with below_autograd():
            return overload(list(tensors), *rest)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        overload, backward, power = ctx.call
        inputs = (list(ctx.saved_tensors), grad_output)
        if is_batched(grad_output):  # for which a list has no rule
            return None, *reference.penalty_backward(*inputs, power)
        return None, *backward.run_like(overload, inputs, (power,))


def _fake(tensors: list[Tensor], power: int) -> Tensor:
    return tensors[0].new_empty((), dtype=_result_dtype(tensors))


def _fake_backward(tensors: list[Tensor], grad_output: Tensor, power: int) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


_BACKWARD = register(
    "penalty_backward",
    "(Tensor[] tensors, Tensor grad_output, int power) -> Tensor[]",
    fake=_fake_backward,
    route=Route(2, by_torch=formula(reference.penalty_backward), lists=True),
    **{backend: _backward(backend) for backend in backends.NAMES},
)
_PENALTY = register(
    "penalty",
    "(Tensor[] tensors, int power) -> Tensor",
    fake=_fake,
    route=Route(
        inputs=1,
        graph=_Penalty,
        by_torch=formula(reference.penalty),
        backward=_BACKWARD,
        lists=True,
    ),
    **{backend: _forward(backend) for backend in backends.NAMES},
)


def _penalty(name: str, params: Any, power: int, backend: str | None) -> Tensor:
    if not isinstance(params, Iterable):
        check_tensor(name, "params", params, "tensors")
    tensors = [params] if isinstance(params, Tensor) else list(params)
    if not tensors:
        raise ValueError(f"{name}: params must hold at least one tensor, got none")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            refuse(name, "params", "tensors", f"{type(x).__name__} at {i}", TypeError)
        if x.layout != torch.strided:
            refuse(name, "params", "dense tensors", f"{named(x.layout)} at {i}")
        if x.dtype not in DTYPES:
            check_dtype(name, "params", x.dtype, where=f" at {i}")
    if any(map(is_dtensor, tensors)):
        return _penalty_of_shards(name, tensors, power, backend)
    return _penalty_of(name, tensors, power, backend)


def _penalty_of(name: str, tensors: list[Tensor], power: int, backend: str | None) -> Tensor:
    # One implementation for all: where they lie on several devices, one that runs on each.
    names = {backends.choose(name, x.device.type, x.dtype, backend) for x in tensors}
    chosen = names.pop() if len(names) == 1 else "reference"
    return _PENALTY.route.call(watcher(), _PENALTY.overloads[chosen], (tensors,), (power,))


class _SumOverRanks(torch.autograd.Function):
    """The sums of all ranks' shards. What a shard adds to them, it adds on every rank: the gradient
    comes back as it is, with nothing to be sent."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sums: ShardSums) -> Tensor:
        return sums(own).clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


def _penalty_of_shards(name: str, tensors: list[Any], power: int, backend: str | None) -> Tensor:
    sums = shard_sums(tensors)
    assert sums is not None
    plain: list[Tensor] = []
    columns: list[list[Tensor]] = [[] for _ in range(len(sums))]
    for i, x in enumerate(tensors):
        if is_dtensor(x):
            check_sharded(name, f"params[{i}]", x)
            columns[sums.column(x)].append(x.to_local())
        else:
            plain.append(x)
    parts = [_penalty_of(name, of, power, backend).to(sums.device) for of in columns]
    total = _SumOverRanks.apply(torch.stack(parts).double(), sums).sum()
    if plain:
        total = total + _penalty_of(name, plain, power, backend).to(total.device)
    first = tensors[0].device
    return total.to(first, _result_dtype(tensors))


def l1_penalty(params: Tensor | Iterable[Tensor], *, backend: str | None = None) -> Tensor:
    r"""Sums the absolute values of all tensors in one launch, :math:`\sum_i \sum_j |p_{ij}|`.

    Add `weight * l1_penalty(params)` to a loss for lasso regularisation. The optimizers' `l1=`
    needs no gradient and makes weights exactly zero, which a penalty does not.

    Args:
        params: a tensor or an iterable of tensors, of any shapes, layouts and devices; float64,
            float32, float16 or bfloat16, mixed at will. Of DTensors every rank gets the sum over
            the whole tensors, by one all_reduce, and a gradient that is placed as they are.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        A tensor of no dimensions on the first tensor's device, float64 if one of them is and else
        float32. Its gradient is sign(p), and 0 at 0.

    Raises:
        ValueError: there is no tensor at all, or `backend` is unknown.
        TypeError: an entry is no tensor.
        RuntimeError: a tensor has another dtype or is sparse, a DTensor is placed as Partial or on
            other ranks, or `backend` cannot run here.

    The sum is taken in float64, in an order that depends on sizes alone: two runs give the same
    bits.

    Source: R. Tibshirani, "Regression shrinkage and selection via the lasso", 1996.
    """
    return _penalty("l1_penalty", params, 1, backend)


def l2_penalty(params: Tensor | Iterable[Tensor], *, backend: str | None = None) -> Tensor:
    r"""Sums the squares of all tensors in one launch, :math:`\sum_i \sum_j p_{ij}^2`.

    Adding `0.5 * weight_decay * l2_penalty(params)` to a loss does what `decay="l2"` does in an
    optimizer.

    Args:
        params: a tensor or an iterable of tensors, of any shapes, layouts and devices; float64,
            float32, float16 or bfloat16, mixed at will. Of DTensors every rank gets the sum over
            the whole tensors, by one all_reduce, and a gradient that is placed as they are.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        A tensor of no dimensions on the first tensor's device, float64 if one of them is and else
        float32. Its gradient is 2 p.

    Raises:
        ValueError: there is no tensor at all, or `backend` is unknown.
        TypeError: an entry is no tensor.
        RuntimeError: a tensor has another dtype or is sparse, a DTensor is placed as Partial or on
            other ranks, or `backend` cannot run here.

    The sum is taken in float64, in an order that depends on sizes alone: two runs give the same
    bits.

    Source: A. Hoerl, R. Kennard, "Ridge regression", Technometrics 12 (1970).
    """
    return _penalty("l2_penalty", params, 2, backend)
