"""What a parameter, its gradient and its state have to be before a step takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import named
from ._algorithm import STATE, Algorithm


def is_memoryless(value: Tensor) -> bool:
    """Whether there is nothing where the elements of `value` should be: a storage that was freed,
    or zeros that torch's autograd knows of without storing them."""
    return value.data_ptr() == 0 and value.numel() > 0


def check_nonnegative(name: str, option: str, value: Any) -> None:
    """Raises unless value >= 0; NaN is not."""
    if not value >= 0:
        raise ValueError(f"{name}: {option} must be at least 0, got {value}")


def check_size(name: str, what: str, param: Tensor, value: Tensor) -> None:
    """Raises unless `what` there is of a parameter has its shape."""
    if value.shape != param.shape:
        raise ValueError(
            f"{name}: {what} must have shape {tuple(param.shape)}, got {tuple(value.shape)}"
        )


def check_gradient(name: str, where: str, param: Tensor, grad: Tensor) -> None:
    """Raises unless a step can take a gradient."""
    if grad.layout != torch.strided:
        layout = named(grad.layout)
        raise RuntimeError(
            f"{name}: gradients must be dense, got {layout} for {where}: sparse gradients are for "
            "torch.optim.SparseAdam"
        )
    if grad.device != param.device or grad.shape != param.shape or not grad.is_floating_point():
        raise RuntimeError(
            f"{name}: a gradient must have its parameter's shape and device, got "
            f"{tuple(grad.shape)} on {grad.device} for {where}, {tuple(param.shape)} on "
            f"{param.device}"
        )
    if is_memoryless(grad) and not grad._is_zerotensor():
        raise RuntimeError(f"{name}: a gradient must have memory of its own, got none for {where}")


def check_param(algorithm: Algorithm, where: str, param: Tensor, state: dict[str, Any]) -> None:
    """Raises unless a step can take a parameter and the state that there is of it."""
    name = algorithm.optimizer
    if is_memoryless(param):
        raise RuntimeError(f"{name}: a parameter must have memory of its own, got none for {where}")
    if torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            f"{name}: a parameter's elements must lie apart, got strides {param.stride()} of shape "
            f"{tuple(param.shape)} for {where}"
        )
    for key in STATE:
        value = state.get(key)
        if not isinstance(value, Tensor):
            continue
        check_size(name, f"{key} of {where}", param, value)
        if is_memoryless(value) and not value._is_zerotensor():
            raise RuntimeError(f"{name}: {key} of {where} must have memory of its own, got none")
    algorithm.check_complete(where, state)
