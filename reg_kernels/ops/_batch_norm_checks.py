"""What a BatchNorm call has to be given: torch's error types, before anything is written."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._activation import NUMBERS
from .._dtypes import DTYPES, named
from .._tracked import Tracked
from ._checks import (
    Entry,
    check_device,
    check_dtype,
    check_like,
    check_tensor,
    refuse,
)


class BatchNormCall(NamedTuple):
    """What `batch_norm` or `batch_norm_act`, the `name`, was called with."""

    name: str
    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    activation: int  # of _activation.NUMBERS
    slope: float
    p: float
    num_batches_tracked: Tensor | None
    rng_state: Tensor | None
    element_offset: int
    backend: str | None


def values_a_channel(x: Tensor) -> int:
    """M, values a channel."""
    return x.shape[0] * math.prod(x.shape[2:])


def check_eps(name: str, eps: float, training: bool) -> None:
    """Raises where torch does: on an eps that could divide by zero."""
    if training and eps <= 0.0:
        refuse(name, "eps", "positive in training", eps, ValueError)
    if eps < 0.0:
        refuse(name, "eps", "0 or above", eps, ValueError)


def activation_number(name: str, activation: str | None) -> int:
    """The number that stands for an activation's name; raises ValueError for an unknown one."""
    try:
        return NUMBERS[activation]
    except (KeyError, TypeError):
        known = ", ".join(repr(known) for known in NUMBERS)
        refuse(name, "activation", f"one of {known}", repr(activation), ValueError)


def _check_channel_values(name: str, what: str, values: Tensor, input: Tensor) -> None:
    """weight, bias or a running statistic: [C], on the input's device, of a dtype that fits."""
    dtype = input.dtype
    if values.shape != input.shape[1:2]:
        raise RuntimeError(
            f"{name}: {what} must have shape ({input.shape[1]},), one value a channel, "
            f"got {tuple(values.shape)}"
        )
    check_device(name, what, values, input)
    if values.dtype != dtype and not (values.dtype == torch.float32 and dtype.itemsize == 2):
        allowed = f"{named(dtype)} or float32" if dtype.itemsize == 2 else named(dtype)
        refuse(name, what, f"{allowed} for an input of {named(dtype)}", named(values.dtype))


def check_call(call: BatchNormCall, across: bool = False) -> None:
    """What every call has to be given; `across`: by the statistics of several ranks. Nothing is
    written before all of it holds."""
    name, input, training = call.name, call.input, call.training
    check_tensor(name, "input", input)
    dtype, device, channels = input.dtype, input.device, input.shape[1:2]
    if input.dim() < 2:
        raise IndexError(
            f"{name}: input must have at least 2 dimensions, (N, C, ...), got {input.dim()}"
        )
    if dtype not in DTYPES:
        check_dtype(name, "input", dtype, NotImplementedError)
    if call.eps <= 0.0:
        check_eps(name, call.eps, training)
    alone = training and not across
    if alone and input.numel() == input.shape[1] and values_a_channel(input) == 1:
        raise ValueError(
            f"{name}: expected more than 1 value per channel when training, "
            f"got input size {tuple(input.shape)}"
        )
    mean, var, counter = call.running_mean, call.running_var, call.num_batches_tracked
    if not training and (mean is None or var is None):
        raise RuntimeError(f"{name}: running_mean and running_var must be given for evaluation")
    if (mean is None) != (var is None):
        raise ValueError(f"{name}: running_mean and running_var must be given together or not")
    if training and call.momentum is None and mean is not None and counter is None:
        raise TypeError(
            f"{name}: momentum must be a float, or None together with num_batches_tracked"
        )
    for what, values in (
        *(("running_mean", mean), ("running_var", var)),
        *(("weight", call.weight), ("bias", call.bias)),
    ):
        if values is None:
            continue
        if values.dtype != dtype or values.device != device or values.shape != channels:
            _check_channel_values(name, what, values, input)
        if values.requires_grad and (values is mean or values is var):
            raise RuntimeError(f"{name}: {what} must not require grad, it has no gradient")
    if not 0 <= call.element_offset < 2**62:
        refuse(name, "element_offset", "in [0, 2^62)", call.element_offset, ValueError)
    if call.residual is not None:
        check_like(name, "residual", call.residual, input)
    if counter is not None and (counter.numel() != 1 or counter.device != input.device):
        got = f"shape {tuple(counter.shape)} on {counter.device}"
        refuse(name, "num_batches_tracked", f"one number on {input.device}", got)


