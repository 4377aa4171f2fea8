"""BatchNorm and the chain behind it: schema, fakes, gradient, the public functions.

Forward: z = (input - mean) invstd weight + bias (+ residual), output = activation(z) (dropped). For
the backward the graph keeps the inputs, two float64 numbers a channel and, where `has_gate` says
so, one bit an element. Shapes: input [N, C, ...] of M values a channel, channel values [C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _rng
from .._activation import NONE, PIECEWISE_LINEAR, has_gate, needs_preactivation
from .._layout import dense_like, is_channels_last, with_strides
from ..reference import batch_norm as reference
from ..reference.dropout import dropout as reference_dropout
from ._batch_norm_checks import activation_number, check_call, check_drop, values_a_channel
from ._registry import Op, below_autograd, implementation_of, is_transformed, register

SLOPE = 0.01  # of leaky_relu below zero, torch's default

# Schemas, fakes


def _gate_size(x: Tensor) -> int:
    """Bytes of a gate: M bits a channel, rounded up."""
    return x.shape[1] * ((values_a_channel(x) + 7) // 8)


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
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

_FROZEN_REST = 5  # arguments of batch_norm_inference after the residual; the other op has more


class _BatchNorm(torch.autograd.Function):
    """Either forward; its backward is `batch_norm_backward` in the same implementation.

    `rest`, one object to autograd, is what the overload takes after the residual. Of that, a
    frozen forward has its statistics in the first two; a training forward returns its own.
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
        training = len(rest) > _FROZEN_REST
        if training:
            rest = (*rest[:-1], True)  # keep_gate
        with below_autograd():
            outputs = overload(input, weight, bias, residual, *rest)
        if training:
            *tracked, _, _, activation, slope, p, rng_state, _ = rest
            _count_changes(tracked)
            output, *statistics, gate = outputs
            ctx.mark_non_differentiable(*statistics, gate)
            gate = gate if gate.numel() else None
        else:
            running_mean, running_var, eps, activation, slope = rest
            # By value: a later training step may move the running ones before the backward.
            mean = running_mean.to(torch.float64, copy=True)
            statistics = [mean, (running_var.double() + eps).rsqrt()]
            output, gate, p, rng_state = outputs, None, 0.0, None
        needed = needs_preactivation(activation, gate is not None, p)
        ctx.save_for_backward(
            input, weight, bias, residual if needed else None, *statistics, gate, rng_state
        )
        ctx.call = (overload, training, activation, slope, p)
        ctx.strides = output.stride()
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        nothing = (None, None)
        if grad_output is None:
            return (None,) * 4 + nothing
        input, weight, bias, residual, mean, invstd, gate, rng_state = ctx.saved_tensors
        overload, training, *options = ctx.call
        wants_input, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        # The kernels walk all tensors in one order.
        grad_output = with_strides(grad_output, ctx.strides)
        # What hooks bring back of the saved tensors may lie in another one.
        input = with_strides(input, ctx.strides)
        residual = residual if residual is None else with_strides(residual, ctx.strides)
        results = _backward(
            _BACKWARD.overloads[implementation_of(overload)],
            grad_output,
            input,
            weight,
            bias,
            residual,
            mean,
            invstd,
            gate,
            rng_state,
            training,
            *options,
            wants_input,
            wants_weight or wants_bias,
            wants_residual,
        )
        wanted = (wants_input, wants_weight, wants_bias, wants_residual)
        return *(r if w else None for r, w in zip(results, wanted, strict=True)), *nothing


