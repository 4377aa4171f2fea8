"""BatchNorm and the chain behind it: schemas, fakes, gradient.

Forward: z = (input - mean) invstd weight + bias (+ residual), output = activation(z) (dropped). For
the backward the graph keeps the inputs, two float64 numbers a channel and, where `has_gate` says
so, one bit an element. Shapes: input [N, C, ...] of M values a channel, channel values [C].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._activation import PIECEWISE_LINEAR, has_gate, needs_preactivation
from .._dtypes import computed_in
from .._layout import dense_like, with_strides
from .._tracked import Tracked
from ..reference import batch_norm as reference
from ..reference.dropout import dropout as reference_dropout
from ._batch_norm_checks import (
    check_backward,
    check_inference,
    check_moments,
    check_sums,
    check_training,
    values_a_channel,
)
from ._collectives import summed
from ._modes import below_autograd
from ._registry import register, register_by_numbers
from ._route import Route, in_order

# Schemas and fakes. Each form of the op has a NamedTuple for the arguments behind its values, with
# the names of its schema.

_VALUES = "Tensor input, Tensor? weight, Tensor? bias, Tensor? residual"  # they have a gradient


class Training(NamedTuple):
    """The arguments of a training forward behind its values.

    `tracked` lists the tensors that it updates, as Tracked.of takes them.
    """

    tracked: list[Tensor]
    momentum: float | None
    eps: float
    activation: int
    slope: float
    p: float
    rng_state: Tensor | None
    element_offset: int
    keep_gate: bool
    gathered: Tensor | None = None  # [ranks, 4, C], the moments of all ranks of the group
    group: str | None = None


_PLACES = len(Training._fields)
_TRAINING = (
    f"{_VALUES}, Tensor(a!)[] tracked, float? momentum, float eps, int activation, float slope, "
    "float p, Tensor? rng_state, int element_offset, bool keep_gate, Tensor? gathered, str? group"
)


class Inference(NamedTuple):
    """The arguments of an inference behind its values."""

    running_mean: Tensor
    running_var: Tensor
    eps: float
    activation: int
    slope: float


_INFERENCE = (
    f"{_VALUES}, Tensor running_mean, Tensor running_var, float eps, int activation, float slope"
)


class Backward(NamedTuple):
    """The arguments of the backward of either."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mean: Tensor
    invstd: Tensor
    gate: Tensor | None
    rng_state: Tensor | None
    element_offset: int
    training: bool
    activation: int
    slope: float
    p: float
    wants_input: bool
    wants_parameters: bool
    wants_residual: bool
    sums: Tensor | None = None  # of all ranks, as of batch_norm_sums
    numbers: Tensor | None = None  # only the op by numbers has them


_BACKWARD_ARGUMENTS = (
    f"Tensor grad_output, {_VALUES}, Tensor mean, Tensor invstd, Tensor? gate, Tensor? rng_state, "
    "int element_offset, bool training, int activation, float slope, float p, bool wants_input, "
    "bool wants_parameters, bool wants_residual, Tensor? sums"
)


_SUMS = (
    f"Tensor grad_output, {_VALUES}, Tensor mean, Tensor invstd, Tensor? gate, int activation, "
    "float slope, float p"
)


