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

from .._layout import dense_like
from ._batch_norm import known_multiples, position_of
from ._channels import tile_at
from ._launch import device_of
from ._loss import MEAN, NONE, empty_results, finished, plan, target_arguments
from ._softmax import (
    UNSPECIALISED,
    bounded,
    label_gradients,
    labels_at,
    load_above,
    load_counts,
    load_factor,
    load_label_terms,
    load_logits,
    load_rule,
    load_weight_sum,
    number,
    store_loss,
    target_loss,
    tile_gradients,
    zero_tile,
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


class Scales(NamedTuple):
    """What exponentials are multiplied by in the gradient, [BLOCK_M] each."""

    hard: Any  # the student's
    soft: Any  # at T
    soft_t: Any  # the teacher's at T


@triton.jit
def store_label_gradient(
    x_ptr,
    teacher_ptr,
    gradient_ptr,
    label,
    weight,
    m0,
    largest,
    largest_t,
    scales,
    terms,
    C,
    L,
    inverse_t,
    PAIR: tl.constexpr,
    SMOOTHS: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The gradients by the logits of labels, over what lies there."""
    at = labels_at(label, m0, C, L, M_AXIS, SHORT_ROWS, UNIT)
    x = load_above(x_ptr, at, label, largest)
    t = load_above(teacher_ptr, at, label, largest_t)
    gradient = label_gradients(tl.exp(x) * scales.hard, label, weight, terms, PAIR, SMOOTHS)
    gradient += tl.exp(x * inverse_t) * scales.soft - tl.exp(t * inverse_t) * scales.soft_t
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=label >= 0)


@triton.jit
def store_label_gradients(
    x_ptr,
    teacher_ptr,
    gradient_ptr,
    m0,
    largest,
    largest_t,
    scales,
    terms,
    C,
    L,
    inverse_t,
    PAIR: tl.constexpr,
    SMOOTHS: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The same of both labels. Where they are the same both write the same."""
    tl.debug_barrier()  # the tiles are stored, by whichever threads
    store_label_gradient(
        *(x_ptr, teacher_ptr, gradient_ptr, terms.a, terms.weight_a, m0, largest, largest_t),
        *(scales, terms, C, L, inverse_t, PAIR, SMOOTHS, M_AXIS, SHORT_ROWS, UNIT),
    )
    if PAIR:
        store_label_gradient(
            *(x_ptr, teacher_ptr, gradient_ptr, terms.b, terms.weight_b, m0, largest, largest_t),
            *(scales, terms, C, L, inverse_t, PAIR, SMOOTHS, M_AXIS, SHORT_ROWS, UNIT),
        )


@triton.jit
def soft_gradients(soft, soft_t, scales, AXIS: tl.constexpr):
    """The divergence's gradient by the logits of a tile, by its exponentials at T."""
    scale, scale_t = tl.expand_dims(scales.soft, AXIS), tl.expand_dims(scales.soft_t, AXIS)
    return soft * scale - soft_t * scale_t


@triton.jit
def store_gradients(
    x_ptr,
    teacher_ptr,
    target_ptr,
    weight_ptr,
    gradient_ptr,
    m0,
    largest,
    largest_t,
    scales,
    terms,
    C,
    M,
    L,
    rule,
    inverse_t,
    PAIR: tl.constexpr,
    SMOOTHS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The gradients of all classes, tile by tile from the last."""
    COMPUTE: tl.constexpr = largest.dtype
    AXIS: tl.constexpr = 1 - M_AXIS
    tile = tl.cdiv(C, BLOCK_C)
    while tile > 0:
        tile -= 1
        c0 = tile * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
        x = load_logits(x_ptr, at, inside, COMPUTE) - tl.expand_dims(largest, AXIS)
        t = load_logits(teacher_ptr, at, inside, COMPUTE) - tl.expand_dims(largest_t, AXIS)
        v = 0.0
        if SMOOTHS:
            v = load_counts(target_ptr, weight_ptr, at, c, C, inside, rule, True, M_AXIS, COMPUTE)
        slope = tl.exp(x) * tl.expand_dims(scales.hard, AXIS)
        gradient = tile_gradients(slope, v, terms, True, PAIR, SMOOTHS, M_AXIS)
        gradient += soft_gradients(tl.exp(x * inverse_t), tl.exp(t * inverse_t), scales, AXIS)
        tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


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
    LAM_PER_SAMPLE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    SUMS: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 1 - M_AXIS
    PAIR: tl.constexpr = partner_ptr is not None
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    m0 = position_of(tl.program_id(0), BLOCK_M, WIDE)
    m = m0 + tl.arange(0, BLOCK_M)
    rule = load_rule(hard, smooth, traced_smoothing_ptr, C, COMPUTE)
    softness = load_softness(share, soft_share, inverse_t, traced_softness_ptr, mean_of, COMPUTE)
    share, soft_share, inverse_t = softness.share, softness.soft_share, softness.inverse_t
    mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
    terms = load_label_terms(
        *(target_ptr, partner_ptr, lam_ptr, weight_ptr, totals_ptr, share, mass),
        *(m, C, M, L, ignore_index, one_lam, rule, LAM_PER_SAMPLE, COMPUTE),
    )

    if SINGLE:
        c = tl.arange(0, BLOCK_C)
        at, inside = tile_at(m0, 0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
        x = load_logits(x_ptr, at, inside, COMPUTE)
        t = load_logits(teacher_ptr, at, inside, COMPUTE)
        largest, largest_t = bounded(tl.max(x, AXIS)), bounded(tl.max(t, AXIS))
        x -= tl.expand_dims(largest, AXIS)
        t -= tl.expand_dims(largest_t, AXIS)
        e, soft, soft_t = tl.exp(x), tl.exp(x * inverse_t), tl.exp(t * inverse_t)
        total, softened, total_t = tl.sum(e, AXIS), tl.sum(soft, AXIS), tl.sum(soft_t, AXIS)
        z_t = tl.sum(tl.where(inside, divergence_terms(soft_t, t, x), 0.0), AXIS)
        v, z = 0.0, 0.0
        if SMOOTHS:
            v = load_counts(target_ptr, weight_ptr, at, c, C, inside, rule, True, M_AXIS, COMPUTE)
            z = tl.sum(tl.where(inside, v * x, 0.0), AXIS)
    else:
        largest = tl.full([BLOCK_M], float("-inf"), COMPUTE)
        largest_t = tl.full([BLOCK_M], float("-inf"), COMPUTE)
        pivot = tl.zeros([BLOCK_M], COMPUTE)
        totals = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        softs = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        totals_t = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        zs_t = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        zs = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        c0 = 0
        while c0 < C:
            c = c0 + tl.arange(0, BLOCK_C)
            at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
            x = load_logits(x_ptr, at, inside, COMPUTE)
            t = load_logits(teacher_ptr, at, inside, COMPUTE)
            larger = bounded(tl.maximum(largest, tl.max(x, AXIS)))
            larger_t = bounded(tl.maximum(largest_t, tl.max(t, AXIS)))
            if SMOOTHS:
                pivot = tl.where(c0 == 0, larger, pivot)
                v = load_counts(
                    target_ptr, weight_ptr, at, c, C, inside, rule, True, M_AXIS, COMPUTE
                )
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
            c0 += BLOCK_C
        total, softened = tl.sum(totals, AXIS), tl.sum(softs, AXIS)
        total_t, z_t = tl.sum(totals_t, AXIS), tl.sum(zs_t, AXIS)
        z = 0.0
        if SMOOTHS:
            z = tl.sum(zs, AXIS) - mass * (largest - pivot)

    stats_ptr += m
    tl.store(stats_ptr, largest, mask=m < M)
    tl.store(stats_ptr + M, total, mask=m < M)
    tl.store(stats_ptr + 2 * M, softened, mask=m < M)
    tl.store(stats_ptr + 3 * M, largest_t, mask=m < M)
    tl.store(stats_ptr + 4 * M, total_t, mask=m < M)
    at_a = labels_at(terms.a, m0, C, L, M_AXIS, SHORT_ROWS, UNIT)
    above_a, above_b = load_above(x_ptr, at_a, terms.a, largest), 0.0
    if PAIR:
        at_b = labels_at(terms.b, m0, C, L, M_AXIS, SHORT_ROWS, UNIT)
        above_b = load_above(x_ptr, at_b, terms.b, largest)
    loss = target_loss(terms, total, above_a, above_b, z, mass, True, PAIR, SMOOTHS)
    loss += soft_share * divergence(total_t, softened, z_t * inverse_t)
    store_loss(loss_ptr, loss, totals_ptr, m, M, PAIR, SUMS)

    if gradient_ptr is not None:
        soft_share *= inverse_t
        scales = Scales(terms.mass / total, soft_share / softened, soft_share / total_t)
        if SINGLE:
            slope = e * tl.expand_dims(scales.hard, AXIS)
            gradient = tile_gradients(slope, v, terms, True, PAIR, SMOOTHS, M_AXIS)
            gradient += soft_gradients(soft, soft_t, scales, AXIS)
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
        else:
            store_gradients(
                *(x_ptr, teacher_ptr, target_ptr, weight_ptr, gradient_ptr, m0),
                *(largest, largest_t, scales, terms, C, M, L, rule, inverse_t, PAIR, SMOOTHS),
                *(BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT),
            )
        store_label_gradients(
            *(x_ptr, teacher_ptr, gradient_ptr, m0, largest, largest_t, scales, terms),
            *(C, L, inverse_t, PAIR, SMOOTHS, M_AXIS, SHORT_ROWS, UNIT),
        )


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
    LAM_PER_SAMPLE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PAIR: tl.constexpr = partner_ptr is not None
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    m0 = position_of(tl.program_id(0), BLOCK_M, WIDE)
    m = m0 + tl.arange(0, BLOCK_M)
    rule = load_rule(hard, smooth, traced_smoothing_ptr, C, COMPUTE)
    softness = load_softness(share, soft_share, inverse_t, traced_softness_ptr, mean_of, COMPUTE)
    inverse_t = softness.inverse_t
    factor = load_factor(grad_output_ptr, m, M, GRAD_PER_POSITION, COMPUTE)
    mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
    terms = load_label_terms(
        *(target_ptr, partner_ptr, lam_ptr, weight_ptr, totals_ptr),
        *(factor * softness.share, mass),
        *(m, C, M, L, ignore_index, one_lam, rule, LAM_PER_SAMPLE, COMPUTE),
    )
    soft_share = factor * softness.soft_share * inverse_t
    stats_ptr += m
    largest = tl.load(stats_ptr, mask=m < M, other=0.0)
    total = tl.load(stats_ptr + M, mask=m < M, other=1.0)
    softened = tl.load(stats_ptr + 2 * M, mask=m < M, other=1.0)
    largest_t = tl.load(stats_ptr + 3 * M, mask=m < M, other=0.0)
    total_t = tl.load(stats_ptr + 4 * M, mask=m < M, other=1.0)
    scales = Scales(terms.mass / total, soft_share / softened, soft_share / total_t)
    store_gradients(
        *(x_ptr, teacher_ptr, target_ptr, weight_ptr, gradient_ptr, m0, largest, largest_t),
        *(scales, terms, C, M, L, rule, inverse_t, PAIR, SMOOTHS),
        *(BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT),
    )
    store_label_gradients(
        *(x_ptr, teacher_ptr, gradient_ptr, m0, largest, largest_t, scales, terms),
        *(C, L, inverse_t, PAIR, SMOOTHS, M_AXIS, SHORT_ROWS, UNIT),
    )


def _soft_arguments(
    input: Tensor,
    reduction: int,
    temperature: float,
    alpha: float,
    traced_softness: Tensor | None,
) -> dict[str, Any]:
    mean_of = input.numel() // input.shape[1] if reduction == MEAN else 1
    return {
        "share": 1.0 - alpha,
        "soft_share": alpha * temperature**2 / mean_of,
        "inverse_t": 1.0 / temperature,
        "traced_softness_ptr": traced_softness,
        "mean_of": mean_of,
    }


def distillation(
    input: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
    temperature: float,
    alpha: float,
    traced_softness: Tensor | None,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op: (loss, stats, gradient)."""
    of_target = (target, partner, lam, one_lam)
    options = (weight, ignore_index, label_smoothing, reduction, traced_smoothing)
    tiles = plan(input, REGISTERS)
    loss, stats, gradient = empty_results(input, 5, reduction, keep_gradient, tiles.programs)
    with device_of(input):
        distillation_kernel[(tiles.programs,)](
            x_ptr=input,
            teacher_ptr=teacher,
            loss_ptr=loss,
            stats_ptr=stats,
            gradient_ptr=gradient if keep_gradient else None,
            SUMS=reduction != NONE,
            SINGLE=tiles.single,
            **target_arguments(input, *of_target, *options)
            | _soft_arguments(input, reduction, temperature, alpha, traced_softness),
            **tiles.arguments,
        )
    return finished(loss, input, reduction), stats, gradient


def distillation_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
    temperature: float,
    alpha: float,
    traced_softness: Tensor | None,
) -> Tensor:
    """The op's gradient by the input."""
    of_target = (target, partner, lam, one_lam)
    options = (weight, ignore_index, label_smoothing, reduction, traced_smoothing)
    tiles = plan(input, REGISTERS, loops=True)
    gradient = dense_like(input)
    with device_of(input):
        distillation_backward_kernel[(tiles.programs,)](
            grad_output_ptr=grad_output,
            x_ptr=input,
            teacher_ptr=teacher,
            stats_ptr=stats,
            gradient_ptr=gradient,
            GRAD_PER_POSITION=grad_output.dim() > 0,
            **target_arguments(input, *of_target, *options)
            | _soft_arguments(input, reduction, temperature, alpha, traced_softness),
            **tiles.arguments,
        )
    return gradient
