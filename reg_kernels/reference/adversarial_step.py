"""One step of an adversarial attack, and the projection back into the ball, in plain PyTorch.

Shapes: adv, grad and clean (N, C, ...), or (N,) and (N, C); step_sizes and radii (N,) or (1,), else
the floats `step_size` and `eps` count; channels (4, C) as scale, inverse, lower and upper, else the
floats `lower` and `upper` count and the others are 1. `scale` turns a difference of inputs into one
of pixels, in which step and radius are counted, and `inverse` that one into the input's again.
"""

from __future__ import annotations

import torch
from torch import Tensor

LINF, L1, L2 = 0, 1, 2


def adversarial_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_sizes: Tensor | None,
    step_size: float,
    radii: Tensor | None,
    eps: float,
    norm: int,
    lower: float,
    upper: float,
    channels: Tensor | None,
) -> None:
    """Writes the stepped batch over adv."""
    if adv.numel() == 0:
        return
    dtype = torch.promote_types(adv.dtype, torch.float32)
    x, g, origin = adv.to(dtype), grad.to(dtype), clean.to(dtype)
    steps = _of_samples(step_sizes, step_size, adv)
    eps_of = _of_samples(radii, eps, adv)
    eps_of = torch.where(eps_of > 0, eps_of, 0.0)
    scale, inverse, least, most = _of_channels(channels, lower, upper, x)
    if norm == LINF:
        reach = eps_of.to(dtype) * inverse
        moved = x + torch.where(g.isnan(), 0.0, g.sgn()) * (steps.to(dtype) * inverse)
        y = torch.minimum(torch.maximum(moved, origin - reach), origin + reach)
    else:
        push = torch.where(g.isfinite(), g * inverse, 0.0)
        length = steps / _norm(push, norm).clamp(min=1e-30)
        push = length.to(dtype) * push
        way = (x - origin) * scale + push
        threshold, factor = _into_the_ball(way, eps_of, norm)
        # A comparison that NaN fails leaves a sample as it is.
        inside = (threshold == 0) & (factor == 1)
        above = way.abs() - threshold.to(dtype)
        kept = way.sgn() * torch.where(above <= 0, 0.0, above)
        back = origin + factor.to(dtype) * kept * inverse
        y = torch.where(inside, x + push * inverse, back)
    y = torch.minimum(torch.maximum(y, least), most)
    y = torch.where(origin.isnan(), origin, y)
    adv.copy_(_rounded(y, clean, eps_of.to(dtype) * inverse if norm == LINF else None))


def _of_samples(values: Tensor | None, otherwise: float, x: Tensor) -> Tensor:
    """Float64, to be broadcast over x."""
    if values is None:
        values = torch.full((1,), otherwise, dtype=torch.float64, device=x.device)
    return values.view(-1, *[1] * (x.dim() - 1))


def _of_channels(
    channels: Tensor | None, lower: float, upper: float, x: Tensor
) -> tuple[Tensor, ...]:
    """Scale, inverse, lower and upper, to be broadcast over x."""
    if channels is None:
        return x.new_tensor([1.0, 1.0, lower, upper]).unbind()
    return channels.view(4, -1, *[1] * (x.dim() - 2)).unbind()


def _samples(x: Tensor) -> Tensor:
    """(N, D) in float64, 0 where it is NaN."""
    return x.double().reshape(len(x), -1).nan_to_num(0.0, torch.inf, -torch.inf)


def _norm(x: Tensor, norm: int) -> Tensor:
    rows = _samples(x)
    sums = rows.abs().sum(1) if norm == L1 else rows.square().sum(1).sqrt()
    return sums.view(-1, *[1] * (x.dim() - 1))


def _into_the_ball(way: Tensor, eps: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    """How each sample of `way` is brought into its ball: what is taken off each magnitude, and what
    the rest is multiplied by."""
    length = _norm(way, norm)
    outside = length > eps
    if norm == L2:
        return torch.zeros_like(length), torch.where(outside, eps / length, 1.0)
    # The largest k magnitudes are left, with sum s_k, for the largest k that leaves them positive:
    # J. Duchi et al., "Efficient projections onto the l1-ball", 2008, figure 1.
    largest = _samples(way).abs().sort(1, descending=True).values
    k = torch.arange(1, largest.shape[1] + 1, device=way.device)
    thresholds = (largest.cumsum(1) - eps.view(-1, 1)) / k
    last = (largest > thresholds).sum(1, keepdim=True).clamp(min=1) - 1
    threshold = thresholds.gather(1, last).view(length.shape)
    return torch.where(outside, threshold, 0.0), torch.ones_like(length)


def _rounded(y: Tensor, clean: Tensor, most: Tensor | None) -> Tensor:
    """y in clean's dtype: to nearest, but for 16 bits to the next number towards clean where the
    nearest is further from it than `most` or, without that, than y."""
    rounded = y.to(clean.dtype)
    if clean.dtype.itemsize != 2:
        return rounded
    origin = clean.to(y.dtype)
    most = (y - origin).abs() if most is None else most
    bits, target = (x.view(torch.int16).int() for x in (rounded, clean))
    bits, target = (torch.where(x < 0, -(x & 0x7FFF), x) for x in (bits, target))
    bits = bits + (target - bits).sgn()
    bits = torch.where(bits < 0, -bits - 0x8000, bits).to(torch.int16)
    is_far = (rounded.to(y.dtype) - origin).abs() > most
    return torch.where(is_far, bits.view(clean.dtype), rounded)
