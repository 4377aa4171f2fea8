"""The arithmetic of an optimizer's step, on loaded values: first on a group's numbers, then on a
tensor's elements. optimizer_step_math.h has the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Numbered as in optimizer_step_math.h.
ADAM, AVERAGE = tl.constexpr(0), tl.constexpr(2)
DECOUPLED_LR, L2 = tl.constexpr(1), tl.constexpr(2)
STOCHASTIC, KAHAN = tl.constexpr(1), tl.constexpr(2)
# Flags of a group, above the two bits of its decay.
MAXIMIZE, NESTEROV, RATE_ON_DEVICE = tl.constexpr(4), tl.constexpr(8), tl.constexpr(16)


class Group(NamedTuple):
    """A group's hyperparameters, float64 but for the flags; SGD's momentum and dampening are the
    betas."""

    lr: Any
    decay_lr: Any
    weight_decay: Any
    l1: Any
    beta1: Any
    beta2: Any
    eps: Any
    ema_decay: Any
    flags: Any


class StepRule(NamedTuple):
    """The numbers that update a tensor's elements, in the type that the update computes in:
    OptimizerRule of optimizer_step_math.h."""

    gradient: Any
    l2: Any
    keep: Any
    threshold: Any
    momentum: Any
    momentum_rest: Any
    beta2: Any
    beta2_rest: Any
    bias2: Any
    eps: Any
    step_size: Any
    ema_rest: Any
    coupled: Any  # booleans from here on
    from_gradient: Any
    nesterov: Any


# On single numbers, in float64


@triton.jit
def power(base, exponent):
    """base^exponent for an integer from 0 on, by squaring; 1 - base^exponent is as exact as
    1 - base is."""
    result = tl.full([], 1.0, tl.float64)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def clip_factor(norm, max_norm):
    """The factor of a gradient whose global norm is `norm`: torch's clip_grad_norm_."""
    factor = max_norm / (norm + 1e-6)
    # NaN stays NaN.
    return tl.where(factor >= 1.0, 1.0, factor)


@triton.jit
def gradient_factor(squares_ptr, squares_count, max_norm, grad_scale_ptr):
    """What the gradients are multiplied by: 1 / grad_scale and what clips them."""
    factor = tl.full([], 1.0, tl.float64)
    if grad_scale_ptr is not None:
        factor = factor / tl.load(grad_scale_ptr).to(tl.float64)
    if squares_ptr is not None:
        total = tl.full([], 0.0, tl.float64)
        slot = 0
        while slot < squares_count:
            total += tl.load(squares_ptr + slot)
            slot += 1
        factor = factor * clip_factor(tl.sqrt(total) * factor, max_norm)
    return factor


@triton.jit
def step_rule(group, step, factor, ALGORITHM: tl.constexpr, COMPUTE: tl.constexpr):
    """The StepRule of a tensor: optimizer_constants and OptimizerRule of optimizer_step_math.h.
    `step` is the number of this update, from 1 on; `factor` is that of scaling and clipping."""
    decay = group.flags % 4
    # The decay that applies. With DECOUPLED_LR it follows the schedule of lr, not lr itself.
    rate = tl.where(decay == DECOUPLED_LR, group.lr / group.decay_lr, group.lr)
    l2 = tl.where(decay == L2, group.weight_decay, 0.0)
    keep = tl.where(decay == L2, 1.0, 1.0 - rate * group.weight_decay)
    bias2, step_size = group.lr, group.lr
    if ALGORITHM == ADAM:
        bias2 = tl.sqrt(1.0 - power(group.beta2, step))
        step_size = group.lr / (1.0 - power(group.beta1, step))
        from_gradient = 1.0 - group.beta1 >= 0.5
        momentum_rest = (1.0 - group.beta1).to(COMPUTE)
        # torch.lerp's two forms, each exact at its end: m + w (g - m), g + (w - 1) (g - m).
        momentum_rest = tl.where(from_gradient, momentum_rest - 1.0, momentum_rest)
    else:
        from_gradient = step == 1
        momentum_rest = (1.0 - group.beta2).to(COMPUTE)
    return StepRule(
        gradient=tl.where(group.flags & MAXIMIZE != 0, -factor, factor).to(COMPUTE),
        l2=l2.to(COMPUTE),
        keep=keep.to(COMPUTE),
        threshold=(rate * group.l1).to(COMPUTE),
        momentum=group.beta1.to(COMPUTE),
        momentum_rest=momentum_rest,
        beta2=group.beta2.to(COMPUTE),
        beta2_rest=(1.0 - group.beta2).to(COMPUTE),
        bias2=bias2.to(COMPUTE),
        eps=group.eps.to(COMPUTE),
        step_size=step_size.to(COMPUTE),
        ema_rest=(1.0 - group.ema_decay).to(COMPUTE),
        coupled=l2 != 0.0,
        from_gradient=from_gradient,
        nesterov=group.flags & NESTEROV != 0,
    )


