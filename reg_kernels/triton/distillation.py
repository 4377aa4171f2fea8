"""Knowledge distillation and its gradient in Triton; distillation_math.h has the formulas.

Bytes an element, s and t = sizeof of the student's and of the teacher's dtype:
    distillation_kernel            x, teacher                   s + t
      and keeps the gradient       x, teacher, gradient         2 s + t; 3 s + 2 t past a tile
    distillation_backward_kernel   x, teacher, gradient         2 s + t
Three exponentials an element. As in cross_entropy.py otherwise; a tile holds up to 8192 classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._channels import known_sizes, position_of, tile_at, zero_tile
from ._loss import MEAN, TargetCall, launch_backward, launch_forward
from ._softmax import (
    UNSPECIALISED,
    Slopes,
    Targets,
    bounded,
    load_counts,
    load_factor,
    load_label_terms,
    load_logits,
    load_loss,
    load_rule,
    load_weight_sum,
    number,
    soft_gradients,
    store_gradients,
    store_label_gradients,
    store_loss,
    tile_gradients,
)

REGISTERS = 4  # an element of a tile: three exponentials and what goes on


@triton.jit
def divergence_terms(e_t, above_t, above):
    """What classes add to Z, times T; divergence_term in distillation_math.h."""
    return e_t * (bounded(above_t) - above)


@triton.jit
def divergence(total_t, softened, z):
    """KL of positions by the sums at T of the teacher and of the student."""
    return z / total_t + tl.log(softened / total_t)


class Softness(NamedTuple):
    """What temperature and alpha make of a loss."""

    share: Any  # of the labels: 1 - alpha
    soft_share: Any  # of a position's divergence: alpha T^2, or what a mean makes of it
    inverse_t: Any


@triton.jit
def load_softness(
    share, soft_share, inverse_t, traced_softness_ptr, mean_of, COMPUTE: tl.constexpr
):
    """Softness of arguments, or of a temperature and an alpha that lie in memory."""
    if traced_softness_ptr is None:
        softness = Softness(
            number(share, COMPUTE), number(soft_share, COMPUTE), number(inverse_t, COMPUTE)
        )
    else:
        temperature, alpha = tl.load(traced_softness_ptr), tl.load(traced_softness_ptr + 1)
        softness = Softness(
            (1.0 - alpha).to(COMPUTE),
            (alpha * temperature * temperature / mean_of).to(COMPUTE),
            (1.0 / temperature).to(COMPUTE),
        )
    return softness


@triton.jit(do_not_specialize=[*UNSPECIALISED, "mean_of"])
def distillation_kernel(
    x_ptr,  # [N, C, L] in either layout
    teacher_ptr,  # as x lies
    target_ptr,  # int64 [M]; this and what follows as in cross_entropy.py
    partner_ptr,
    lam_ptr,
    weight_ptr,
    weight_sum_ptr,
    totals_ptr,
    loss_ptr,
    stats_ptr,  # [5, M]
    gradient_ptr,
    C,
    M,
    L,
    ignore_index: tl.int64,
    one_lam: tl.float64,
    hard: tl.float64,
    smooth: tl.float64,
    traced_smoothing_ptr,  # float64 [1], or None: else it counts instead of the two
    share: tl.float64,
    soft_share: tl.float64,
    inverse_t: tl.float64,
    traced_softness_ptr,  # float64 [2], T and alpha, or None: else they count instead of the three
    mean_of,  # positions of a mean, or 1
    SUMS: tl.constexpr,
    SINGLE: tl.constexpr,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    M_AXIS: tl.constexpr = TILES.M_AXIS
    AXIS: tl.constexpr = 1 - M_AXIS
    sizes = known_sizes(C, M, L, TILES)
    C, M = sizes.C, sizes.M
    m0 = position_of(tl.program_id(0), TILES)
    m = m0 + tl.arange(0, TILES.BLOCK_M)
    rule = load_rule(hard, smooth, traced_smoothing_ptr, sizes.C, COMPUTE)
    targets = Targets(
        *(target_ptr, partner_ptr, lam_ptr, weight_ptr, weight_sum_ptr, totals_ptr),
        *(ignore_index, one_lam, rule),
    )
    softness = load_softness(share, soft_share, inverse_t, traced_softness_ptr, mean_of, COMPUTE)
    share, soft_share, inverse_t = softness.share, softness.soft_share, softness.inverse_t
    mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
    terms = load_label_terms(targets, share, mass, m, sizes, KIND, COMPUTE)

    if SINGLE:
        c = tl.arange(0, TILES.BLOCK_C)
        at, inside = tile_at(m0, 0, sizes, TILES)
        x = load_logits(x_ptr, at, inside, COMPUTE)
        t = load_logits(teacher_ptr, at, inside, COMPUTE)
        largest, largest_t = bounded(tl.max(x, AXIS)), bounded(tl.max(t, AXIS))
        x -= tl.expand_dims(largest, AXIS)
        t -= tl.expand_dims(largest_t, AXIS)
        e, soft, soft_t = tl.exp(x), tl.exp(x * inverse_t), tl.exp(t * inverse_t)
        total, softened, total_t = tl.sum(e, AXIS), tl.sum(soft, AXIS), tl.sum(soft_t, AXIS)
        z_t = tl.sum(tl.where(inside, divergence_terms(soft_t, t, x), 0.0), AXIS)
        v, z = 0.0, 0.0
        if KIND.SPREADS:
            v = load_counts(targets, at, c, C, inside, KIND, M_AXIS, COMPUTE)
            z = tl.sum(tl.where(inside, v * x, 0.0), AXIS)
    else:
        largest = tl.full(m.shape, float("-inf"), COMPUTE)
        largest_t = tl.full(m.shape, float("-inf"), COMPUTE)
        pivot = tl.zeros(m.shape, COMPUTE)
        totals = zero_tile(TILES, COMPUTE)
        softs = zero_tile(TILES, COMPUTE)
        totals_t = zero_tile(TILES, COMPUTE)
        zs_t = zero_tile(TILES, COMPUTE)
        zs = zero_tile(TILES, COMPUTE)
        c0 = 0
        while c0 < C:
            c = c0 + tl.arange(0, TILES.BLOCK_C)
            at, inside = tile_at(m0, c0, sizes, TILES)
            x = load_logits(x_ptr, at, inside, COMPUTE)
            t = load_logits(teacher_ptr, at, inside, COMPUTE)
            larger = bounded(tl.maximum(largest, tl.max(x, AXIS)))
            larger_t = bounded(tl.maximum(largest_t, tl.max(t, AXIS)))
            if KIND.SPREADS:
                pivot = tl.where(c0 == 0, larger, pivot)
                v = load_counts(targets, at, c, C, inside, KIND, M_AXIS, COMPUTE)
                zs += tl.where(inside, v * (x - tl.expand_dims(pivot, AXIS)), 0.0)
            x -= tl.expand_dims(larger, AXIS)
            t -= tl.expand_dims(larger_t, AXIS)
            # What has been summed up, relative to the larger maxima.
            rise, rise_t = largest - larger, largest_t - larger_t
            before = tl.exp(rise)
            totals = totals * tl.expand_dims(before, AXIS) + tl.exp(x)
            before = tl.exp(rise * inverse_t)
            softs = softs * tl.expand_dims(before, AXIS) + tl.exp(x * inverse_t)
            before = tl.expand_dims(tl.exp(rise_t * inverse_t), AXIS)
            # Where there is nothing yet, the rise is infinite.
            shift = tl.where(totals_t > 0.0, totals_t * tl.expand_dims(rise_t - rise, AXIS), 0.0)
            soft_t = tl.exp(t * inverse_t)
            more = tl.where(inside, divergence_terms(soft_t, t, x), 0.0)
            zs_t = (zs_t + shift) * before + more
            totals_t = totals_t * before + soft_t
            largest, largest_t = larger, larger_t
            c0 += TILES.BLOCK_C
        total, softened = tl.sum(totals, AXIS), tl.sum(softs, AXIS)
        total_t, z_t = tl.sum(totals_t, AXIS), tl.sum(zs_t, AXIS)
        z = 0.0
        if KIND.SPREADS:
            z = tl.sum(zs, AXIS) - mass * (largest - pivot)

    stats_ptr += m
    tl.store(stats_ptr, largest, mask=m < M)
    tl.store(stats_ptr + M, total, mask=m < M)
    tl.store(stats_ptr + 2 * M, softened, mask=m < M)
    tl.store(stats_ptr + 3 * M, largest_t, mask=m < M)
    tl.store(stats_ptr + 4 * M, total_t, mask=m < M)
    loss = load_loss(x_ptr, terms, largest, total, z, mass, m0, sizes, KIND, TILES)
    loss += soft_share * divergence(total_t, softened, z_t * inverse_t)
    store_loss(loss_ptr, loss, totals_ptr, m, M, KIND, SUMS)

    if gradient_ptr is not None:
        soft_share *= inverse_t
        slopes = Slopes(
            *(x_ptr, gradient_ptr, largest, terms.mass / total, teacher_ptr, largest_t),
            *(soft_share / softened, soft_share / total_t, inverse_t),
        )
        if SINGLE:
            gradient = e * tl.expand_dims(slopes.hard, AXIS)
            gradient = tile_gradients(gradient, v, terms, KIND, AXIS)
            gradient += soft_gradients(soft, soft_t, slopes, AXIS)
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
            store_label_gradients(slopes, terms, m0, sizes, KIND, TILES)
        else:
            store_gradients(slopes, targets, terms, m0, sizes, KIND, TILES)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "mean_of"])
def distillation_backward_kernel(
    grad_output_ptr,  # [M], or one number
    x_ptr,
    teacher_ptr,
    stats_ptr,
    target_ptr,
    partner_ptr,
    lam_ptr,
    weight_ptr,
    weight_sum_ptr,
    totals_ptr,
    gradient_ptr,
    C,
    M,
    L,
    ignore_index: tl.int64,
    one_lam: tl.float64,
    hard: tl.float64,
    smooth: tl.float64,
    traced_smoothing_ptr,
    share: tl.float64,
    soft_share: tl.float64,
    inverse_t: tl.float64,
    traced_softness_ptr,
    mean_of,
    GRAD_PER_POSITION: tl.constexpr,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sizes = known_sizes(C, M, L, TILES)
    C, M = sizes.C, sizes.M
    m0 = position_of(tl.program_id(0), TILES)
    m = m0 + tl.arange(0, TILES.BLOCK_M)
    rule = load_rule(hard, smooth, traced_smoothing_ptr, sizes.C, COMPUTE)
    targets = Targets(
        *(target_ptr, partner_ptr, lam_ptr, weight_ptr, weight_sum_ptr, totals_ptr),
        *(ignore_index, one_lam, rule),
    )
    softness = load_softness(share, soft_share, inverse_t, traced_softness_ptr, mean_of, COMPUTE)
    inverse_t = softness.inverse_t
    factor = load_factor(grad_output_ptr, m, M, GRAD_PER_POSITION, COMPUTE)
    mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
    terms = load_label_terms(targets, factor * softness.share, mass, m, sizes, KIND, COMPUTE)
    soft_share = factor * softness.soft_share * inverse_t
    stats_ptr += m
    largest = tl.load(stats_ptr, mask=m < M, other=0.0)
    total = tl.load(stats_ptr + M, mask=m < M, other=1.0)
    softened = tl.load(stats_ptr + 2 * M, mask=m < M, other=1.0)
    largest_t = tl.load(stats_ptr + 3 * M, mask=m < M, other=0.0)
    total_t = tl.load(stats_ptr + 4 * M, mask=m < M, other=1.0)
    slopes = Slopes(
        *(x_ptr, gradient_ptr, largest, terms.mass / total, teacher_ptr, largest_t),
        *(soft_share / softened, soft_share / total_t, inverse_t),
    )
    store_gradients(slopes, targets, terms, m0, sizes, KIND, TILES)


def _soft_arguments(
    input: Tensor,
    teacher: Tensor,
    reduction: int,
    temperature: float,
    alpha: float,
    traced_softness: Tensor | None,
) -> dict[str, Any]:
    mean_of = input.numel() // input.shape[1] if reduction == MEAN else 1
    return {
        "teacher_ptr": teacher,
        "share": 1.0 - alpha,
        "soft_share": alpha * temperature**2 / mean_of,
        "inverse_t": 1.0 / temperature,
        "traced_softness_ptr": traced_softness,
        "mean_of": mean_of,
    }


def distillation(input: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, of its schema's arguments: (loss, stats, gradient)."""
    *target, temperature, alpha, traced_softness, keep_gradient = arguments
    call = TargetCall(*target)
    soft = _soft_arguments(input, teacher, call.reduction, temperature, alpha, traced_softness)
    return launch_forward(distillation_kernel, input, call, REGISTERS, 5, keep_gradient, **soft)


def distillation_backward(
    grad_output: Tensor, input: Tensor, stats: Tensor, teacher: Tensor, *arguments: Any
) -> Tensor:
    """The op's gradient by the input."""
    *target, temperature, alpha, traced_softness = arguments
    call = TargetCall(*target)
    soft = _soft_arguments(input, teacher, call.reduction, temperature, alpha, traced_softness)
    kernel = distillation_backward_kernel
    return launch_backward(kernel, grad_output, input, stats, call, REGISTERS, **soft)
