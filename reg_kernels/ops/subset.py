"""Residual branches of a subset of samples: schemas, checks, gradients, and what layers call.

Two ops, each the other's adjoint: one gathers samples, the other one adds to them. So a block is
one kernel each way at either end of its branch: its gradient is the output's, to which the
branch's is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import as_torch_returns, empty_samples, has_samples_outermost, with_strides
from ..reference import subset as reference
from ._checks import Entry, check_dtype, described
from ._modes import TRACE, below_autograd, watcher
from ._route import Linear, formula, wants_gradient


class Subset(NamedTuple):
    """The samples of a batch, each once."""

    kept: Tensor  # int64 (K,)
    dropped: Tensor  # int64 (N - K,)


# Entries


def _check_samples(entry: Entry, x: Tensor, count: int, name: str) -> None:
    entry.check_samples(x, name)
    if len(x) != count:
        entry.refuse(name, f"of {count} samples", x)


def _check_subset(entry: Entry, a: Any) -> int:
    """Returns the number of all samples."""
    for name in Subset._fields:
        rows = getattr(a, name)
        entry.check_vector(rows, torch.int64, rows.numel(), name)
    return int(a.kept.numel() + a.dropped.numel())


def _check(op: str, a: Any, in_place: bool) -> None:
    entry = Entry(op, a.input)
    _check_samples(entry, a.input, _check_subset(entry, a), "input")


def _check_add(op: str, a: Any, in_place: bool) -> None:
    entry, x, residual = Entry(op, a.input), a.input, a.residual
    samples = _check_subset(entry, a)
    _check_samples(entry, x, a.kept.numel(), "input")
    if residual is None:
        return
    _check_samples(entry, residual, samples, "residual")
    alike = x.dtype == residual.dtype and x.shape[1:] == residual.shape[1:]
    if x.numel() and residual.numel() and alike:
        strides = zip(x.shape[1:], x.stride()[1:], residual.stride()[1:], strict=True)
        alike = all(n == 1 or a == b for n, a, b in strides)
    if not alike:
        entry.refuse("input", f"of samples like {described(residual)}", x)


# Registration


def _scatter(overload: Any, grad_output: Tensor, like: Any, strides: Any, *arguments: Any) -> Any:
    return _ADD(_ADD.fresh.like(overload), with_strides(grad_output, strides), None, *arguments)


def _gather(overload: Any, grad_output: Tensor, like: Any, strides: Any, *arguments: Any) -> Any:
    return _SUBSET(_SUBSET.fresh.like(overload), with_strides(grad_output, strides), *arguments)


def _in_order(y: Tensor, like: Tensor) -> Tensor:
    """y, of samples like those of `like`, stored as those are."""
    return with_strides(y, empty_samples(like, len(y)).stride())


_ARGUMENTS = "Tensor kept, Tensor dropped, float scale"

_SUBSET = Linear(
    "subset",
    _ARGUMENTS,
    reference=lambda input, *a: _in_order(reference.subset(input, *a), input),
    triton="subset",
    check=_check,
    keeps=Subset._fields,
    fake=lambda input, kept, dropped, scale: empty_samples(input, kept.numel()),
    adjoint=_scatter,
    by_torch=formula(reference.subset),
    has_in_place=False,
)


_ADD = Linear(
    "subset_add",
    _ARGUMENTS,
    addends=("residual",),
    reference=lambda input, residual, *a: _in_order(
        reference.subset_add(input, residual, *a), input if residual is None else residual
    ),
    triton="subset",
    check=_check_add,
    keeps=Subset._fields,
    fake=lambda input, residual, kept, dropped, scale: empty_samples(
        input if residual is None else residual, kept.numel() + dropped.numel()
    ),
    adjoint=_gather,
    by_torch=formula(reference.subset_add),
)


class _Split(torch.autograd.Function):
    """A batch, and the samples of it that are kept: both gradients come to one place, which adds
    them in one pass."""

    @staticmethod
    def forward(ctx: Any, overload: Any, input: Tensor, *subset: Tensor) -> tuple[Tensor, Tensor]:
        with below_autograd():
            gathered = overload._op(input, *subset, 1.0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*subset)
        ctx.call = (overload, input.stride(), gathered.stride())
        return input, gathered

    @staticmethod
    def backward(ctx: Any, of_input: Tensor | None, of_gathered: Tensor | None) -> tuple[Any, ...]:
        overload, *strides = ctx.call
        if of_gathered is None:
            return None, of_input, None, None
        if of_input is not None:
            of_input = with_strides(of_input, strides[0])
        of_gathered = with_strides(of_gathered, strides[1])
        overload = _ADD.fresh.like(overload)
        return None, _ADD(overload, of_gathered, of_input, *ctx.saved_tensors, 1.0), None, None


# This `apply` saves two microseconds: it prepares nothing for torch.func.
_split = super(torch.autograd.Function, _Split).apply


def add_of_subset(
    input: Tensor,
    branch: Callable[[Tensor], Tensor],
    subset: Subset,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """input + scale branch(the samples of input that are kept) at those; input elsewhere.

    Args:
        input: a batch (N, ...); float64, float32, float16 or bfloat16.
        branch: a function of (K, ...), whose result has the same shape and dtype.
    """
    check_dtype("subset_add", "input", input.dtype)
    looks = watcher()
    # The trace of one layout has to bring any other into it.
    fits = looks is not TRACE and has_samples_outermost(input)
    x = input if fits else input.contiguous()
    gather, add = (op.fresh.overload(x.device, x.dtype, backend, looks) for op in (_SUBSET, _ADD))
    if looks is None and wants_gradient((x,)):
        shortcut, gathered = _split(gather, x, *subset)
    else:
        shortcut, gathered = x, _SUBSET.call(looks, gather, (x,), (*subset, 1.0))
    branched = branch(gathered)
    branched = with_strides(branched, gathered.stride()) if fits else branched.contiguous()
    y = _ADD.call(looks, add, (branched, shortcut), (*subset, scale))
    return y if fits or looks is TRACE else as_torch_returns(y, input)
