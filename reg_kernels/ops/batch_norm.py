"""BatchNorm and the chain behind it: the public functions.

What they call, and its gradient, is in _batch_norm_ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _rng
from .._activation import NONE
from .._layout import keeps_channels_last, ordered, with_strides
from .._numbers import number, traced_numbers, varies
from ..reference import batch_norm as reference
from ..reference.dropout import dropout as reference_dropout
from . import _batch_norm_ops as ops
from ._arguments import probability
from ._batch_norm_checks import activation_number, check_call
from ._modes import is_transformed, tracing_state, unrecorded

_CPU = torch.device("cpu")  # where a launcher reads numbers without a wait

SLOPE = 0.01  # of leaky_relu below zero, torch's default


def _empty_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """As torch: a batch of no values moves the counter on, not the running statistics, and every
    parameter has a gradient, of zeros."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    output = input.clone()
    for values, combine in ((weight, torch.mul), (bias, torch.add)):
        if values is not None:
            output = combine(output, reference.per_channel(values.to(output.dtype), output))
    return output if residual is None else output + residual


def _by_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    p: float,
    rng_state: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """The same by operations that torch.func and forward mode can transform, unfused."""
    if momentum is None and num_batches_tracked is not None:
        momentum = 1.0 / float(num_batches_tracked + 1)
    y = torch.nn.functional.batch_norm(
        *(input, running_mean, running_var, weight, bias),
        *(training, 0.0 if momentum is None else momentum, eps),
    )
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if residual is not None:
        y = y + residual
    y = reference.activate(y, activation, slope)
    if p > 0.0:
        y = y * reference_dropout(torch.ones_like(y), p, rng_state)
    return y


