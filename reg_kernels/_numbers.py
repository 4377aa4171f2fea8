"""Numbers that an argument may be, what a refused call says, and numbers that vary in a program
that is being compiled."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._dtypes import named


def refuse(
    op: str, argument: str, must: str, got: Any, kind: type[Exception] = RuntimeError
) -> NoReturn:
    """Raises what every refused call says: op, argument, what it must be, what it is."""
    if torch.compiler.is_compiling():  # which cannot put a number that varies into words
        raise kind(f"{op}: {argument} must be {must}")
    raise kind(f"{op}: {argument} must be {must}, got {got}")


def number(op: str, argument: str, value: Any, expected: str = "a number") -> float:
    """A real number as a float: Python's or numpy's, or a tensor of no dimensions and without a
    gradient, as torch takes it where a float is wanted. Who is in a hurry skips it for a float."""
    if type(value) is float or isinstance(value, torch.SymFloat | torch.SymInt):
        return value  # type: ignore[return-value]  # a compiled program's stand for numbers
    if isinstance(value, Tensor):
        real = value.dim() == 0 and not (value.requires_grad or value.is_complex())
    elif torch.compiler.is_compiling():  # which has numpy's scalars for arrays
        real = not isinstance(value, str)
    else:  # numpy's bool is no Real, as its other numbers are
        real = isinstance(value, Real) or type(value).__name__ in ("bool", "bool_")
    if not real:
        raise TypeError(f"{op}: {argument} must be {expected}, got {_shown(value)}")
    return float(value)


def integer(op: str, argument: str, value: Any) -> int:
    """An integer as an int: Python's or numpy's, or a tensor of one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{op}: {argument} must be an integer, got {_shown(value)}") from None


def probability(op: str, argument: str, value: Any, kind: type[Exception] = ValueError) -> float:
    """`value` as a float; raises unless it is a probability or a share. NaN is none."""
    if type(value) is not float:
        value = number(op, argument, value)
    if not 0.0 <= value <= 1.0:
        refuse(op, argument, "in [0, 1]", value, kind)
    return value


def check_shares(op: str, lam: Tensor) -> None:
    """Raises unless all are in [0, 1]; looks at the values, so waits for a GPU."""
    if not bool(((lam >= 0) & (lam <= 1)).all()):
        refuse(op, "lam", "in [0, 1]", lam.tolist(), ValueError)


# A float is a constant of a compiled program, and each new value a recompile; when a second value
# comes, torch.compile makes an input of the program of it, which a tensor can be made of.


def varies(*values: float | None) -> bool:
    """Whether one of them is an input of the program that is being compiled."""
    if not torch.compiler.is_compiling():
        return False
    is_constant = torch.fx.experimental.symbolic_shapes.has_static_value
    return not all(value is None or is_constant(value) for value in values)


def traced_numbers(device: torch.device, *values: float | None) -> Tensor:
    """Numbers of a program that is being compiled, as a float64 tensor that an op takes instead of
    floats; 0 for None."""
    # Times a tensor, a float that varies can stay one input of the program.
    one = torch.ones(1, dtype=torch.float64, device=device)
    return torch.cat([one * (0.0 if value is None else value) for value in values])


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    grad = " that requires grad" if value.requires_grad else ""
    return f"a Tensor of {named(value.dtype)} and shape {tuple(value.shape)}{grad}"
