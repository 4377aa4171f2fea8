"""Numbers and checks of arguments that several ops have, and the layout that their kernels take."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import _layout
from .._layout import is_channels_last as has_channels_last
from ._registry import is_recorded, unrecorded


def as_float(name: str, argument: str, value: Any, expected: str = "a float") -> float:
    """`value` as torch's own operators take it for a float: a number of Python's or numpy's, or a
    tensor of no dimensions and without a gradient. A caller in a hurry skips it for a float."""
    if isinstance(value, float | torch.SymFloat | torch.SymInt):
        return value
    if isinstance(value, Tensor):
        number = value.dim() == 0 and not value.requires_grad and not value.is_complex()
    elif torch.compiler.is_compiling():  # which has numpy's scalars for arrays
        number = not isinstance(value, str)
    else:  # numpy's bool is no Real, as its other numbers are
        number = isinstance(value, Real) or type(value).__name__ in ("bool", "bool_")
    if not number:
        raise TypeError(f"{name}: {argument} must be {expected}, got {_kind(value)}")
    return float(value)


def as_int(name: str, argument: str, value: Any) -> int:
    """The same for an int."""
    if isinstance(value, int | torch.SymInt):
        return value
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name}: {argument} must be an int, got {_kind(value)}") from None


def probability(name: str, argument: str, value: Any) -> float:
    """`value` as a float; raises unless it is a probability. NaN is none."""
    if type(value) is not float:
        value = as_float(name, argument, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: {argument} must be in [0, 1], got {value}")
    return value


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    gradient = " that requires grad" if value.requires_grad else ""
    return f"a Tensor of {named(value.dtype)} and shape {tuple(value.shape)}{gradient}"


def named(dtype: torch.dtype) -> str:
    """A dtype as messages name it."""
    return str(dtype).removeprefix("torch.")


def check_device(name: str, argument: str, x: Tensor, input: Tensor) -> None:
    """Raises unless x is where the input is."""
    if x.device != input.device:
        raise RuntimeError(
            f"{name}: {argument} must be on the input's device, {input.device}, got {x.device}"
        )


def is_channels_last(x: Tensor) -> bool:
    """Whether a batch of any number of dimensions has its channels innermost."""
    return x.dim() > 2 and has_channels_last(x)


def keeps_channels_last(x: Tensor) -> bool:
    """The same of what an op returns for it."""
    return x.dim() > 2 and _layout.keeps_channels_last(x)


def in_order(x: Tensor) -> Tensor:
    """x, (N, C, ...), as kernels take it: contiguous, or dense with the channels last."""
    if is_recorded():  # what is traced for one order has to bring any other into it
        with unrecorded():
            channels_last = keeps_channels_last(x)
        return _layout.ordered(x, channels_last).resolve_neg()
    if not x.is_contiguous():
        x = _layout.ordered(x, keeps_channels_last(x))
    return x.resolve_neg()


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
