"""BatchNorm and the chain behind it: schemas, fakes, gradient.

Forward: z = (input - mean) invstd weight + bias (+ residual), output = activation(z) (dropped). For
the backward the graph keeps the inputs, two float64 numbers a channel and, where `has_gate` says
so, one bit an element. Shapes: input [N, C, ...] of M values a channel, channel values [C].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._activation import PIECEWISE_LINEAR, has_gate, needs_preactivation
from .._layout import dense_like, with_strides
from ..reference import batch_norm as reference
from ..reference.dropout import dropout as reference_dropout
from ._batch_norm_checks import check_backward, check_inference, check_training, values_a_channel
from ._modes import below_autograd
from ._registry import register, register_by_numbers
from ._route import count_changes, wants_gradient, without_functorch

# Schemas, fakes. What a form of the op takes behind its values has one name from here to the
# kernel, with the names of its schema.

_VALUES = "Tensor input, Tensor? weight, Tensor? bias, Tensor? residual"  # what has a gradient


class Training(NamedTuple):
    """What a training forward takes behind its values.

    `tracked` is what it moves on, of tensors alone: [running_mean, running_var], and behind them,
    or by itself, num_batches_tracked.
    """

    tracked: list[Tensor]
    momentum: float | None
    eps: float
    activation: int
    slope: float
    p: float
    rng_state: Tensor | None
    keep_gate: bool = False


_TRAINING = (
    f"{_VALUES}, Tensor(a!)[] tracked, float? momentum, float eps, int activation, float slope, "
    "float p, Tensor? rng_state, bool keep_gate"
)


class Inference(NamedTuple):
    """What an inference takes behind its values."""

    running_mean: Tensor
    running_var: Tensor
    eps: float
    activation: int
    slope: float


_INFERENCE = (
    f"{_VALUES}, Tensor running_mean, Tensor running_var, float eps, int activation, float slope"
)


class Backward(NamedTuple):
    """What the backward of either takes."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mean: Tensor
    invstd: Tensor
    gate: Tensor | None
    rng_state: Tensor | None
    training: bool
    activation: int
    slope: float
    p: float
    wants_input: bool
    wants_parameters: bool
    wants_residual: bool


