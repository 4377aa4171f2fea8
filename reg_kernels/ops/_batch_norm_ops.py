"""BatchNorm and the chain behind it: schemas, fakes, gradient.

Forward: z = (input - mean) invstd weight + bias (+ residual), output = activation(z) (dropped). For
the backward the graph keeps the inputs, two float64 numbers a channel and, where `has_gate` says
so, one bit an element. Shapes: input [N, C, ...] of M values a channel, channel values [C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._activation import PIECEWISE_LINEAR, has_gate, needs_preactivation
from .._layout import dense_like, with_strides
from ..reference import batch_norm as reference
from ..reference.dropout import dropout as reference_dropout
from ._batch_norm_checks import values_a_channel
from ._modes import below_autograd
from ._registry import implementation_of, register, twin_by_numbers

# Schemas, fakes


def _gate_size(x: Tensor) -> int:
    """Bytes of a gate: M bits a channel, rounded up."""
    return x.shape[1] * ((values_a_channel(x) + 7) // 8)


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    tracked: list[Tensor],
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    p: float,
    rng_state: Tensor | None,
    keep_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gated = keep_gate and has_gate(activation, residual is not None, p)
    return (
        dense_like(input),
        input.new_empty(input.shape[1], dtype=torch.float64),
        input.new_empty(input.shape[1], dtype=torch.float64),
        input.new_empty(_gate_size(input) if gated else 0, dtype=torch.uint8),
    )


def _fake_inference(input: Tensor, *rest: Any) -> Tensor:
    return dense_like(input)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gate: Tensor | None,
    rng_state: Tensor | None,
    training: bool,
    activation: int,
    slope: float,
    p: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_residual: bool,
    *numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def parameter(values: Tensor | None) -> Tensor:
        dtype = input.dtype if values is None else values.dtype
        return input.new_empty(input.shape[1] if wants_parameters else 0, dtype=dtype)

    return (
        dense_like(input) if wants_input else input.new_empty(0),
        parameter(weight),
        parameter(bias),
        dense_like(input) if wants_residual else input.new_empty(0),
    )


# Gradient

_INPUTS = 4  # arguments of either forward that have a gradient: input, weight, bias, residual


class _BatchNorm(torch.autograd.Function):
    """Either forward; its backward is `batch_norm_backward` in the same implementation.

    `rest`, one object to autograd, is what the overload takes after the residual: of a training
    forward first the list of what it moves on, else the statistics one by one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        overload: Any,
        rest: tuple[Any, ...],
    ) -> Any:
        ctx.set_materialize_grads(False)
        training = isinstance(rest[0], list)
        if training:
            tracked, momentum, eps, activation, slope, p, rng_state, _, *numbers = rest
            rest = (tracked, momentum, eps, activation, slope, p, rng_state, True, *numbers)
        with below_autograd():
            outputs = overload(input, weight, bias, residual, *rest)
        if training:
            _count_changes(tracked)
            output, *statistics, gate = outputs
            ctx.mark_non_differentiable(*statistics, gate)
            gate = gate if gate.numel() else None
        else:
            running_mean, running_var, eps, activation, slope, *numbers = rest
            # By value: a later training step may move the running ones before the backward.
            mean = running_mean.to(torch.float64, copy=True)
            eps = numbers[0][0] if numbers else eps
            statistics = [mean, (running_var.double() + eps).rsqrt()]
            output, gate, p, rng_state = outputs, None, 0.0, None
        needed = needs_preactivation(activation, gate is not None, p)
        ctx.save_for_backward(
            *(input, weight, bias, residual if needed else None, *statistics, gate, rng_state),
            *numbers,
        )
        ctx.call = (overload, training, activation, slope, p)
        ctx.strides = output.stride()
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        nothing = (None, None)
        if grad_output is None:
            return (None,) * _INPUTS + nothing
        input, weight, bias, residual, mean, invstd, gate, rng_state, *numbers = ctx.saved_tensors
        overload, training, *options = ctx.call
        wants_input, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:_INPUTS]
        op = _BACKWARD_BY_NUMBERS if numbers else _BACKWARD
        # What hooks bring back of the saved tensors may lie in another order than the kernels walk.
        input = with_strides(input, ctx.strides)
        residual = residual if residual is None else with_strides(residual, ctx.strides)
        results = _backward(
            op.overloads[implementation_of(overload)],
            with_strides(grad_output, ctx.strides),  # the kernels walk all tensors in one order
            *(input, weight, bias, residual, mean, invstd, gate, rng_state, training, *options),
            *(wants_input, wants_weight or wants_bias, wants_residual),
            *(x[-2:] for x in numbers),  # the slope and p of either forward
        )
        wanted = (wants_input, wants_weight, wants_bias, wants_residual)
        return *(r if w else None for r, w in zip(results, wanted, strict=True)), *nothing