def _gate_size(x: Tensor) -> int:
    """Bytes of a gate: M bits a channel, rounded up."""
    return x.shape[1] * ((values_a_channel(x) + 7) // 8)


def _fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = Training(*rest)
    gated = how.keep_gate and has_gate(how.activation, residual is not None, how.p)
    return (
        dense_like(input),
        input.new_empty(input.shape[1], dtype=torch.float64),
        input.new_empty(input.shape[1], dtype=torch.float64),
        input.new_empty(_gate_size(input) if gated else 0, dtype=torch.uint8),
    )


def _fake_inference(input: Tensor, *rest: Any) -> Tensor:
    return dense_like(input)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = Backward(*arguments)
    input = a.input

    def parameter(values: Tensor | None) -> Tensor:
        dtype = input.dtype if values is None else values.dtype
        return input.new_empty(input.shape[1] if a.wants_parameters else 0, dtype=dtype)

    return (
        dense_like(input) if a.wants_input else input.new_empty(0),
        parameter(a.weight),
        parameter(a.bias),
        dense_like(input) if a.wants_residual else input.new_empty(0),
    )


def _fake_moments(input: Tensor) -> Tensor:
    return input.new_empty((4, input.shape[1]), dtype=torch.float64)


def _fake_sums(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty(2 * input.shape[1] + 1, dtype=torch.float64)


# Gradient


def _train(
    ctx: Any, call: tuple[Any, ...], values: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """The op's results; keeps what a backward needs."""
    route, overload, rest = call
    how, numbers = Training(*rest[:_PLACES]), rest[_PLACES:]
    if how.gathered is not None and how.group is None:
        raise RuntimeError("batch_norm: group must be given where gathered is, for the gradient")
    with below_autograd():
        # Only a gradient needs a gate, so one is kept here, whatever the call says.
        outputs = overload._op(*values, *how._replace(keep_gate=True), *numbers)
    route.count_changes(values, rest)
    output, mean, invstd, gate = outputs
    # Not by its size: that of an empty rank, whose backward goes as the others' do, has no bytes.
    gated = has_gate(how.activation, values[3] is not None, how.p)
    gate = gate if gated else None
    tensors = (mean, invstd, gate, how.rng_state, *numbers)
    rest = (how.element_offset, True, how.activation, how.slope, how.p)
    _keep(ctx, call, values, output, tensors, rest, how.group)
    return outputs


class _BatchNormTraining(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *values: Tensor | None) -> Any:
        outputs = _train(ctx, call, values)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad_output is None:
            return None, None, None, None, None
        input, weight, bias, residual, mean, invstd, gate, rng_state, *numbers = ctx.saved_tensors
        overload, backward, strides, how, group = ctx.call
        _, wants_input, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad
        values = (
            with_strides(grad_output, strides),  # the kernels walk all in one order
            # Hooks may bring the saved tensors back in another order.
            with_strides(input, strides),
            weight,
            bias,
            None if residual is None else with_strides(residual, strides),
        )
        wants = (wants_input, wants_weight or wants_bias, wants_residual)
        if numbers:
            numbers = [numbers[0][-2:]]  # slope and p, of either forward
        if group is not None:
            statistics = (mean, invstd, gate)
            results = _across_ranks(overload, group, values, statistics, how, wants, numbers)
        else:
            rest = (mean, invstd, gate, rng_state, *how, *wants, None, *numbers)
            results = backward.run_like(overload, values, rest)
        of_input, of_weight, of_bias, of_residual = results
        return (
            None,
            of_input if wants_input else None,
            of_weight if wants_weight else None,
            of_bias if wants_bias else None,
            of_residual if wants_residual else None,
        )


def _across_ranks(
    overload: Any,
    group: str,
    values: tuple[Tensor | None, ...],
    statistics: tuple[Tensor | None, ...],
    how: tuple[Any, ...],
    wants: tuple[bool, bool, bool],
    numbers: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of a batch that is a part of all ranks': sums of it, of all, and one pass.
    Those of weight and bias are this rank's, as torch's; DistributedDataParallel averages them."""
    input: Any
    _, input, weight, bias, _ = values
    wants_input, wants_parameters, wants_residual = wants
    of_sums, of_backward = (_SUMS_BY_NUMBERS, _BACKWARD_BY_NUMBERS) if numbers else (SUMS, BACKWARD)
    own = reduced = of_weight = of_bias = None
    if wants_input or wants_parameters:
        own = of_sums.run_like(overload, values, (*statistics, *how[2:], *numbers))
    if own is not None and wants_input:
        reduced = summed(own, group)
    of_input = of_residual = None
    if wants_input or wants_residual:
        rest = (*statistics, None, *how, wants_input, False, wants_residual, reduced, *numbers)
        of_input, _, _, of_residual = of_backward.run_like(overload, values, rest)
    if own is not None:
        of_bias, of_weight = own[:-1].chunk(2)
        of_weight = of_weight.to((input if weight is None else weight).dtype)
        of_bias = of_bias.to((input if bias is None else bias).dtype)
    return of_input, of_weight, of_bias, of_residual


class _BatchNormAlone(_BatchNormTraining):
    """The same for an eager call, which wants the output alone: each result takes a microsecond."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *values: Tensor | None) -> Any:
        return _train(ctx, call, values)[:1]


class _BatchNormInference(_BatchNormTraining):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *values: Tensor | None) -> Tensor:
        _, overload, rest = call
        with below_autograd():
            output = overload._op(*values, *rest)
        running_mean, running_var, eps, activation, slope, *numbers = rest
        # Copies: a later training step may update the running ones before the backward.
        mean = running_mean.to(torch.float64, copy=True)
        invstd = (running_var.double() + (numbers[0][0] if numbers else eps)).rsqrt()
        tensors = (mean, invstd, None, None, *numbers)
        _keep(ctx, call, values, output, tensors, (0, False, activation, slope, 0.0))
        return output


def _keep(
    ctx: Any,
    call: tuple[Any, ...],
    values: tuple[Tensor | None, ...],
    output: Tensor,
    tensors: tuple[Tensor | None, ...],
    how: tuple[Any, ...],
    group: str | None = None,
) -> None:
    """Keeps what a backward needs: the tensors, and the arguments that it takes behind them."""
    ctx.set_materialize_grads(False)
    route, overload, _ = call
    input, weight, bias, residual = values
    _, _, activation, _, p = how
    if not needs_preactivation(activation, tensors[2] is not None, p):
        residual = None
    ctx.save_for_backward(input, weight, bias, residual, *tensors)
    ctx.call = (overload, route.backward, output.stride(), how, group)


# The formulas, by operations that torch.func and forward mode can transform, unfused.


def _training_by_torch(overload: Any, *arguments: Any) -> tuple[Tensor]:
    input, weight, bias, residual, *rest = arguments
    how = Training(*rest)
    running_mean, running_var, counter = Tracked.of(how.tracked)
    momentum = how.momentum
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / float(counter + 1)
    y = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, how.eps)
    if counter is not None:
        counter.add_(1)
    y = reference.activate(y if residual is None else y + residual, how.activation, how.slope)
    if how.rng_state is not None:
        ones = torch.ones_like(in_order(input, None))  # by whose order the kernels draw
        y = y * reference_dropout(ones, how.p, how.rng_state, how.element_offset)
    return (y,)


def _core_batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """F.batch_norm of an evaluation, as the one operation of core ATen, without a gradient."""
    op = torch.ops.aten._native_batch_norm_legit_no_training
    return op(x, weight, bias, mean, var, momentum, eps)[0]


def _inference_by_torch(overload: Any, *arguments: Any, batch_norm: Any = F.batch_norm) -> Tensor:
    input, weight, bias, residual, *rest = arguments
    how = Inference(*rest)
    compute = computed_in(input.dtype)
    of_channels = (
        None if values is None else values.to(compute)
        for values in (how.running_mean, how.running_var, weight, bias)
    )
    y = batch_norm(input.to(compute), *of_channels, False, 0.0, how.eps)
    if residual is not None:
        y = y + residual.to(compute)
    return reference.activate(y, how.activation, how.slope).to(input.dtype)


def _refuse_second(*arguments: Any) -> Any:
    raise RuntimeError(
        "batch_norm: the gradient across ranks has no gradient of its own: call backward without "
        "create_graph, or leave process_group out"
    )


def _backward_by_torch(overload: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients as torch's own derivative of the formula, which it can derive again."""
    a: Any = Backward(*arguments)
    if a.sums is not None:
        _refuse_second()
    if a.numbers is not None:
        slope, p = a.numbers.tolist()
        a = a._replace(slope=slope, p=p, numbers=None)
        overload = BACKWARD.like(overload)
    input = a.input
    compute = computed_in(input.dtype)
    # Views: one tensor may come in two places, and each wants its own gradient.
    x: Any
    x, w, b = (t if t is None else t.view_as(t) for t in (input, a.weight, a.bias))
    r = (
        torch.zeros_like(input).requires_grad_()
        if a.residual is None
        else a.residual.view_as(input)
    )
    values, mean, invstd = x.to(compute), a.mean, a.invstd
    if a.training:
        dims = [d for d in range(x.dim()) if d != 1]
        mean = values.mean(dims)
        variance = (values - reference.per_channel(mean, x)).square().mean(dims)
        # It has the forward's value, eps included, and the variance's derivative.
        invstd = (invstd**-2 + (variance - variance.detach())).to(compute).rsqrt()
    z = reference.affine(values, mean.to(compute), invstd.to(compute), w, b) + r.to(compute)
    if a.activation in PIECEWISE_LINEAR:
        # The derivative is the gradient of ones, a constant almost everywhere.
        of_ones = a._replace(
            grad_output=torch.ones_like(input),
            wants_input=False,
            wants_parameters=False,
            wants_residual=True,
        )
        with torch.no_grad():
            d = overload(*of_ones[:-1])[3]  # all but the numbers
        y = z * d.to(compute)
    else:
        y = reference.activate(z, a.activation, a.slope)
        if a.p > 0.0:
            ones = torch.ones_like(input)
            mask = reference_dropout(ones, a.p, a.rng_state, a.element_offset)
            y = y * mask.to(compute)
    wanted = (
        *((x, a.wants_input), (w, a.wants_parameters), (b, a.wants_parameters)),
        (r, a.wants_residual),
    )
    sources = [t for t, w in wanted if w and t is not None and t.requires_grad]
    found = torch.autograd.grad(
        *(y.to(input.dtype), sources, a.grad_output), create_graph=True, materialize_grads=True
    )
    results = []
    for tensor, _ in wanted:
        index = next((i for i, source in enumerate(sources) if source is tensor), None)
        results.append(input.new_empty(0) if index is None else found[index])
    return tuple(results)


BACKWARD = register(
    "batch_norm_backward",
    f"({_BACKWARD_ARGUMENTS}) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    fake=_fake_backward,
    reference=reference.batch_norm_backward,
    triton="batch_norm:batch_norm_backward",
    route=Route(5, by_torch=_backward_by_torch),
    check=check_backward,
)
SUMS = register(
    "batch_norm_sums",
    f"({_SUMS}) -> Tensor",
    fake=_fake_sums,
    reference=reference.batch_norm_sums,
    triton="batch_norm:batch_norm_sums",
    route=Route(5, by_torch=_refuse_second),
    check=check_sums,
)
_SUMS_BY_NUMBERS = register_by_numbers(SUMS, "slope", "p")
MOMENTS = register(
    "batch_norm_moments",
    "(Tensor input) -> Tensor",
    fake=_fake_moments,
    reference=reference.batch_norm_moments,
    triton="batch_norm:batch_norm_moments",
    route=Route(0),
    check=check_moments,
)
_BACKWARD_BY_NUMBERS = register_by_numbers(BACKWARD, "slope", "p")
TRAINING = register(
    "batch_norm",
    f"({_TRAINING}) -> (Tensor output, Tensor mean, Tensor invstd, Tensor gate)",
    fake=_fake,
    reference=reference.batch_norm,
    triton="batch_norm:batch_norm",
    route=Route(
        inputs=4,
        graph=_BatchNormTraining,
        eager=_BatchNormAlone,
        by_torch=_training_by_torch,
        backward=BACKWARD,
        moves=lambda values, rest: rest[0],
    ),
    check=check_training,
)
TRAINING_BY_NUMBERS = register_by_numbers(
    TRAINING, "momentum", "eps", "slope", "p", backward=_BACKWARD_BY_NUMBERS
)
INFERENCE = register(
    "batch_norm_inference",
    f"({_INFERENCE}) -> Tensor",
    fake=_fake_inference,
    reference=reference.batch_norm_inference,
    triton="batch_norm:batch_norm_inference",
    route=Route(
        inputs=4,
        graph=_BatchNormInference,
        by_torch=_inference_by_torch,
        backward=BACKWARD,
        in_evaluation=functools.partial(_inference_by_torch, batch_norm=_core_batch_norm),
    ),
    check=check_inference,
)
INFERENCE_BY_NUMBERS = register_by_numbers(INFERENCE, "eps", "slope", backward=_BACKWARD_BY_NUMBERS)