# As in ops/dropout.py: where torch.func is known to be away, without preparing for it.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def _count_changes(tensors: Sequence[Tensor | None]) -> None:
    """Tells autograd that these were written."""
    torch.autograd.graph.increment_version(
        [t for t in tensors if t is not None and not t.is_inference()]
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward(overload: Any, *args: Any) -> Any:
    """A forward op that records its gradient where one is wanted; args as the schema has them."""
    if _wants_gradient(*args[:4]):
        return _BatchNorm.apply(*args[:4], overload, args[4:])
    with below_autograd():
        outputs = overload(*args)
    if len(args) > 4 + _FROZEN_REST:
        _count_changes(args[4:7])
    return outputs


def _backward(overload: Any, *args: Any) -> tuple[Tensor, ...]:
    """The backward op; where its own gradient is wanted, as an expression of torch's."""
    if _wants_gradient(*args[:5]):
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
) -> tuple[Tensor, ...]:
    """The gradients as torch's own derivative of the formula, which it can derive again."""
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


_TRACKED = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"

_TRAINING = register(
    "batch_norm",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    f"{_TRACKED}, float? momentum, float eps, int activation, float slope, float p, "
    "Tensor? rng_state, bool keep_gate) "
    "-> (Tensor output, Tensor mean, Tensor invstd, Tensor gate)",
    fake=_fake,
    reference=reference.batch_norm,
    triton="batch_norm:batch_norm",
    autograd=_forward,
)
_INFERENCE = register(
    "batch_norm_inference",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, "
    "Tensor running_var, float eps, int activation, float slope) -> Tensor",
    fake=_fake_inference,
    reference=reference.batch_norm_inference,
    triton="batch_norm:batch_norm_inference",
    autograd=_forward,
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

# The public functions


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
    check_call(
        *(name, input, running_mean, running_var, weight, bias, residual),
        *(training, momentum, eps, num_batches_tracked),
    )
    device = input.device
    traced = torch.compiler.is_compiling()
    op: Op = _TRAINING if training else _INFERENCE
    overload = (op.traced_overload if traced else op.overload)(device, input.dtype, backend)
    if rng_state is not None:
        rng_state = _rng.checked_state(rng_state, device, name)
    if not training or p == 0.0:
        p, rng_state = 0.0, None
    if input.numel() == 0:
        output = _empty_batch(input, weight, bias, residual, training, num_batches_tracked)
        return reference.activate(output, activation, slope)
    if p > 0.0 and rng_state is None:
        if p == 1.0:  # nothing to draw
            rng_state = torch.zeros(2, dtype=torch.int64, device=device)
        elif traced or is_transformed():
            rng_state = _rng.draw_traced_state(device)
        else:
            rng_state = _rng.draw_state(device)
    if not traced and is_transformed():
        return _by_torch(
            *(input, running_mean, running_var, weight, bias, residual, training),
            *(momentum, eps, activation, slope, p, rng_state, num_batches_tracked),
        )

    if not input.is_contiguous() and not is_channels_last(input):
        input = input.contiguous()
    if residual is not None:
        residual = with_strides(residual, input.stride())
    weight, bias = (v if v is None else v.contiguous() for v in (weight, bias))
    # The kernels write contiguous statistics and an int64; others are copied there and back.
    given = (running_mean, running_var, num_batches_tracked)
    tracked = [v if v is None else v.contiguous() for v in given]
    if num_batches_tracked is not None and num_batches_tracked.dtype != torch.int64:
        tracked[2] = num_batches_tracked.to(torch.int64)
    if training:
        rest: tuple[Any, ...] = (*tracked, momentum, eps, activation, slope, p, rng_state, False)
    else:
        rest = (*tracked[:2], eps, activation, slope)
    values = (input, weight, bias, residual)
    if traced:
        output = overload(*values, *rest)
    elif _wants_gradient(*values):
        output = _apply(*values, overload, rest)
    else:
        output = _forward(overload, *values, *rest)
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
        A tensor like `input`, channels last where that is.

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
        A tensor like `input`, channels last where that is.

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
    check_drop(name, drop)
    number = activation_number(name, activation)
    return _run(
        *(name, *tensors, training, momentum, eps, number, negative_slope, drop),
        *(num_batches_tracked, rng_state, backend),
    )
