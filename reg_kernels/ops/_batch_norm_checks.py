"""What a BatchNorm call has to be given: torch's error types, before anything is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._activation import NUMBERS
from ..backends import DTYPES


def values_a_channel(x: Tensor) -> int:
    """M, values a channel."""
    return x.shape[0] * math.prod(x.shape[2:])


def check_eps(name: str, eps: float, training: bool) -> None:
    """Raises where torch does: on an eps that could divide by zero."""
    if training and eps <= 0.0:
        raise ValueError(f"{name}: eps must be positive in training, got {eps}")
    if eps < 0.0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")


def activation_number(name: str, activation: str | None) -> int:
    """The number that stands for an activation's name; raises ValueError for an unknown one."""
    try:
        return NUMBERS[activation]
    except (KeyError, TypeError):
        known = ", ".join(repr(known) for known in NUMBERS)
        raise ValueError(f"{name}: activation must be one of {known}, got {activation!r}") from None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_channel_values(
    name: str,
    what: str,
    values: Tensor | None,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """weight, bias or a running statistic: [C], on the input's device, of a dtype that fits."""
    if values is None:
        return
    if values.shape != shape:
        raise RuntimeError(
            f"{name}: {what} must have shape ({shape[0]},), one value a channel, "
            f"got {tuple(values.shape)}"
        )
    if values.device != device:
        raise RuntimeError(
            f"{name}: {what} must be on the input's device {device}, got {values.device}"
        )
    if values.dtype != dtype and not (values.dtype == torch.float32 and dtype.itemsize == 2):
        allowed = f"{_dtype_name(dtype)} or float32" if dtype.itemsize == 2 else _dtype_name(dtype)
        raise RuntimeError(
            f"{name}: {what} must be {allowed} for an input of {_dtype_name(dtype)}, "
            f"got {_dtype_name(values.dtype)}"
        )


def check_call(
    name: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> None:
    """What every call has to be given. Nothing is written before all of it holds."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a Tensor, got {type(input).__name__}")
    if input.dim() < 2:
        raise IndexError(
            f"{name}: input must have at least 2 dimensions, (N, C, ...), got {input.dim()}"
        )
    if input.dtype not in DTYPES:
        supported = ", ".join(_dtype_name(d) for d in DTYPES)
        raise NotImplementedError(
            f"{name}: input must be one of {supported}, got {_dtype_name(input.dtype)}"
        )
    check_eps(name, eps, training)
    if training and input.numel() == input.shape[1] and values_a_channel(input) == 1:
        raise ValueError(
            f"{name}: expected more than 1 value per channel when training, "
            f"got input size {tuple(input.shape)}"
        )
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(f"{name}: running_mean and running_var must be given for evaluation")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must be given together or not")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise TypeError(
            f"{name}: momentum must be a float, or None together with num_batches_tracked"
        )
    like = (input.shape[1:2], input.device, input.dtype)
    _check_channel_values(name, "running_mean", running_mean, *like)
    _check_channel_values(name, "running_var", running_var, *like)
    for statistic, what in ((running_mean, "running_mean"), (running_var, "running_var")):
        if statistic is not None and statistic.requires_grad:
            raise RuntimeError(f"{name}: {what} must not require grad, it has no gradient")
    _check_channel_values(name, "weight", weight, *like)
    _check_channel_values(name, "bias", bias, *like)
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"{name}: residual must be a Tensor or None, got {type(residual).__name__}")
    if residual is not None and (
        residual.shape != input.shape
        or residual.dtype != input.dtype
        or residual.device != input.device
    ):
        raise RuntimeError(
            f"{name}: residual must be like the input, {_dtype_name(input.dtype)} of shape "
            f"{tuple(input.shape)} on {input.device}, got {_dtype_name(residual.dtype)} of shape "
            f"{tuple(residual.shape)} on {residual.device}"
        )
    if num_batches_tracked is not None and (
        num_batches_tracked.numel() != 1 or num_batches_tracked.device != input.device
    ):
        raise RuntimeError(
            f"{name}: num_batches_tracked must be one number on {input.device}, got shape "
            f"{tuple(num_batches_tracked.shape)} on {num_batches_tracked.device}"
        )
