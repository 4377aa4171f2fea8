"""BatchNorm and the chain behind it: the public functions.

What they call, and its gradient, is in _batch_norm_ops.py.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _part, _rng
from .._activation import NONE
from .._numbers import integer, number, traced_numbers, varies
from ..backends import forced_by
from ..reference import batch_norm as reference
from . import _batch_norm_ops as ops
from ._batch_norm_checks import BatchNormCall, activation_number, check_call
from ._checks import hand_over, probability
from ._collectives import Group, gathered, group_of
from ._draw import drawn_state, draws_beside_others, refuse_draws
from ._modes import COMPILE, FUNC, ONNX, watcher
from ._route import asked, in_order, wants_gradient
from ._signature import Known, is_compiling, signature

_CPU = torch.device("cpu")  # a launcher reads numbers there without waiting

_TENSORS = ("input", "running_mean", "running_var", "weight", "bias")  # that may override a call

SLOPE = 0.01  # of leaky_relu below zero, torch's default


def _empty_batch(call: BatchNormCall) -> Tensor:
    """As in torch, a batch of no values raises the counter and leaves the running statistics, and
    every parameter has a gradient of zeros."""
    if call.training and call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    output = call.input.clone()
    for values, combine in ((call.weight, torch.mul), (call.bias, torch.add)):
        if values is not None:
            output = combine(output, reference.per_channel(values.to(output.dtype), output))
    output = output if call.residual is None else output + call.residual
    return reference.activate(output, call.activation, call.slope)


# Training calls that need no checks: the overload, whether a gradient is wanted, and what draws.
_KNOWN = Known()


def _run(name: str, *given: Any, group: Group | None = None) -> Tensor:
    """A call that was given what a BatchNormCall has behind its name; in training by the statistics
    of all ranks of a group, if there is one."""
    key = None
    if group is None and not is_compiling():
        key = signature(*given, forced_by())
        if (found := _KNOWN.get(key)) is not None:
            return _run_again(found, *given)
    call = _checked(name, *given)
    looks = watcher()
    asked(looks, check_call, call, group is not None)
    if group is not None and looks not in (None, COMPILE):
        raise RuntimeError(
            f"{name}: {looks} cannot look into a call with process_group: leave it out there"
        )
    input, training, device = call.input, call.training, call.input.device
    rng_state = given_state = call.rng_state
    if rng_state is not None:
        rng_state = given_state = _rng.checked_state(rng_state, device, call.name)
    p = call.p if training else 0.0
    if p > 0.0:
        refuse_draws(name, looks)
    by_numbers = varies(call.momentum, call.eps, call.slope, p)
    if training:
        op = ops.TRAINING_BY_NUMBERS if by_numbers else ops.TRAINING
    else:
        op = ops.INFERENCE_BY_NUMBERS if by_numbers else ops.INFERENCE
    overload = op.overload(device, input.dtype, call.backend, looks)
    # A rank without values takes part in what the others exchange, unless none has a channel.
    if asked(looks, input.numel) == 0 and (group is None or input.shape[1] == 0):
        if rng_state is None and p > 0.0 and draws_beside_others(input):
            drawn_state(device, looks, draws=p != 1.0)
        return _empty_batch(call)
    element_offset = call.element_offset
    if p == 0.0:
        rng_state = None
    elif rng_state is None:
        rng_state = drawn_state(device, looks, draws=p != 1.0)
        if _part.used and element_offset == 0 and p != 1.0:
            element_offset = _part.offset_of(name, input.shape, rng_state)
    residual, weight, bias = call.residual, call.weight, call.bias
    if looks not in (FUNC, ONNX):
        input = in_order(input, looks)
        residual = None if residual is None else in_order(residual, looks, input)
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
    values = (input, weight, bias, residual)
    momentum, eps, slope, numbers = call.momentum, call.eps, call.slope, None
    if by_numbers:
        # In their places only this is left: whether momentum is None, and whether p is 0.
        varying = (momentum, eps, slope, p) if training else (eps, slope, p)
        numbers = traced_numbers(_CPU, *varying)
        momentum = None if momentum is None else 0.0
        eps, slope, p = 1.0, 0.0, 0.5 if p > 0.0 else 0.0
    # The kernels write contiguous statistics and an int64; others are copied there and back.
    every = (call.running_mean, call.running_var, call.num_batches_tracked)
    moved = [v for v in every if v is not None]
    tracked = [v.contiguous() for v in moved]
    how: tuple[Any, ...]  # in the order of ops.Training, or of ops.Inference
    if training:
        if call.num_batches_tracked is not None and tracked[-1].dtype != torch.int64:
            tracked[-1] = tracked[-1].to(torch.int64)
        # Whether a gate is kept is up to the route.
        draws = (p, rng_state, element_offset)
        of_ranks = (
            (None, None) if group is None else (_of_all(input, group, call, looks), group.name)
        )
        how = (tracked, momentum, eps, call.activation, slope, *draws, False, *of_ranks)
    else:
        how = (*tracked[:2], eps, call.activation, slope)
    if numbers is not None:
        how = (*how, numbers)
    output = op.route.call(looks, overload, values, how)
    if not training:
        return output
    for own, written in zip(moved, tracked, strict=True):
        if written is not own:
            own.copy_(written)
    if key is not None and _are_same(
        (input, weight, bias, residual, *tracked, momentum, eps, given_state),
        (call.input, call.weight, call.bias, call.residual, *moved, *given[7:9], call.rng_state),
    ):
        _KNOWN.keep(key, (overload, wants_gradient(values), _rng.drawer(device)))
    return output[0]


def _of_all(input: Tensor, group: Group, call: BatchNormCall, looks: str | None) -> Tensor:
    """The moments of all ranks' batches."""
    op = ops.MOMENTS
    overload = op.overload(input.device, input.dtype, call.backend, looks)
    return gathered(op.route.call(looks, overload, (), (input,)), group)


