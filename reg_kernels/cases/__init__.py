"""The inputs that an op is held to, once: for the tests and for `reg-kernels check`.

A module here bears its op's name and has `CASES`, a list of `Case`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of an op on one kind of input.

    Attributes:
        op: the registered op that is called.
        name: what is special about the input.
        inputs: (device, dtype) -> the tensors that it is called on, the same values every time.
        function: our op, as function(*inputs, backend=...) -> Tensor.
        oracle: the same formula in plain torch, without our kernels: in float64 it is the truth,
            in the case's own dtype it is the error that PyTorch makes.
        small: whether it is small enough for gradcheck and for Triton's interpreter.
        exact: whether the op and its oracle round alike in float64; sums in another order do not.
        differentiable: whether gradients by the inputs are asked for.
        draws: whether random draws and a product are all it does: then all implementations have
            the same bits.
        keeps: the bytes that its forward keeps for the backward, inputs included, where that is
            the op's promise.
        shard: for an op that knows the place of its input in a larger one, shard(rows, first,
            backend=...): its output of those rows of the input, of which `first` is the number.
        over: of an op in place, (*inputs, backend=...) -> the first input, which it writes over.
        fresh: of an op in place, the function that gives the same and writes over nothing.
        traced: whether the function can be called on tensors of shapes alone.
    """

    op: str
    name: str
    inputs: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]
    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    small: bool = True
    exact: bool = True
    differentiable: bool = True
    draws: bool = False
    keeps: int | None = None
    shard: Callable[..., Tensor] | None = None
    over: Callable[..., Tensor] | None = None
    fresh: Callable[..., Tensor] | None = None
    traced: bool = True

    def __str__(self) -> str:
        return f"{self.op}[{self.name}]"


def in_place(case: Case, over: Callable[..., Tensor]) -> Case:
    """The case of the op in place, `over`, on a copy of the first input that has its layout."""

    def function(x: Tensor, *others: Tensor, backend: str | None = None) -> Tensor:
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        return over(copy, *others, backend=backend)

    changes = {"function": function, "over": over, "fresh": case.function, "shard": None}
    return dataclasses.replace(case, op=f"{case.op}_", **changes)


def all_cases() -> list[Case]:
    """The cases of every op."""
    cases: list[Case] = []
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module: Any = importlib.import_module(f"{__name__}.{info.name}")
            cases += module.CASES
    return cases