# On elements, in the type that they are computed in


@triton.jit
def multiply_add(a, b, c):
    """a b + c, rounded once, where one of a and b may be a single number."""
    return tl.fma(a + tl.zeros_like(c), b + tl.zeros_like(c), c)


@triton.jit
def square_root(x):
    """Rounded to nearest, also for subnormal numbers. In float32 tl.sqrt does neither."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def quotient(a, b):
    """a / b, rounded to nearest. In float32 the operator `/` is not."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def regularised_gradient(rule, g, p):
    """The gradient that the moments take. Without L2, p has no part: 0 inf is NaN."""
    g = g * rule.gradient
    return tl.where(rule.coupled, multiply_add(p, rule.l2, g), g)


@triton.jit
def adam_moments(rule, g, m, v):
    """(m, v) after the step, from the regularised gradient."""
    m = multiply_add(g - m, rule.momentum_rest, tl.where(rule.from_gradient, g, m))
    return m, multiply_add(rule.beta2_rest * g, g, v * rule.beta2)


@triton.jit
def larger_moment(v, v_max):
    """The maximum so far, for amsgrad. NaN wins, as in torch.maximum."""
    return tl.where((v <= v_max) | (v_max != v_max), v_max, v)


@triton.jit
def adam_values(rule, p, m, v):
    """The parameter after the step, from the moments after it."""
    denominator = quotient(square_root(v), rule.bias2 + tl.zeros_like(v)) + rule.eps
    return p * rule.keep - quotient(rule.step_size * m, denominator)


@triton.jit
def sgd_momentum(rule, g, m):
    """(direction, m) after the step, from the regularised gradient."""
    moved = multiply_add(g, rule.momentum_rest, m * rule.momentum)
    m = tl.where(rule.from_gradient, g, moved)
    return tl.where(rule.nesterov, multiply_add(m, rule.momentum, g), m), m


@triton.jit
def sgd_values(rule, p, direction):
    """The parameter after the step."""
    return multiply_add(direction, -rule.step_size, p * rule.keep)


@triton.jit
def soft_threshold(p, t):
    """argmin_x (x - p)^2 / 2 + t |x|: what lies within t of zero becomes zero, exactly."""
    return tl.where((p >= -t) & (p <= t), 0.0, tl.where(p > 0.0, p - t, p + t))


@triton.jit
def ema_values(rule, ema, p):
    return multiply_add(p - ema, rule.ema_rest, ema)


@triton.jit
def stochastic_bfloat16(p, half_word):
    """Rounds float32 to one of the two bfloat16 beside it, as store_stochastic does
    (optimizer_step_math.h).

    It works on the bits to the end, so that no conversion rounds again. An infinity's low bits are
    zero and carry nothing; a NaN becomes the quiet one.
    """
    rounded = (p.to(tl.uint32, bitcast=True) + half_word.to(tl.uint32)) >> 16
    rounded = tl.where(p != p, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
