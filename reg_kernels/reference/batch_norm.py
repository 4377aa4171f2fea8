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


def batch_norm_moments(input: Tensor) -> Tensor:
    """Count, mean, what the mean has lost by its rounding, and sum of squared deviations of each
    channel, float64 [4, C]; zeros of no values."""
    if input.numel() == 0:
        return input.new_zeros((4, input.shape[1]), dtype=torch.float64)
    x = input.double()
    dims, count = _over_channels(x), x.numel() // x.shape[1]
    mean = x.mean(dims)
    deviation = x - per_channel(mean, x)
    rest = deviation.mean(dims)
    m2 = deviation.square().sum(dims) - count * rest.square()
    rest = torch.where(rest.isfinite(), rest, 0.0)
    return torch.stack([torch.full_like(mean, count), mean, rest, m2.clamp(min=0.0)])


def merged(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations, [C] each, of the moments of all ranks [ranks, 4,
    C], merged in their order. Means are merged as differences from the first one: where they are
    large beside the deviation, that costs them no digits.

    T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """
    count, mean, m2, base = (torch.zeros_like(gathered[0, 0]) for _ in range(4))
    for n, other, rest, other_m2 in gathered:
        base = torch.where(count > 0, base, torch.where(other.isfinite(), other, 0.0))
        other = (other - base) + rest
        share = n / (count + n).clamp(min=1.0)
        # Of a rank of no values the 0 is no mean.
        delta = torch.where((n > 0) & (count > 0), other - mean, 0.0)
        # An infinite mean stays so, as in a sum, and leaves no variance.
        moved = torch.where(delta.isfinite(), mean + delta * share, mean + other)
        mean = torch.where(count > 0, moved, other)
        m2 = m2 + other_m2 + delta * delta * (share * count) + (delta - delta)
        count = count + n
    return count, base + mean, m2


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
    gathered: Tensor | None,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training: (output, mean, invstd, gate), and what is tracked moved on: [running_mean,
    running_var], and behind them, or by itself, num_batches_tracked.

    With momentum None the running statistics become the average over all batches. The statistics
    are those of `gathered`, the moments of all ranks [ranks, 4, C], where there are any; those of a
    single value in all move nothing.
    """
    x = input.double()
    count, mean, m2 = merged(batch_norm_moments(x)[None] if gathered is None else gathered)
    invstd = (m2 / count.clamp(min=1.0) + eps).rsqrt()
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
        for average, batch in zip(running, (mean, m2 / (count - 1.0)), strict=True):
            moved = (1.0 - factor) * average.double() + factor * batch
            average.copy_(torch.where(count > 1.0, moved, average.double()))
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


def _gradient_sums(
    d: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised x, and the sums of d and d times that, [C]."""
    dims = _over_channels(x)
    normalised = (x - per_channel(mean, x)) * per_channel(invstd, x)
    return normalised, d.sum(dims), (d * normalised).sum(dims)


def batch_norm_sums(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gate: Tensor | None,
    activation: int,
    slope: float,
    p: float,
) -> Tensor:
    """The sums of d and of d xhat of each channel, which are the gradients of bias and weight, and
    the number of values: float64 [2 C + 1]."""
    x = input.double()
    z = affine(x, mean, invstd, weight, bias)
    if residual is not None:
        z = z + residual.double()
    d = _behind_activation(grad_output, z, gate, activation, slope, p)
    _, d_sum, projection = _gradient_sums(d, x, mean, invstd)
    return torch.cat([d_sum, projection, d_sum.new_tensor([x.numel() // max(x.shape[1], 1)])])


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
    sums: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of either, [0] where one is not wanted. Ioffe and Szegedy, section 3. In
    training `sums` of all ranks, as of `batch_norm_sums`, take the place of this batch's."""
    x = input.double()
    z = affine(x, mean, invstd, weight, bias)
    if residual is not None:
        z = z + residual.double()
    d = _behind_activation(grad_output, z, gate, activation, slope, p)

    normalised, d_sum, projection = _gradient_sums(d, x, mean, invstd)
    count: Any = x.numel() // max(x.shape[1], 1)
    if sums is not None:
        d_sum, projection, count = *sums[:-1].chunk(2), sums[-1]
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
