"""The inputs that an op is held to, once: for the tests and for `reg-kernels check`.

A module here bears its op's name and has `CASES`, a list of `Case`.
"""

from __future__ import annotations

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
    """

    op: str
    name: str
    inputs: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]
    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    small: bool = True
    exact: bool = True
    differentiable: bool = True

    def __str__(self) -> str:
        return f"{self.op}[{self.name}]"


def all_cases() -> list[Case]:
    """The cases of every op."""
    cases: list[Case] = []
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module: Any = importlib.import_module(f"{__name__}.{info.name}")
            cases += module.CASES
    return cases
