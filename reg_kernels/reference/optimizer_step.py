"""The optimizer step of AdamW, Adam, SGDW and SGD, in plain PyTorch, one tensor after the other.

D. Kingma, J. Ba, "Adam", ICLR 2015; I. Loshchilov, F. Hutter, "Decoupled weight decay
regularization", ICLR 2019; S. Reddi et al., "On the convergence of Adam and beyond", ICLR 2018
(amsgrad); N. Parikh, S. Boyd, "Proximal algorithms", 2014, section 6.5.2 (soft threshold).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._philox import half_words, tag

_TAG = tag("rounding")
_ADAM, _AVERAGE = 0, 2
_DECOUPLED_LR, _L2 = 1, 2
_STOCHASTIC = 1
_GROUP_NUMBERS, _EMA_DECAY = 8, 7
_MAXIMIZE, _NESTEROV, _RATE_ON_DEVICE = 4, 8, 16  # flags, above the two bits of the decay


def optimizer_step_(
    algorithm: int,  # 0: Adam, 1: SGD, 2: only the average of parameters that have no gradient
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    max_second_moments: list[Tensor],
    emas: list[Tensor],
    compensations: list[Tensor],
    groups: list[int],
    element_offsets: list[int],
    runs: list[int],
    run_strides: list[int],
    numbers: list[float],
    flags: list[int],
    rates: list[Tensor],
    rounding: int,
    squares: Tensor | None,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rng_state: Tensor | None,
) -> None:
    """Updates `params` and all of their state in place, or nothing where `found_inf` is set."""
    if found_inf is not None and float(found_inf) != 0:
        return
    if algorithm == _AVERAGE:
        for param, ema, group in zip(params, emas, groups, strict=True):
            rest = 1 - numbers[_GROUP_NUMBERS * group + _EMA_DECAY]
            ema += rest * (param.to(ema.dtype) - ema)
        return
    factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    if squares is not None:
        norm = float(squares.sum()) ** 0.5 * factor
        factor *= clip_factor(norm, max_norm)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        group = groups[i]
        of_group = numbers[_GROUP_NUMBERS * group : _GROUP_NUMBERS * (group + 1)]
        lr, decay_lr, weight_decay, l1, beta1, beta2, eps, ema_decay = of_group
        if flags[group] & _RATE_ON_DEVICE:
            lr = float(rates[sum(1 for f in flags[:group] if f & _RATE_ON_DEVICE)])
        decay, maximize = flags[group] & 3, flags[group] & _MAXIMIZE
        rate = lr / decay_lr if decay == _DECOUPLED_LR else lr
        step = 1.0
        if steps:
            steps[i] += 1
            step = float(steps[i])

        compute = torch.promote_types(param.dtype, torch.float32)
        p = param.to(compute)
        if compensations:
            p = p + compensations[i].to(compute)
        g = grad.to(compute) * (-factor if maximize else factor)
        if decay == _L2 and weight_decay != 0:
            g = g + p * weight_decay
        elif decay != _L2:
            p = p * (1 - rate * weight_decay)
        if algorithm == _ADAM:
            v_max = max_second_moments[i] if max_second_moments else None
            moments = (first_moments[i], second_moments[i], v_max)
            p = p - _adam(g, *moments, lr, beta1, beta2, eps, step)
        else:
            buffer = first_moments[i] if first_moments else None
            p = p - lr * _sgd(g, buffer, beta1, beta2, bool(flags[group] & _NESTEROV), step)
        if rate * l1 > 0:
            p = soft_threshold(p, rate * l1)
        if emas:
            emas[i] += (1 - ema_decay) * (p - emas[i])
        if rounding == _STOCHASTIC and param.dtype == torch.bfloat16:
            assert rng_state is not None
            places = (element_offsets[i], runs[i] if runs else 0, run_strides[i] if runs else 0)
            param.copy_(_round_stochastically(p, param, rng_state, *places))
        else:
            param.copy_(p)
        if compensations:
            lost = p - param.to(compute)  # nothing of an infinity, which is to stay one
            compensations[i].copy_(torch.where(lost.isfinite(), lost, torch.zeros_like(lost)))


def _adam(
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
) -> Tensor:
    """What to take off the parameter; updates the moments."""
    m, v = exp_avg.to(g.dtype).lerp(g, 1 - beta1), exp_avg_sq.to(g.dtype) * beta2
    v = v + (1 - beta2) * g * g
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if max_exp_avg_sq is not None:
        v = torch.maximum(max_exp_avg_sq.to(g.dtype), v)
        max_exp_avg_sq.copy_(v)
    step_size = lr / (1 - beta1**step)
    return step_size * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)


def _sgd(
    g: Tensor,
    buffer: Tensor | None,
    momentum: float,
    dampening: float,
    nesterov: bool,
    step: float,
) -> Tensor:
    """The direction; updates the momentum buffer, which the first gradient becomes as it is."""
    if buffer is None:
        return g
    m = g if step == 1 else buffer.to(g.dtype) * momentum + g * (1 - dampening)
    buffer.copy_(m)
    return g + m * momentum if nesterov else m


def clip_factor(norm: float, max_norm: float) -> float:
    """As torch.nn.utils.clip_grad_norm_; a NaN stays one."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor


def soft_threshold(p: Tensor, threshold: float) -> Tensor:
    """argmin_x (x - p)^2 / 2 + threshold |x|: exactly zero where |p| <= threshold."""
    shrunk = torch.where(p > 0, p - threshold, p + threshold)
    return torch.where(p.abs() <= threshold, torch.zeros_like(p), shrunk)


def _round_stochastically(
    p: Tensor, like: Tensor, rng_state: Tensor, first: int, run: int, stride: int
) -> Tensor:
    """p, float32, as one of the two bfloat16 beside it: up with probability what is cut off.

    Element e in storage order takes the 16 bits that a mask's element `first` + e would; with a
    `run`, element `first` + (e // run) stride + e % run.
    """
    order = sorted(range(p.dim()), key=lambda d: (like.stride(d), like.size(d)), reverse=True)
    rng_state, numel, run = rng_state.to(p.device), p.numel(), run or max(p.numel(), 1)
    runs = [
        half_words(rng_state, _TAG, first + i // run * stride, min(run, numel - i))
        for i in range(0, numel, run)
    ]
    drawn = torch.cat(runs or [rng_state[:0]]).to(torch.int32)
    stored = p.permute(order)
    bits = stored.contiguous().view(torch.int32)
    # Sign and magnitude: adding to the magnitude's bits moves away from zero on both sides.
    rounded = ((bits + drawn.view(bits.shape)) & -65536).view(torch.float32)
    rounded = torch.where(stored.isfinite(), rounded, stored)
    return rounded.permute([order.index(d) for d in range(len(order))])