def _run(
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
    activation: int,
    slope: float,
    p: float,
    num_batches_tracked: Tensor | None,
    rng_state: Tensor | None,
    backend: str | None,
) -> Tensor:
    if type(momentum) is not float and momentum is not None:
        momentum = number(name, "momentum", momentum, "a float or None")
    if type(eps) is not float:
        eps = number(name, "eps", eps)
    call = (
        *(name, input, running_mean, running_var, weight, bias, residual),
        *(training, momentum, eps, num_batches_tracked),
    )
    recorded = tracing_state() is not None
    if recorded:
        with unrecorded():
            check_call(*call)
            empty, channels_last = input.numel() == 0, keeps_channels_last(input)
    else:
        check_call(*call)
        empty = input.numel() == 0
    device = input.device
    traced = torch.compiler.is_compiling()
    if rng_state is not None:
        rng_state = _rng.checked_state(rng_state, device, name)
    if not training or p == 0.0:
        p, rng_state = 0.0, None
    by_numbers = varies(momentum, eps, slope, p)
    if training:
        op = ops.TRAINING_BY_NUMBERS if by_numbers else ops.TRAINING
    else:
        op = ops.INFERENCE_BY_NUMBERS if by_numbers else ops.INFERENCE
    overload = (op.traced_overload if traced else op.overload)(device, input.dtype, backend)
    if empty:
        output = _empty_batch(input, weight, bias, residual, training, num_batches_tracked)
        return reference.activate(output, activation, slope)
    if p > 0.0 and rng_state is None:
        if p == 1.0:  # nothing to draw
            rng_state = torch.zeros(2, dtype=torch.int64, device=device)
        elif traced or recorded or is_transformed():
            rng_state = _rng.draw_traced_state(device)
        else:
            rng_state = _rng.draw_state(device)
    if not traced and is_transformed():
        return _by_torch(
            *(input, running_mean, running_var, weight, bias, residual, training),
            *(momentum, eps, activation, slope, p, rng_state, num_batches_tracked),
        )

    if recorded:  # in this order, whatever the order is of what a later run brings
        input = ordered(input, channels_last)
        residual = None if residual is None else ordered(residual, channels_last)
    else:
        if not input.is_contiguous():
            input = ordered(input, keeps_channels_last(input))
        if residual is not None:
            residual = with_strides(residual, input.stride())
    weight, bias = (v if v is None else v.contiguous() for v in (weight, bias))
    numbers: tuple[Tensor, ...] = ()
    if by_numbers:
        # What is left of them in their places: None, 0 or not.
        varying = (momentum, eps, slope, p) if training else (eps, slope, p)
        numbers = (traced_numbers(_CPU, *varying),)
        momentum = None if momentum is None else 0.0
        eps, slope, p = 1.0, 0.0, 0.5 if p > 0.0 else 0.0
    # The kernels write contiguous statistics and an int64; others are copied there and back.
    given = [v for v in (running_mean, running_var, num_batches_tracked) if v is not None]
    tracked = [v.contiguous() for v in given]
    if training:
        if num_batches_tracked is not None and num_batches_tracked.dtype != torch.int64:
            tracked[-1] = tracked[-1].to(torch.int64)
        rest: tuple[Any, ...] = (
            *(tracked, momentum, eps, activation, slope, p, rng_state, False),
            *numbers,
        )
    else:
        rest = (*tracked[:2], eps, activation, slope, *numbers)
    values = (input, weight, bias, residual)
    if traced or recorded:
        output = overload(*values, *rest)
    elif ops.wants_gradient(*values):
        output = ops.apply(*values, overload, rest)
    else:
        output = ops.forward(overload, *values, *rest)
    if not training:
        return output
    for own, written in zip(given, tracked, strict=True):
        if written is not own:
            own.copy_(written)
    return output[0]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Normalises each channel over the batch:
    :math:`y = (x - \mathrm{E}[x]) / \sqrt{\mathrm{Var}[x] + \epsilon} \cdot w + b`.

    Args:
        input: (N, C, ...), contiguous or channels last (others are copied); float64, float32,
            float16 or bfloat16. 16-bit floats are computed in float32 and rounded once.
        running_mean, running_var: [C], of the input's dtype, or float32 for 16-bit inputs. Used in
            evaluation; in training moved towards the batch's mean and its unbiased variance, or
            left out by None.
        weight, bias: [C] of such a dtype, or None for 1 and 0.
        training: whether to use the batch's statistics, with the biased variance, or the running
            ones.
        momentum: the batch's share in the new running statistics; None weighs all batches alike,
            by `num_batches_tracked`.
        eps: added to the variance.
        num_batches_tracked: an int64 of the batches so far, on the input's device; a training call
            adds one.
        backend: "native", "triton" or "reference"; by default the first that can run here.

    Returns:
        A tensor like `input`, channels last where that is or is a part of what is.

    Raises:
        ValueError: one value a channel in training, eps not positive in training or negative, one
            running statistic without the other, an unknown `backend`.
        RuntimeError: channel values of another size, dtype or device; none in evaluation; a
            `backend` that cannot run here (`BackendUnavailable`).
        NotImplementedError: another dtype. IndexError: fewer than 2 dimensions.
        TypeError: momentum None without a counter.
        A call that raises changes nothing.

    Statistics are merged pairwise in a fixed order: two runs give the same bits.

    Source: S. Ioffe, C. Szegedy, "Batch normalization", ICML 2015, algorithm 1.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            *(input, running_mean, running_var),
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            num_batches_tracked=num_batches_tracked,
            backend=backend,
        )
    return _run(
        *("batch_norm", input, running_mean, running_var, weight, bias, None),
        *(training, momentum, eps, NONE, SLOPE, 0.0, num_batches_tracked, None, backend),
    )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = "relu",
    negative_slope: float = SLOPE,
    drop: float = 0.0,
    num_batches_tracked: Tensor | None = None,
    rng_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""BatchNorm, residual, activation and dropout in one pass over memory after the statistics:
    :math:`y = m \cdot \mathrm{act}(\mathrm{BN}(x) + r)`.

    Equal to `dropout(act(batch_norm(input) + residual), drop)` with one rounding instead of four,
    and to the bit in what it drops. The backward reads `input` and keeps at most one bit an element
    beside it; with silu or gelu, or leaky_relu and drop, it reads `residual` as well. Behind relu a
    closed position has the gradient 0, whatever comes in.

    Args:
        residual: like `input`, added before the activation; or None. Of the same dtype, so under
            autocast give both from one kind of layer.
        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: leaky_relu's, below zero.
        drop: the probability of dropping, in [0, 1]; without effect unless `training`.
        rng_state: int64 `[seed, offset]` for the mask, as `dropout` takes it; by default drawn from
            torch's generator.
        The others: as `batch_norm`.

    Returns:
        A tensor like `input`, channels last where that is or is a part of what is.

    Raises:
        ValueError: also for an unknown `activation` or `drop` outside [0, 1].
        RuntimeError: also for a residual of another shape, dtype or device.
        Otherwise as `batch_norm`. A call that raises changes nothing.

    Source: as `batch_norm` and `dropout`; the order of the chain is that of K. He et al., "Deep
    residual learning", CVPR 2016, with dropout behind it.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm_act,
            tensors,
            *tensors,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            drop=drop,
            num_batches_tracked=num_batches_tracked,
            rng_state=rng_state,
            backend=backend,
        )
    name = "batch_norm_act"
    if type(drop) is not float or not 0.0 <= drop <= 1.0:
        drop = probability(name, "drop", drop)
    if type(negative_slope) is not float:
        negative_slope = number(name, "negative_slope", negative_slope)
    act = activation_number(name, activation)
    return _run(
        *(name, *tensors, training, momentum, eps, act, negative_slope, drop),
        *(num_batches_tracked, rng_state, backend),
    )
