"""Checks of arguments that several ops have, and the layout that their kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import is_channels_last as has_channels_last


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
