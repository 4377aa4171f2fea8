"""BatchNorm and the chain behind it: the public functions.

What they call, and its gradient, is in _batch_norm_ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _rng
from .._activation import NONE
from .._layout import keeps_channels_last, ordered, with_strides
from .._numbers import number, traced_numbers, varies
from ..reference import batch_norm as reference
from ..reference.dropout import dropout as reference_dropout
from . import _batch_norm_ops as ops
from ._batch_norm_checks import Call, activation_number, check_call
from ._checks import hand_over, probability
from ._modes import FUNC, TRACE, watcher
from ._route import asked, wants_gradient

_CPU = torch.device("cpu")  # where a launcher reads numbers without a wait

_TENSORS = ("input", "running_mean", "running_var", "weight", "bias")  # that may override a call

SLOPE = 0.01  # of leaky_relu below zero, torch's default


def _empty_batch(call: Call) -> Tensor:
    """As torch: a batch of no values moves the counter on, not the running statistics, and every
    parameter has a gradient, of zeros."""
    if call.training and call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    output = call.input.clone()
    for values, combine in ((call.weight, torch.mul), (call.bias, torch.add)):
        if values is not None:
            output = combine(output, reference.per_channel(values.to(output.dtype), output))
    output = output if call.residual is None else output + call.residual
    return reference.activate(output, call.activation, call.slope)


def _by_torch(call: Call) -> Tensor:
    """The same by operations that torch.func and forward mode can transform, unfused."""
    momentum, counter = call.momentum, call.num_batches_tracked
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / float(counter + 1)
    y = torch.nn.functional.batch_norm(
        *(call.input, call.running_mean, call.running_var, call.weight, call.bias),
        *(call.training, momentum, call.eps),
    )
    if call.training and counter is not None:
        counter.add_(1)
    if call.residual is not None:
        y = y + call.residual
    y = reference.activate(y, call.activation, call.slope)
    if call.p > 0.0:
        assert call.rng_state is not None
        y = y * reference_dropout(torch.ones_like(y), call.p, call.rng_state)
    return y


def _rng_state(call: Call, looks: str | None) -> Tensor | None:
    """The state that a call which drops something draws by."""
    device = call.input.device
    if call.rng_state is not None:
        return call.rng_state
    if call.p == 1.0:  # nothing to draw
        return torch.zeros(2, dtype=torch.int64, device=device)
    return _rng.draw_state(device) if looks is None else _rng.draw_traced_state(device)


def _run(call: Call) -> Tensor:
    looks = watcher()
    asked(looks, check_call, call)
    input, training, device = call.input, call.training, call.input.device
    if call.rng_state is not None:
        call = call._replace(rng_state=_rng.checked_state(call.rng_state, device, call.name))
    by_numbers = varies(call.momentum, call.eps, call.slope, call.p)
    if training:
        op = ops.TRAINING_BY_NUMBERS if by_numbers else ops.TRAINING
    else:
        op = ops.INFERENCE_BY_NUMBERS if by_numbers else ops.INFERENCE
    overload = op.overload(device, input.dtype, call.backend, looks)
    if asked(looks, input.numel) == 0:
        return _empty_batch(call)
    p, rng_state = 0.0, None
    if training and call.p != 0.0:
        p, rng_state = call.p, _rng_state(call, looks)
    if looks is FUNC:
        return _by_torch(call._replace(p=p, rng_state=rng_state))

    residual = call.residual
    if looks is TRACE:  # in this order, whatever the order is of what a later run brings
        channels_last = asked(looks, keeps_channels_last, input)
        input = ordered(input, channels_last)
        residual = None if residual is None else ordered(residual, channels_last)
    else:
        if not input.is_contiguous():
            input = ordered(input, keeps_channels_last(input))
        if residual is not None:
            residual = with_strides(residual, input.stride())
    weight, bias = (v if v is None else v.contiguous() for v in (call.weight, call.bias))
    values = (input, weight, bias, residual)
    momentum, eps, slope, numbers = call.momentum, call.eps, call.slope, None
    if by_numbers:
        # What is left of them in their places: None, 0 or not.
        varying = (momentum, eps, slope, p) if training else (eps, slope, p)
        numbers = traced_numbers(_CPU, *varying)
        momentum = None if momentum is None else 0.0
        eps, slope, p = 1.0, 0.0, 0.5 if p > 0.0 else 0.0
    # The kernels write contiguous statistics and an int64; others are copied there and back.
    moved = (call.running_mean, call.running_var, call.num_batches_tracked)
    given = [v for v in moved if v is not None]
    tracked = [v.contiguous() for v in given]
    # A program that looks decides about the gradient, and with it the gate, when it runs.
    wanted = looks is None and wants_gradient(*values)
    how: ops.Training | ops.Inference
    if training:
        if call.num_batches_tracked is not None and tracked[-1].dtype != torch.int64:
            tracked[-1] = tracked[-1].to(torch.int64)
        how = ops.Training(tracked, momentum, eps, call.activation, slope, p, rng_state, wanted)
    else:
        how = ops.Inference(tracked[0], tracked[1], eps, call.activation, slope)
    if looks is not None:
        output = overload(*values, *how, *(() if numbers is None else (numbers,)))
    elif wanted:
        output = ops.apply(*values, overload, how, numbers)
    else:
        output = ops.run(overload, values, how, numbers)
    if not training:
        return output
    for own, written in zip(given, tracked, strict=True):
        if written is not own:
            own.copy_(written)
    return output[0]


def _checked(
    name: str,
    tensors: tuple[Any, ...],
    training: bool,
    momentum: Any,
    eps: Any,
    *rest: Any,
) -> Call:
    """A call of numbers that are floats, and of whatever else one has to be given."""
    if type(momentum) is not float and momentum is not None:
        momentum = number(name, "momentum", momentum, "a float or None")
    if type(eps) is not float:
        eps = number(name, "eps", eps)
    return Call(*(name, *tensors, training, momentum, eps, *rest))


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
        return hand_over(batch_norm, locals(), *_TENSORS)
    tensors = (input, running_mean, running_var, weight, bias, None)
    chain = (NONE, SLOPE, 0.0, num_batches_tracked, None, backend)
    return _run(_checked("batch_norm", tensors, training, momentum, eps, *chain))


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
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        return hand_over(batch_norm_act, locals(), *_TENSORS, "residual")
    name = "batch_norm_act"
    if type(drop) is not float or not 0.0 <= drop <= 1.0:
        drop = probability(name, "drop", drop)
    if type(negative_slope) is not float:
        negative_slope = number(name, "negative_slope", negative_slope)
    act = activation_number(name, activation)
    tensors = (input, running_mean, running_var, weight, bias, residual)
    chain = (act, negative_slope, drop, num_batches_tracked, rng_state, backend)
    return _run(_checked(name, tensors, training, momentum, eps, *chain))
