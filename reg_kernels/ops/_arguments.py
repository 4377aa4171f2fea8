"""Checks of arguments that several ops have, and the layout that their kernels take."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from .._layout import is_channels_last as has_channels_last


def named(dtype: torch.dtype) -> str:
    """A dtype as messages name it."""
    return str(dtype).removeprefix("torch.")


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
    return f"a {named(value.dtype)} tensor of shape {tuple(value.shape)}{grad}"


def check_device(name: str, argument: str, x: Tensor, input: Tensor) -> None:
    """Raises unless x is where the input is."""
    if x.device != input.device:
        raise RuntimeError(
            f"{name}: {argument} must be on the input's device, {input.device}, got {x.device}"
        )


def is_channels_last(x: Tensor) -> bool:
    """Whether a batch of any number of dimensions has its channels innermost."""
    return x.dim() > 2 and has_channels_last(x)


def in_order(x: Tensor) -> Tensor:
    """x, (N, C, ...), as kernels take it: contiguous, or dense with the channels last."""
    if x.is_contiguous() or is_channels_last(x):
        return x.resolve_neg()
    return x.contiguous().resolve_neg()


def check_in_place(name: str, input: Tensor) -> None:
    """What autograd would raise as well, but only after the input had been overwritten."""
    if torch.compiler.is_compiling():  # its tracing checks before anything runs
        return
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: an inference tensor cannot be changed in place outside of inference mode: "
            "use inplace=False, or clone it"
        )
    if not torch.is_grad_enabled() or not input.requires_grad:
        return
    base = input._base if input._is_view() else None
    if input.is_leaf or (base is not None and base.is_leaf):
        raise RuntimeError(
            f"{name}: a leaf tensor that requires grad, or a view of one, cannot be changed in "
            "place: use inplace=False, or torch.no_grad()"
        )
    metadata = torch._C._autograd
    if base is not None and (metadata._get_creation_meta(input) != metadata.CreationMeta.DEFAULT):
        raise RuntimeError(
            f"{name}: a view made by a function of several outputs, or without grad, cannot be "
            "changed in place: use inplace=False"
        )
