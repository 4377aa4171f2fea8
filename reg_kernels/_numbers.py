"""Numbers that an argument may be, and those that vary in a program that is being compiled."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor


def number(op: str, argument: str, value: Any) -> float:
    """A real number as a float: Python's or numpy's, or a tensor of no dimensions, as torch takes
    it where a float is wanted."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        real = value.dim() == 0 and not (value.requires_grad or value.is_complex())
    else:
        real = isinstance(value, numbers.Real)
    if not real:
        raise TypeError(f"{op}: {argument} must be a number, got {_shown(value)}")
    return float(value)


def integer(op: str, argument: str, value: Any) -> int:
    """An integer as an int: Python's or numpy's, or a tensor of one."""
    if type(value) is int:
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {argument} must be an integer, got {_shown(value)}") from None


def varies(value: float) -> bool:
    """Whether it is an input of the program that is being compiled."""
    if not torch.compiler.is_compiling():
        return False
    return not torch.fx.experimental.symbolic_shapes.has_static_value(value)


def traced_numbers(device: torch.device, *values: float) -> Tensor:
    """Numbers of a program that is being compiled, as a float64 tensor that an op takes instead of
    floats: a float would be a constant of the program, and each new value a recompile."""
    # Times a tensor, a float that varies can stay one input of the program.
    one = torch.ones(1, dtype=torch.float64, device=device)
    return torch.cat([one * value for value in values])


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    grad = ", which requires grad" if value.requires_grad else ""
    return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}{grad}"