# As in ops/dropout.py: where torch.func is known to be away, without preparing for it.
apply = super(torch.autograd.Function, _BatchNorm).apply


def _count_changes(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that these were written."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forward(overload: Any, *args: Any) -> Any:
    """A forward op that records its gradient where one is wanted; args as the schema has them."""
    rest = args[_INPUTS:]
    if wants_gradient(*args[:_INPUTS]):
        return _BatchNorm.apply(*args[:_INPUTS], overload, rest)
    with below_autograd():
        outputs = overload(*args)
    if isinstance(rest[0], list):
        _count_changes(rest[0])
    return outputs


def _backward(overload: Any, *args: Any) -> tuple[Tensor, ...]:
    """The backward op; where its own gradient is wanted, as an expression of torch's."""
    if wants_gradient(*args[: 1 + _INPUTS]):
        return _backward_by_torch(overload, *args)
    with below_autograd():
        return overload(*args)


def _backward_by_torch(
    overload: Any,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gate: Tensor | None,
    rng_state: Tensor | None,
    training: bool,
    activation: int,
    slope: float,
    p: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_residual: bool,
    *numbers: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients as torch's own derivative of the formula, which it can derive again."""
    if numbers:
        slope, p = numbers[0].tolist()
        overload = _BACKWARD.overloads[implementation_of(overload)]
    compute = torch.promote_types(input.dtype, torch.float32)
    # Views: one tensor may come in two places, and each wants its own gradient.
    x, w, b = (t if t is None else t.view_as(t) for t in (input, weight, bias))
    r = torch.zeros_like(input).requires_grad_() if residual is None else residual.view_as(residual)
    values, saved = x.to(compute), (mean, invstd)
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        mean = values.mean(dims)
        variance = (values - reference.per_channel(mean, x)).square().mean(dims)
        # Of the value that the forward had, eps included, and with the variance's derivative.
        invstd = (invstd**-2 + (variance - variance.detach())).to(compute).rsqrt()
    z = reference.affine(values, mean.to(compute), invstd.to(compute), w, b) + r.to(compute)
    if activation in PIECEWISE_LINEAR:
        # The derivative is the gradient of ones, a constant almost everywhere.
        ones = torch.ones_like(input)
        with torch.no_grad():
            d = overload(
                *(ones, input, weight, bias, residual, *saved, gate),
                *(rng_state, training, activation, slope, p, False, False, True),
            )[3]
        y = z * d.to(compute)
    else:
        y = reference.activate(z, activation, slope)
        if p > 0.0:
            y = y * reference_dropout(torch.ones_like(input), p, rng_state).to(compute)
    wanted = ((x, wants_input), (w, wants_parameters), (b, wants_parameters), (r, wants_residual))
    sources = [t for t, w in wanted if w and t is not None and t.requires_grad]
    found = torch.autograd.grad(
        y.to(input.dtype), sources, grad_output, create_graph=True, materialize_grads=True
    )
    results = []
    for tensor, _ in wanted:
        index = next((i for i, source in enumerate(sources) if source is tensor), None)
        results.append(input.new_empty(0) if index is None else found[index])
    return tuple(results)


# What a training forward moves on is a list, of tensors alone: [running_mean, running_var], and
# behind them, or by itself, num_batches_tracked.
TRAINING = register(
    "batch_norm",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)[] tracked, "
    "float? momentum, float eps, int activation, float slope, float p, Tensor? rng_state, "
    "bool keep_gate) -> (Tensor output, Tensor mean, Tensor invstd, Tensor gate)",
    fake=_fake,
    reference=reference.batch_norm,
    triton="batch_norm:batch_norm",
    autograd=forward,
)
INFERENCE = register(
    "batch_norm_inference",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, "
    "Tensor running_var, float eps, int activation, float slope) -> Tensor",
    fake=_fake_inference,
    reference=reference.batch_norm_inference,
    triton="batch_norm:batch_norm_inference",
    autograd=forward,
)
_BACKWARD = register(
    "batch_norm_backward",
    "(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor mean, Tensor invstd, Tensor? gate, Tensor? rng_state, bool training, int activation, "
    "float slope, float p, bool wants_input, bool wants_parameters, bool wants_residual) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    fake=_fake_backward,
    reference=reference.batch_norm_backward,
    triton="batch_norm:batch_norm_backward",
    autograd=_backward,
)
TRAINING_BY_NUMBERS = twin_by_numbers(TRAINING)  # momentum, eps, slope, p
INFERENCE_BY_NUMBERS = twin_by_numbers(INFERENCE)  # eps, slope
_BACKWARD_BY_NUMBERS = twin_by_numbers(_BACKWARD)  # slope, p
