"""Whether a tensor may be written over."""

from __future__ import annotations

import torch
from torch import Tensor


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
