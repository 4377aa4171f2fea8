"""What each op's implementations in Python are handed, as csrc/torch/<op>.h has it for the native
ones: see _entry.py. Each function takes what its op does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._layout import is_dense
from ..backends import DTYPES
from ._entry import Call, described, has_layout_of

_ACTIVATIONS = range(5)
_Optional = Tensor | None


def dropout(
    op: str,
    input: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: _Optional = None,
) -> None:
    """Dropout, channel dropout, and both in place."""
    call = Call(op, input)
    if op.startswith("feature_"):
        call.check_channels(input)
    elif op.endswith("_") and not is_dense(input):
        call.refuse("input", "dense, since it is written into", input)
    if not 0 <= element_offset < 2**62:
        call.refuse("element_offset", "in [0, 2^62)", element_offset)
    call.check_probability(p)
    call.check_rng_state(rng_state)
    call.check_number(traced_p, torch.float64, "traced_p", on_host=True)
    call.check_floats(input, "input")
    call.check_memory(input, "input")


# BatchNorm


def _channel_values(call: Call, values: _Optional, channels: int, name: str) -> None:
    if values is None:
        return
    if values.numel() != channels or not values.is_contiguous():
        call.refuse(name, f"contiguous, one value for each of {channels} channels", values)
    call.check_floats(values, name)
    call.check_memory(values, name)


def _like(call: Call, x: Tensor, other: _Optional, name: str) -> None:
    if other is None:
        return
    if other.dtype != x.dtype or not has_layout_of(x, other):
        call.refuse(name, f"like the input, {described(x)}", other)
    call.check_memory(other, name)


def _batch_norm_input(
    call: Call,
    input: Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    activation: int,
    p: float,
) -> int:
    """Values a channel."""
    call.check_floats(input, "input")
    call.check_channels(input)
    call.check_memory(input, "input")
    _like(call, input, residual, "residual")
    channels = input.shape[1]
    _channel_values(call, weight, channels, "weight")
    _channel_values(call, bias, channels, "bias")
    if activation not in _ACTIVATIONS:
        call.refuse("activation", "in [0, 4]", activation)
    call.check_probability(p)
    return input.numel() // channels if channels else 0


def batch_norm(
    op: str,
    input: Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    tracked: list[Tensor],
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    p: float,
    rng_state: _Optional,
    keep_gate: bool,
) -> None:
    call = Call(op, input)
    count = _batch_norm_input(call, input, weight, bias, residual, activation, p)
    if count <= 1:
        call.refuse("input", "of more than 1 value a channel", f"{count} of them")
    if len(tracked) > 3:
        call.refuse("tracked", "at most 3 tensors", len(tracked))
    averages, counts = len(tracked) > 1, len(tracked) % 2 == 1
    if momentum is None and averages and not counts:
        call.refuse("momentum", "a float, or come with num_batches_tracked", None)
    if averages:
        _channel_values(call, tracked[0], input.shape[1], "running_mean")
        _channel_values(call, tracked[1], input.shape[1], "running_var")
    if counts:
        call.check_vector(tracked[-1], torch.int64, 1, "num_batches_tracked")
    if p > 0.0:
        if rng_state is None:
            call.refuse("rng_state", "given where something is dropped", None)
        call.check_rng_state(rng_state)


def batch_norm_inference(
    op: str,
    input: Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: int,
    slope: float,
) -> None:
    call = Call(op, input)
    _batch_norm_input(call, input, weight, bias, residual, activation, 0.0)
    _channel_values(call, running_mean, input.shape[1], "running_mean")
    _channel_values(call, running_var, input.shape[1], "running_var")


def batch_norm_backward(
    op: str,
    grad_output: Tensor,
    input: Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    mean: Tensor,
    invstd: Tensor,
    gate: _Optional,
    rng_state: _Optional,
    training: bool,
    activation: int,
    slope: float,
    p: float,
    *wants: bool,
) -> None:
    call = Call(op, input)
    count = _batch_norm_input(call, input, weight, bias, residual, activation, p)
    _like(call, input, grad_output, "grad_output")
    channels = input.shape[1]
    call.check_vector(mean, torch.float64, channels, "mean")
    call.check_vector(invstd, torch.float64, channels, "invstd")
    if gate is not None:
        call.check_vector(gate, torch.uint8, channels * ((count + 7) // 8), "gate")
    elif p > 0.0:
        call.refuse("gate", "the forward's, where something was dropped", None)


# Losses


def _loss_input(
    call: Call,
    input: Tensor,
    target: _Optional,
    partner: _Optional,
    lam: _Optional,
    weight: _Optional,
    reduction: int,
    traced_smoothing: _Optional,
) -> tuple[torch.dtype, int]:
    """What the logits are computed in, and how many positions there are."""
    call.check_floats(input, "input")
    call.check_channels(input)
    call.check_memory(input, "input")
    samples, classes, *rest = input.shape
    positions = samples
    for size in rest:
        positions *= size
    if reduction not in (0, 1, 2):
        call.refuse("reduction", "0, 1 or 2", reduction)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    if weight is not None:
        call.check_vector(weight, compute, classes, "weight")
    if lam is not None and partner is None:
        call.refuse("lam", "None without a partner", lam)
    if traced_smoothing is not None:
        call.check_vector(traced_smoothing, torch.float64, 1, "traced_smoothing")
    if target is None:
        if partner is not None:
            call.refuse("partner", "None without a target", partner)
        return compute, positions
    if target.dtype != torch.int64:
        if target.dtype not in (input.dtype, compute) or not has_layout_of(input, target):
            must = f"int64 labels, or probabilities like the input, {described(input)}"
            call.refuse("target", must, target)
        if partner is not None:
            call.refuse("partner", "None with probabilities", partner)
        call.check_memory(target, "target")
        return compute, positions
    call.check_vector(target, torch.int64, positions, "target")
    if partner is not None:
        call.check_vector(partner, torch.int64, positions, "partner")
    if lam is not None:
        call.check_shares(lam, samples)
    return compute, positions


def _saved(
    call: Call,
    of: tuple[torch.dtype, int],
    grad_output: Tensor,
    stats: Tensor,
    count: int,
    reduction: int,
) -> None:
    compute, positions = of
    call.check_vector(grad_output, compute, 1 if reduction else positions, "grad_output")
    call.check_vector(stats, compute, count * positions, "stats")


def _teacher(
    call: Call, input: Tensor, teacher: Tensor, target: _Optional, traced_softness: _Optional
) -> None:
    if traced_softness is not None:
        call.check_vector(traced_softness, torch.float64, 2, "traced_softness")
    if target is not None and target.dtype != torch.int64:
        call.refuse("target", "int64 labels", "probabilities")
    call.check_floats(teacher, "teacher")
    both = (teacher.dtype == torch.float64) == (input.dtype == torch.float64)
    if not both or not has_layout_of(input, teacher):
        must = "of the input's shape and strides, and float64 if that is: " + described(input)
        call.refuse("teacher", must, teacher)
    call.check_memory(teacher, "teacher")


def cross_entropy(
    op: str,
    input: Tensor,
    target: Tensor,
    partner: _Optional,
    lam: _Optional,
    one_lam: float,
    weight: _Optional,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: _Optional,
    keep_gradient: bool,
) -> None:
    _loss_input(Call(op, input), input, target, partner, lam, weight, reduction, traced_smoothing)


def cross_entropy_backward(
    op: str,
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    target: Tensor,
    partner: _Optional,
    lam: _Optional,
    one_lam: float,
    weight: _Optional,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: _Optional,
) -> None:
    call = Call(op, input)
    of = _loss_input(call, input, target, partner, lam, weight, reduction, traced_smoothing)
    _saved(call, of, grad_output, stats, 2, reduction)


def distillation(
    op: str,
    input: Tensor,
    teacher: Tensor,
    target: _Optional,
    partner: _Optional,
    lam: _Optional,
    one_lam: float,
    weight: _Optional,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: _Optional,
    temperature: float,
    alpha: float,
    traced_softness: _Optional,
    keep_gradient: bool,
) -> None:
    call = Call(op, input)
    _loss_input(call, input, target, partner, lam, weight, reduction, traced_smoothing)
    _teacher(call, input, teacher, target, traced_softness)


def distillation_backward(
    op: str,
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    teacher: Tensor,
    target: _Optional,
    partner: _Optional,
    lam: _Optional,
    one_lam: float,
    weight: _Optional,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: _Optional,
    temperature: float,
    alpha: float,
    traced_softness: _Optional,
) -> None:
    call = Call(op, input)
    of = _loss_input(call, input, target, partner, lam, weight, reduction, traced_smoothing)
    _teacher(call, input, teacher, target, traced_softness)
    _saved(call, of, grad_output, stats, 5, reduction)


# Mixup


def _batch(call: Call, x: Tensor, name: str) -> None:
    if x.dim() >= 2:
        call.check_channels(x, name)
    elif x.dim() != 1 or not x.is_contiguous():
        call.refuse(name, "a contiguous batch", x)
    call.check_memory(x, name)


def _blend(call: Call, x: Tensor, lam: _Optional, index: _Optional, boxes: _Optional) -> None:
    samples = x.shape[0]
    if lam is not None:
        call.check_shares(lam, samples)
    if index is not None:
        call.check_vector(index, torch.int64, samples, "index")
    if boxes is not None:
        if x.dim() < 4:
            call.refuse("boxes", "None but for images (N, C, ..., H, W)", x)
        count = 4 if boxes.numel() == 4 else 4 * samples
        call.check_vector(boxes, torch.int64, count, "boxes")


def _output(call: Call, x: Tensor, dtype: torch.dtype, channels_last: bool) -> None:
    if dtype not in DTYPES:
        call.refuse("dtype", "one of float64, float32, float16, bfloat16", dtype)
    if channels_last and x.dim() < 2:
        call.refuse("channels_last", "false without channels", x)


def _constants(call: Call, x: Tensor, dtype: torch.dtype, **constants: _Optional) -> None:
    compute = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    for name, values in constants.items():
        if values is not None:
            call.check_vector(values, compute, x.shape[1] if x.dim() >= 2 else 1, name)


def mixup(
    op: str,
    input: Tensor,
    lam: _Optional,
    one_lam: float,
    index: _Optional,
    boxes: _Optional,
    scale: _Optional,
    shift: _Optional,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    call = Call(op, input)
    _batch(call, input, "input")
    if input.dtype != torch.uint8:
        call.check_floats(input, "input")
    _blend(call, input, lam, index, boxes)
    _output(call, input, dtype, channels_last)
    _constants(call, input, dtype, scale=scale, shift=shift)


def mixup_(
    op: str,
    input: Tensor,
    lam: _Optional,
    one_lam: float,
    index: _Optional,
    boxes: _Optional,
    scale: _Optional,
    shift: _Optional,
) -> None:
    call = Call(op, input)
    _batch(call, input, "input")
    call.check_floats(input, "input")
    _blend(call, input, lam, index, boxes)
    _constants(call, input, input.dtype, scale=scale, shift=shift)
    read = {"lam": lam, "index": index, "boxes": boxes, "scale": scale, "shift": shift}
    for name, values in read.items():
        call.check_apart(input, values, name)


def mixup_backward(
    op: str,
    grad_output: Tensor,
    lam: _Optional,
    one_lam: float,
    receivers: _Optional,
    starts: _Optional,
    boxes: _Optional,
    scale: _Optional,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    call = Call(op, grad_output)
    _batch(call, grad_output, "grad_output")
    call.check_floats(grad_output, "grad_output")
    _blend(call, grad_output, lam, None, boxes)
    samples = grad_output.shape[0]
    if (receivers is None) != (starts is None):
        call.refuse("receivers and starts", "given together or not", "one of them")
    if receivers is not None:
        call.check_vector(receivers, torch.int64, samples, "receivers")
        call.check_vector(starts, torch.int64, samples + 1, "starts")
    _output(call, grad_output, dtype, channels_last)
    _constants(call, grad_output, dtype, scale=scale)


# By op, as the registry names them.
CHECKS: dict[str, Any] = dict.fromkeys(
    ("dropout", "dropout_", "feature_dropout", "feature_dropout_"), dropout
) | {
    function.__name__: function
    for function in (
        *(batch_norm, batch_norm_inference, batch_norm_backward),
        *(cross_entropy, cross_entropy_backward, distillation, distillation_backward),
        *(mixup, mixup_, mixup_backward),
    )
}
