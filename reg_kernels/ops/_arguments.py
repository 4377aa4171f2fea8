"""Numbers and checks of arguments that several ops have, and the layout that their kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _layout
from .._layout import is_channels_last as has_channels_last
from .._numbers import number
from ._modes import is_recorded, unrecorded


def probability(name: str, argument: str, value: Any) -> float:
    """`value` as a float; raises unless it is a probability. NaN is none."""
    if type(value) is not float:
        value = number(name, argument, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: {argument} must be in [0, 1], got {value}")
    return value


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