def _across(name: str, process_group: Any, input: Tensor, training: bool) -> Group | None:
    """The group that a call's statistics are of, or None where they are its own batch's."""
    if not training:
        return None
    group = group_of(name, process_group, input.device)
    return group if group.size > 1 else None


def _are_same(ours: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    return all(map(operator.is_, ours, given))


def _run_again(
    found: tuple[Any, ...],
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
    element_offset: int,
    backend: str | None,
) -> Tensor:
    """A call of a signature that _KNOWN has, and `found` there."""
    overload, gradient, draw_state = found
    if p == 0.0:
        rng_state = None
    elif rng_state is None:
        rng_state = draw_state()
        if _part.used and element_offset == 0 and p != 1.0:
            element_offset = _part.offset_of("batch_norm_act", input.shape, rng_state)
    tracked = [] if running_mean is None else [running_mean, running_var]
    if num_batches_tracked is not None:
        tracked.append(num_batches_tracked)
    draws = (p, rng_state, element_offset)
    how = (tracked, momentum, eps, activation, slope, *draws, False, None, None)
    return ops.TRAINING.route.run(overload, gradient, (input, weight, bias, residual), how)[0]


def _checked(name: str, *given: Any) -> BatchNormCall:
    """The call, with momentum and eps made floats."""
    *tensors, training, momentum, eps = given[:9]
    if type(momentum) is not float and momentum is not None:
        momentum = number(name, "momentum", momentum, "a float or None")
    if type(eps) is not float:
        eps = number(name, "eps", eps)
    return BatchNormCall(*(name, *tensors, training, momentum, eps, *given[9:]))


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
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    r"""Normalises each channel over the batch.

    The result is :math:`y = (x - \mathrm{E}[x]) / \sqrt{\mathrm{Var}[x] + \epsilon} \cdot w + b`.

    Args:
        input: (N, C, ...); float64, float32, float16 or bfloat16. Contiguous and channels-last
            inputs are read as they are, others are copied first. 16-bit floats are computed in
            float32 and rounded once.
        running_mean: the running mean (C,), of the input's dtype, or float32 for 16-bit inputs.
            Evaluation uses it. Training moves it towards the batch's mean, unless it is None.
        running_var: the running variance, in the same way. Training moves it towards the batch's
            unbiased variance.
        weight: w of each channel (C,), of such a dtype; None stands for 1.
        bias: b of each channel (C,), of such a dtype; None stands for 0.
        training: True normalises by the batch's mean and biased variance, False by the running
            ones.
        momentum: the batch's share in the new running statistics. None weighs all batches alike, by
            `num_batches_tracked`.
        eps: a number that is added to the variance.
        num_batches_tracked: the number of batches so far, an int64 tensor on the input's device. A
            training call adds one to it.
        process_group: the ranks whose batches are normalised together in training, a
            `torch.distributed.ProcessGroup` that this process is in. None, or a group of one,
            normalises this rank's own. All ranks' inputs have to have as many channels, which is
            not compared here: gloo ends a process that is sent another number. See
            `reg_kernels.nn.SyncBatchNorm`, which compares.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        A tensor of the input's shape and dtype. It is channels last where the input is, or is a
        part of a tensor that is.

    Raises:
        ValueError: a channel has one value in training; `eps` is negative, or zero in training; one
            running statistic is given without the other; or `backend` is unknown.
        RuntimeError: a tensor of channels has another size, dtype or device; the running statistics
            are missing in evaluation; or `backend` cannot run here (`BackendUnavailable`).
        NotImplementedError: the input has another dtype.
        IndexError: the input has fewer than 2 dimensions.
        TypeError: `momentum` is None and there is no counter.

    A call that raises changes nothing. Statistics are merged pairwise in a fixed order: two runs
    give the same bits.

    Source: S. Ioffe, C. Szegedy, "Batch normalization", ICML 2015, algorithm 1.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return hand_over(batch_norm, locals(), *_TENSORS, by_place=3)
    given = (
        *("batch_norm", input, running_mean, running_var, weight, bias, None),
        *(training, momentum, eps, NONE, SLOPE, 0.0, num_batches_tracked, None, 0, backend),
    )
    if process_group is None:
        return _run(*given)
    return _run(*given, group=_across("batch_norm", process_group, input, training))


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
    element_offset: int = 0,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    r"""Applies BatchNorm, a residual, an activation and dropout, in one pass after the statistics.

    The result is :math:`y = m \cdot \mathrm{act}(\mathrm{BN}(x) + r)`. It equals
    `dropout(act(batch_norm(input) + residual), drop)`, with one rounding instead of four and the
    same mask. The backward reads `input` and keeps at most one bit an element beside it. With silu,
    with gelu, and with leaky_relu and `drop`, it reads `residual` as well. Where relu has made an
    element zero, its gradient is 0 whatever comes in.

    Args:
        input: (N, C, ...), as in `batch_norm`.
        running_mean: the running mean (C,) or None, as in `batch_norm`.
        running_var: the running variance (C,) or None, as in `batch_norm`.
        weight: w of each channel (C,) or None, as in `batch_norm`.
        bias: b of each channel (C,) or None, as in `batch_norm`.
        residual: a tensor of the input's shape, dtype and device that is added before the
            activation, or None. Under autocast, give both from the same kind of layer.
        training: True normalises by the batch's statistics and drops.
        momentum: the batch's share in the new running statistics, or None, as in `batch_norm`.
        eps: a number that is added to the variance.
        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: the slope of leaky_relu below zero.
        drop: the probability of dropping an element, in [0, 1]. It has no effect unless `training`.
        num_batches_tracked: the number of batches so far, as in `batch_norm`.
        process_group: the ranks whose batches are normalised together, as in `batch_norm`.
        rng_state: the state of the mask, int64 `[seed, offset]`, as in `dropout`. None draws it
            from torch's generator.
        element_offset: the place of the input's first element in the mask, as in `dropout`.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        A tensor of the input's shape and dtype. It is channels last where the input is, or is a
        part of a tensor that is.

    Raises:
        ValueError: `activation` is unknown, `drop` is outside [0, 1], `element_offset` is outside
            [0, 2^62), and what else `batch_norm` raises it for.
        RuntimeError: `residual` has another shape, dtype or device, and what else `batch_norm`
            raises it for.

    The other errors are those of `batch_norm`. A call that raises changes nothing.

    Source: as for `batch_norm` and `dropout`; the order of the chain is that of K. He et al., "Deep
    residual learning", CVPR 2016, with dropout behind it.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        return hand_over(batch_norm_act, locals(), *_TENSORS, "residual", by_place=6)
    name = "batch_norm_act"
    if type(drop) is not float or not 0.0 <= drop <= 1.0:
        drop = probability(name, "drop", drop)
    if type(negative_slope) is not float:
        negative_slope = number(name, "negative_slope", negative_slope)
    if type(element_offset) is not int:
        element_offset = integer(name, "element_offset", element_offset)
    act = activation_number(name, activation)
    given = (
        *(name, input, running_mean, running_var, weight, bias, residual),
        *(training, momentum, eps, act, negative_slope, drop, num_batches_tracked, rng_state),
        *(element_offset, backend),
    )
    if process_group is None:
        return _run(*given)
    return _run(*given, group=_across(name, process_group, input, training))