# Entries


def _check_channels(entry: Entry, values: Tensor | None, channels: int, name: str) -> None:
    if values is None:
        return
    if values.numel() != channels or not values.is_contiguous():
        entry.refuse(name, f"contiguous, one value for each of {channels} channels", values)
    entry.check_floats(values, name)
    entry.check_memory(values, name)


def _check_values(entry: Entry, a: Any, p: float) -> int:
    """What all three ops read; returns values a channel."""
    x = a.input
    entry.check_floats(x, "input")
    entry.check_channels(x)
    entry.check_memory(x, "input")
    entry.check_like(x, a.residual, "residual")
    channels = x.shape[1]
    _check_channels(entry, a.weight, channels, "weight")
    _check_channels(entry, a.bias, channels, "bias")
    if not 0 <= a.activation < len(NUMBERS):
        entry.refuse("activation", f"in [0, {len(NUMBERS) - 1}]", a.activation)
    entry.check_probability(p)
    return x.numel() // channels if channels else 0


def _check_gathered(entry: Entry, gathered: Tensor, channels: int) -> None:
    """Raises unless it is the moments of all ranks."""
    if gathered.dim() != 3 or len(gathered) == 0 or gathered.shape[1:] != (4, channels):
        entry.refuse("gathered", f"of shape (ranks, 4, {channels})", gathered)
    entry.check_vector(gathered, torch.float64, gathered.numel(), "gathered")


def check_training(op: str, a: Any) -> None:
    entry = Entry(op, a.input)
    count = _check_values(entry, a, a.p)
    if a.gathered is not None:
        _check_gathered(entry, a.gathered, a.input.shape[1])
    elif count <= 1:
        entry.refuse("input", "of more than 1 value a channel", f"{count} of them")
    if len(a.tracked) > 3:
        entry.refuse("tracked", "at most 3 tensors", len(a.tracked))
    tracked = Tracked.of(a.tracked)
    averages, counter = tracked.running_mean is not None, tracked.num_batches_tracked
    if a.momentum is None and averages and counter is None:
        entry.refuse("momentum", "a float, or come with num_batches_tracked", None)
    if averages:
        for name in ("running_mean", "running_var"):
            _check_channels(entry, getattr(tracked, name), a.input.shape[1], name)
    if counter is not None:
        entry.check_vector(counter, torch.int64, 1, "num_batches_tracked")
    entry.check_element_offset(a.element_offset)
    if a.p > 0.0:
        if a.rng_state is None:
            entry.refuse("rng_state", "given where something is dropped", None)
        entry.check_rng_state(a.rng_state)


def check_inference(op: str, a: Any) -> None:
    entry = Entry(op, a.input)
    _check_values(entry, a, 0.0)
    _check_channels(entry, a.running_mean, a.input.shape[1], "running_mean")
    _check_channels(entry, a.running_var, a.input.shape[1], "running_var")


def check_moments(op: str, a: Any) -> None:
    entry = Entry(op, a.input)
    entry.check_floats(a.input, "input")
    entry.check_channels(a.input)
    entry.check_memory(a.input, "input")


def check_backward(op: str, a: Any) -> None:
    entry = _check_saved(op, a)
    if a.sums is not None:
        if a.wants_parameters:
            entry.refuse("wants_parameters", "False where sums are given", True)
        entry.check_vector(a.sums, torch.float64, 2 * a.input.shape[1] + 1, "sums")


def check_sums(op: str, a: Any) -> None:
    _check_saved(op, a)


def _check_saved(op: str, a: Any) -> Entry:
    """What a backward reads."""
    entry = Entry(op, a.input)
    count = _check_values(entry, a, a.p)
    entry.check_like(a.input, a.grad_output, "grad_output")
    channels = a.input.shape[1]
    entry.check_vector(a.mean, torch.float64, channels, "mean")
    entry.check_vector(a.invstd, torch.float64, channels, "invstd")
    if a.gate is not None:
        entry.check_vector(a.gate, torch.uint8, channels * ((count + 7) // 8), "gate")
    elif a.p > 0.0:
        entry.refuse("gate", "the forward's, where something was dropped", None)
    return entry
