"""BatchNorm, and the chain BatchNorm, residual, activation, dropout, in plain PyTorch.

S. Ioffe, C. Szegedy, "Batch normalization: accelerating deep network training by reducing internal
covariate shift", ICML 2015, algorithm 1; running averages by torch's momentum.

Everything is computed in float64 and rounded once. Shapes: input [N, C, ...], channel values [C], M
values a channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dropout

NONE, RELU, LEAKY_RELU, SILU, GELU = range(5)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] as a view that broadcasts against [N, C, ...]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _over_channels(x: Tensor) -> list[int]:
    """The dimensions that a channel's values lie in."""
    return [d for d in range(x.dim()) if d != 1]


def affine(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(x - mean) invstd weight + bias, in x's dtype; differentiable."""
    y = (x - per_channel(mean, x)) * per_channel(invstd, x)
    if weight is not None:
        y = y * per_channel(weight.to(y.dtype), x)
    if bias is not None:
        y = y + per_channel(bias.to(y.dtype), x)
    return y


def activate(z: Tensor, activation: int, slope: float) -> Tensor:
    """The activation that a number of `_activation.py` stands for; differentiable."""
    if activation == RELU:
        return F.relu(z)
    if activation == LEAKY_RELU:
        return F.leaky_relu(z, slope)
    if activation == SILU:
        return F.silu(z)
    if activation == GELU:
        return F.gelu(z)
    return z


def activation_derivative(z: Tensor, activation: int, slope: float) -> Tensor:
    """d activate / d z, relu's apart, whose gradient is chosen and not multiplied; at 0 that from
    below, as torch takes it."""
    if activation == LEAKY_RELU:
        return torch.where(z > 0, torch.ones_like(z), slope)
    if activation == SILU:
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    if activation == GELU:
        density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
        return torch.special.ndtr(z) + z * density
    return torch.ones_like(z)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(biased variance + eps) of each channel, [C]; differentiable."""
    dims = _over_channels(x)
    mean = x.mean(dims)
    variance = (x - per_channel(mean, x)).square().mean(dims)
    return mean, (variance + eps).rsqrt()


def _multipliers(like: Tensor, p: float, rng_state: Tensor | None, element_offset: int) -> Tensor:
    """What dropout multiplies the elements of `like` by, drawn in its storage order."""
    if rng_state is None:
        return torch.ones_like(like)
    return dropout.dropout(torch.ones_like(like), p, rng_state, element_offset)


def _pack(bits: Tensor, size: int) -> Tensor:
    """Booleans as uint8 [size], eight to a byte, zeros behind them."""
    padded = torch.zeros(8 * size, dtype=torch.int64, device=bits.device)
    padded[: bits.numel()] = bits.reshape(-1)
    powers = 2 ** torch.arange(8, device=bits.device)
    return (padded.view(size, 8) * powers).sum(1).to(torch.uint8)


def _unpack(gate: Tensor, shape: torch.Size) -> Tensor:
    powers = torch.arange(8, device=gate.device)
    bits = (gate.view(-1, 1).to(torch.int64) >> powers) & 1
    return bits.reshape(-1)[: shape.numel()].view(shape).bool()


def _gate_bytes(x: Tensor) -> int:
    channels = x.shape[1]
    return channels * -(-(x.numel() // channels) // 8)


def batch_norm(
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
    element_offset: int,
    keep_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training: (output, mean, invstd, gate), and what is tracked moved on: [running_mean,
    running_var], and behind them, or by itself, num_batches_tracked.

    With momentum None the running statistics become the average over all batches.
    """
    x = input.double()
    mean, invstd = statistics(x, eps)
    z = affine(x, mean, invstd, weight, bias)
    if residual is not None:
        z = z + residual.double()
    multipliers = _multipliers(z, p, rng_state, element_offset)
    output = torch.empty_like(input).copy_(activate(z, activation, slope) * multipliers)

    running = tracked[:2] if len(tracked) > 1 else []
    counter = tracked[-1] if len(tracked) % 2 else None
    if running:
        factor: Any = momentum
        if counter is not None and momentum is None:
            factor = 1.0 / (counter.double() + 1.0)
        dims = _over_channels(x)
        variance = (x - per_channel(mean, x)).square().sum(dims) / (x.numel() // x.shape[1] - 1)
        for average, batch in zip(running, (mean, variance), strict=True):
            average.copy_((1.0 - factor) * average.double() + factor * batch)
    if counter is not None:
        counter.add_(1)

    gate = input.new_empty(0, dtype=torch.uint8)
    dropped = p > 0.0
    if keep_gate and (dropped or (residual is not None and activation in (RELU, LEAKY_RELU))):
        kept = multipliers != 0
        if activation == RELU:
            kept = kept & ~(z <= 0)
        elif activation == LEAKY_RELU and not dropped:
            kept = z > 0
        gate = _pack(kept, _gate_bytes(input))
    return output, mean, invstd, gate


def batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: int,
    slope: float,
) -> Tensor:
    """The same with frozen statistics and without dropout."""
    invstd = (running_var.double() + eps).rsqrt()
    z = affine(input.double(), running_mean.double(), invstd, weight, bias)
    if residual is not None:
        z = z + residual.double()
    return torch.empty_like(input).copy_(activate(z, activation, slope))


def _behind_activation(
    grad_output: Tensor,
    z: Tensor,
    gate: Tensor | None,
    activation: int,
    slope: float,
    p: float,
) -> Tensor:
    """dL/dz in float64."""
    g = grad_output.double()
    bits = None if gate is None else _unpack(gate, z.shape)
    scale = dropout.rate(p)[1]
    if bits is not None:
        if activation == RELU:
            return torch.where(bits, g * scale, 0.0)
        if activation == LEAKY_RELU and p == 0.0:
            return torch.where(bits, g, g * slope)
        g = g * (bits.double() * scale)
    if activation == RELU:
        return torch.where(z <= 0, 0.0, g)
    return g * activation_derivative(z, activation, slope)


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gate: Tensor | None,
    rng_state: Tensor | None,
    element_offset: int,
    training: bool,
    activation: int,
    slope: float,
    p: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of either, [0] where one is not wanted. Ioffe and Szegedy, section 3."""
    x = input.double()
    z = affine(x, mean, invstd, weight, bias)
    if residual is not None:
        z = z + residual.double()
    d = _behind_activation(grad_output, z, gate, activation, slope, p)

    dims, count = _over_channels(x), x.numel() // max(x.shape[1], 1)
    normalised = (x - per_channel(mean, x)) * per_channel(invstd, x)
    d_sum, projection = d.sum(dims), (d * normalised).sum(dims)
    scale = invstd if weight is None else invstd * weight.double()
    grad = d
    if training:
        grad = d - per_channel(d_sum / count, x) - normalised * per_channel(projection / count, x)

    def result(wanted: bool, value: Tensor, like: Tensor | None) -> Tensor:
        dtype = input.dtype if like is None else like.dtype
        if not wanted:
            return input.new_empty(0, dtype=dtype)
        shape = input if value.dim() > 1 else value
        return torch.empty_like(shape, dtype=dtype).copy_(value)

    return (
        result(wants_input, grad * per_channel(scale, x), input),
        result(wants_parameters, projection, weight),
        result(wants_parameters, d_sum, bias),
        result(wants_residual, d, input),
    )