_BACKWARD_ARGUMENTS = (
    f"Tensor grad_output, {_VALUES}, Tensor mean, Tensor invstd, Tensor? gate, Tensor? rng_state, "
    "bool training, int activation, float slope, float p, bool wants_input, bool wants_parameters, "
    "bool wants_residual"
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


# Gradient


def _called(overload: Any, arguments: tuple[Any, ...], numbers: Tensor | None) -> Any:
    """The result of an overload, or of one by numbers."""
    with below_autograd():
        return overload(*arguments) if numbers is None else overload(*arguments, numbers)


class _BatchNorm(torch.autograd.Function):
    """Either forward, of which `how` tells, a training one with `keep_gate`; its backward is
    `batch_norm_backward` in the same implementation."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        overload: Any,
        how: Any,  # Training or Inference
        numbers: Tensor | None,
    ) -> Any:
        ctx.set_materialize_grads(False)
        training = isinstance(how, Training)
        outputs = _called(overload, (input, weight, bias, residual, *how), numbers)
        if training:
            count_changes(*how.tracked)
            output, *statistics, gate = outputs
            ctx.mark_non_differentiable(*statistics, gate)
            gate = gate if gate.numel() else None
            p, rng_state = how.p, how.rng_state
        else:
            # By value: a later training step may move the running ones before the backward.
            mean = how.running_mean.to(torch.float64, copy=True)
            eps = how.eps if numbers is None else numbers[0]
            statistics = [mean, (how.running_var.double() + eps).rsqrt()]
            output, gate, p, rng_state = outputs, None, 0.0, None
        needed = needs_preactivation(how.activation, gate is not None, p)
        ctx.save_for_backward(
            *(input, weight, bias, residual if needed else None, *statistics, gate, rng_state),
            numbers,
        )
        ctx.call = (overload, training, how.activation, how.slope, p)
        ctx.strides = output.stride()
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        nothing = (None, None, None)
        if grad_output is None:
            return (None, None, None, None, *nothing)
        input, weight, bias, residual, mean, invstd, gate, rng_state, numbers = ctx.saved_tensors
        overload, training, activation, slope, p = ctx.call
        wants_input, wants_weight, wants_bias, wants_residual, *_ = ctx.needs_input_grad
        op = _BACKWARD if numbers is None else _BACKWARD_BY_NUMBERS
        a = Backward(
            with_strides(grad_output, ctx.strides),  # the kernels walk all tensors in one order
            # What hooks bring back of the saved tensors may lie in another order.
            with_strides(input, ctx.strides),
            weight,
            bias,
            None if residual is None else with_strides(residual, ctx.strides),
            *(mean, invstd, gate, rng_state, training, activation, slope, p),
            wants_input,
            wants_weight or wants_bias,
            wants_residual,
        )
        slope_and_p = None if numbers is None else numbers[-2:]  # of either forward
        results = _backward(op.like(overload), a, slope_and_p)
        wanted = (wants_input, wants_weight, wants_bias, wants_residual)
        return *(r if w else None for r, w in zip(results, wanted, strict=True)), *nothing


apply = without_functorch(_BatchNorm)


def forward(
    kind: Callable[..., Training | Inference],
    overload: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
    numbers: Tensor | None = None,
) -> Any:
    """Either forward, `rest` being what its `kind` holds, above its implementation."""
    values, how = (input, weight, bias, residual), kind(*rest)
    if wants_gradient(*values):
        if isinstance(how, Training):
            how = how._replace(keep_gate=True)
        return _BatchNorm.apply(*values, overload, how, numbers)
    return run(overload, values, how, numbers)


def run(
    overload: Any,
    values: tuple[Tensor | None, ...],
    how: Training | Inference,
    numbers: Tensor | None,
) -> Any:
    """Either forward without a gradient."""
    outputs = _called(overload, (*values, *how), numbers)
    if isinstance(how, Training):
        count_changes(*how.tracked)
    return outputs


def _above_backward(overload: Any, *arguments: Any, numbers: Tensor | None = None) -> Any:
    """The backward above its implementation."""
    return _backward(overload, Backward(*arguments), numbers)


def _backward(overload: Any, a: Backward, numbers: Tensor | None) -> Any:
    if wants_gradient(a.grad_output, a.input, a.weight, a.bias, a.residual):
        return _backward_by_torch(overload, a, numbers)
    return _called(overload, a, numbers)


def _backward_by_torch(overload: Any, a: Any, numbers: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients as torch's own derivative of the formula, which it can derive again."""
    if numbers is not None:
        slope, p = numbers.tolist()
        a = a._replace(slope=slope, p=p)
        overload = _BACKWARD.like(overload)
    input = a.input
    compute = torch.promote_types(input.dtype, torch.float32)
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
        # Of the value that the forward had, eps included, and with the variance's derivative.
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
            d = overload(*of_ones)[3]
        y = z * d.to(compute)
    else:
        y = reference.activate(z, a.activation, a.slope)
        if a.p > 0.0:
            y = y * reference_dropout(torch.ones_like(input), a.p, a.rng_state).to(compute)
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


_FORWARD_RETURNS = "(Tensor output, Tensor mean, Tensor invstd, Tensor gate)"
_BACKWARD_RETURNS = (
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
)
TRAINING = register(
    "batch_norm",
    f"({_TRAINING}) -> {_FORWARD_RETURNS}",
    fake=_fake,
    reference=reference.batch_norm,
    triton="batch_norm:batch_norm",
    autograd=functools.partial(forward, Training),
    check=check_training,
)
INFERENCE = register(
    "batch_norm_inference",
    f"({_INFERENCE}) -> Tensor",
    fake=_fake_inference,
    reference=reference.batch_norm_inference,
    triton="batch_norm:batch_norm_inference",
    autograd=functools.partial(forward, Inference),
    check=check_inference,
)
_BACKWARD = register(
    "batch_norm_backward",
    f"({_BACKWARD_ARGUMENTS}) -> {_BACKWARD_RETURNS}",
    fake=_fake_backward,
    reference=reference.batch_norm_backward,
    triton="batch_norm:batch_norm_backward",
    autograd=_above_backward,
    check=check_backward,
)
TRAINING_BY_NUMBERS = register_by_numbers(
    TRAINING,
    f"({_TRAINING}, Tensor numbers) -> {_FORWARD_RETURNS}",
    *("momentum", "eps", "slope", "p"),
)
INFERENCE_BY_NUMBERS = register_by_numbers(
    INFERENCE, f"({_INFERENCE}, Tensor numbers) -> Tensor", "eps", "slope"
)
_BACKWARD_BY_NUMBERS = register_by_numbers(
    _BACKWARD,
    f"({_BACKWARD_ARGUMENTS}, Tensor numbers) -> {_BACKWARD_RETURNS}",
    *("slope", "p"),
)
