"""Cross-entropy and its gradient in Triton.

Bytes an element, s = sizeof(dtype), of class indices; class probabilities are read wherever x is:
    cross_entropy_kernel           x                            1 s
      and keeps the gradient       x, gradient                  2 s; 3 s past what a tile holds
    cross_entropy_backward_kernel  x, gradient                  2 s
    rescale_kernel                 x, x, unless it is by 1      2 s or 0
A program has a block of positions and all of their classes. Up to 32768 of them (float32, without
weights) lie in one tile, which is read once; of more the softmax is gathered tile by tile, and they
are read again for the gradient, from the end, where the cache still has them. A mean needs to know
first how many labels count: a kernel of its own sums that up, 8 bytes a position.

Per-position losses are added up in float64, by program and then by torch, always in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._layout import dense_like
from ._batch_norm import known_multiples, position_of
from ._channels import tile_at
from ._launch import device_of, processors
from ._loss import NONE, empty_results, finished, plan, target_arguments
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
    probability_terms,
    store_loss,
    target_loss,
    tile_gradients,
    zero_tile,
)

BLOCK = 4096  # elements at a time of what is rescaled
PROGRAMS = (
    4  # that rescale, to a multiprocessor: they are done at once where there is nothing to do
)


@triton.jit
def store_label_gradient(
    x_ptr,
    gradient_ptr,
    label,
    weight,
    m0,
    largest,
    scale,
    terms,
    C,
    L,
    PAIR: tl.constexpr,
    SPREADS: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The gradients by the logits of labels, over what lies there."""
    at = labels_at(label, m0, C, L, M_AXIS, SHORT_ROWS, UNIT)
    slope = tl.exp(load_above(x_ptr, at, label, largest)) * scale
    gradient = label_gradients(slope, label, weight, terms, PAIR, SPREADS)
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=label >= 0)


@triton.jit
def store_label_gradients(
    x_ptr,
    gradient_ptr,
    m0,
    largest,
    scale,
    terms,
    C,
    L,
    PAIR: tl.constexpr,
    SPREADS: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The same of both labels. Where they are the same both write the same."""
    tl.debug_barrier()  # the tiles are stored, by whichever threads
    store_label_gradient(
        *(x_ptr, gradient_ptr, terms.a, terms.weight_a, m0, largest, scale, terms, C, L),
        *(PAIR, SPREADS, M_AXIS, SHORT_ROWS, UNIT),
    )
    if PAIR:
        store_label_gradient(
            *(x_ptr, gradient_ptr, terms.b, terms.weight_b, m0, largest, scale, terms, C, L),
            *(PAIR, SPREADS, M_AXIS, SHORT_ROWS, UNIT),
        )


@triton.jit
def store_gradients(
    x_ptr,
    target_ptr,
    weight_ptr,
    gradient_ptr,
    m0,
    largest,
    scale,  # mass over the softmax's sum
    terms,
    C,
    M,
    L,
    rule,
    OF_LABELS: tl.constexpr,
    PAIR: tl.constexpr,
    SPREADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The gradients of all classes, tile by tile from the last."""
    AXIS: tl.constexpr = 1 - M_AXIS
    tile = tl.cdiv(C, BLOCK_C)
    while tile > 0:
        tile -= 1
        c0 = tile * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
        x = load_logits(x_ptr, at, inside, scale.dtype)
        v = 0.0
        if SPREADS:
            v = load_counts(
                *(target_ptr, weight_ptr, at, c, C, inside, rule, OF_LABELS, M_AXIS, scale.dtype)
            )
        slope = tl.exp(x - tl.expand_dims(largest, AXIS)) * tl.expand_dims(scale, AXIS)
        gradient = tile_gradients(slope, v, terms, OF_LABELS, PAIR, SPREADS, M_AXIS)
        tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def cross_entropy_kernel(
    x_ptr,  # [N, C, L] in either layout
    target_ptr,  # int64 labels [M], or probabilities as x lies
    partner_ptr,  # int64 [M], or None
    lam_ptr,  # [N] or [1], or None: then one_lam counts
    weight_ptr,  # [C], or None
    weight_sum_ptr,  # float64 [1], or None: then it is C
    totals_ptr,  # float64, what means of labels divide by, or None
    loss_ptr,  # [M], or float64 [programs]
    stats_ptr,  # [2, M]
    gradient_ptr,  # as x lies, or None
    C,
    M,
    L,
    ignore_index: tl.int64,
    one_lam: tl.float64,
    hard: tl.float64,
    smooth: tl.float64,
    traced_smoothing_ptr,  # float64 [1], or None: else it counts instead of the two
    share: tl.float64,  # of a position: of a mean of probabilities, or 1
    LAM_PER_SAMPLE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    SUMS: tl.constexpr,
    SINGLE: tl.constexpr,  # whether one tile holds all classes
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,  # divides L and M or, channels last, C
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 1 - M_AXIS
    OF_LABELS: tl.constexpr = target_ptr.dtype.element_ty == tl.int64
    PAIR: tl.constexpr = partner_ptr is not None
    SPREADS: tl.constexpr = SMOOTHS or not OF_LABELS
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    m0 = position_of(tl.program_id(0), BLOCK_M, WIDE)
    m = m0 + tl.arange(0, BLOCK_M)
    rule = load_rule(hard, smooth, traced_smoothing_ptr, C, COMPUTE)
    factor = number(share, COMPUTE)
    if OF_LABELS:
        mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
        terms = load_label_terms(
            *(target_ptr, partner_ptr, lam_ptr, weight_ptr, totals_ptr, factor),
            *(mass, m, C, M, L, ignore_index, one_lam, rule, LAM_PER_SAMPLE, COMPUTE),
        )

    if SINGLE:
        c = tl.arange(0, BLOCK_C)
        at, inside = tile_at(m0, 0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
        x = load_logits(x_ptr, at, inside, COMPUTE)
        largest = bounded(tl.max(x, AXIS))
        x -= tl.expand_dims(largest, AXIS)
        e = tl.exp(x)
        total = tl.sum(e, AXIS)
        v, z = 0.0, 0.0
        if SPREADS:
            v = load_counts(
                *(target_ptr, weight_ptr, at, c, C, inside, rule, OF_LABELS, M_AXIS, COMPUTE)
            )
            z = tl.sum(tl.where(inside, v * x, 0.0), AXIS)
            if not OF_LABELS:
                mass = tl.sum(v, AXIS)
    else:
        largest = tl.full([BLOCK_M], float("-inf"), COMPUTE)
        pivot = tl.zeros([BLOCK_M], COMPUTE)
        totals = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        zs = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        masses = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        c0 = 0
        while c0 < C:
            c = c0 + tl.arange(0, BLOCK_C)
            at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
            x = load_logits(x_ptr, at, inside, COMPUTE)
            larger = bounded(tl.maximum(largest, tl.max(x, AXIS)))
            before = tl.exp(largest - larger)
            e = tl.exp(x - tl.expand_dims(larger, AXIS))
            totals = totals * tl.expand_dims(before, AXIS) + e
            largest = larger
            if SPREADS:
                # Off with what is about the size of all: sums of 1e4 would round a loss of 1 away.
                pivot = tl.where(c0 == 0, larger, pivot)
                v = load_counts(
                    *(target_ptr, weight_ptr, at, c, C, inside, rule, OF_LABELS, M_AXIS, COMPUTE)
                )
                zs += tl.where(inside, v * (x - tl.expand_dims(pivot, AXIS)), 0.0)
                if not OF_LABELS:
                    masses += v
            c0 += BLOCK_C
        total = tl.sum(totals, AXIS)
        z = 0.0
        if SPREADS:
            if not OF_LABELS:
                mass = tl.sum(masses, AXIS)
            z = tl.sum(zs, AXIS) - mass * (largest - pivot)

    if not OF_LABELS:
        terms = probability_terms(mass, factor)
    tl.store(stats_ptr + m, largest, mask=m < M)
    tl.store(stats_ptr + M + m, total, mask=m < M)
    above_a, above_b = 0.0, 0.0
    if OF_LABELS:
        at_a = labels_at(terms.a, m0, C, L, M_AXIS, SHORT_ROWS, UNIT)
        above_a = load_above(x_ptr, at_a, terms.a, largest)
    if PAIR:
        at_b = labels_at(terms.b, m0, C, L, M_AXIS, SHORT_ROWS, UNIT)
        above_b = load_above(x_ptr, at_b, terms.b, largest)
    loss = target_loss(terms, total, above_a, above_b, z, mass, OF_LABELS, PAIR, SPREADS)
    store_loss(loss_ptr, loss, totals_ptr, m, M, PAIR, SUMS)

    if gradient_ptr is not None:
        scale = terms.mass / total
        if SINGLE:
            slope = e * tl.expand_dims(scale, AXIS)
            gradient = tile_gradients(slope, v, terms, OF_LABELS, PAIR, SPREADS, M_AXIS)
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
        else:
            store_gradients(
                *(x_ptr, target_ptr, weight_ptr, gradient_ptr, m0, largest, scale, terms, C, M, L),
                *(rule, OF_LABELS, PAIR, SPREADS, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT),
            )
        if OF_LABELS:
            store_label_gradients(
                *(x_ptr, gradient_ptr, m0, largest, scale, terms, C, L),
                *(PAIR, SPREADS, M_AXIS, SHORT_ROWS, UNIT),
            )


@triton.jit(do_not_specialize=UNSPECIALISED)
def cross_entropy_backward_kernel(
    grad_output_ptr,  # [M], or one number
    x_ptr,  # [N, C, L] in either layout, and so on as above
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
    AXIS: tl.constexpr = 1 - M_AXIS
    OF_LABELS: tl.constexpr = target_ptr.dtype.element_ty == tl.int64
    PAIR: tl.constexpr = partner_ptr is not None
    SPREADS: tl.constexpr = SMOOTHS or not OF_LABELS
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    m0 = position_of(tl.program_id(0), BLOCK_M, WIDE)
    m = m0 + tl.arange(0, BLOCK_M)
    rule = load_rule(hard, smooth, traced_smoothing_ptr, C, COMPUTE)
    factor = number(share, COMPUTE)
    factor *= load_factor(grad_output_ptr, m, M, GRAD_PER_POSITION, COMPUTE)
    if OF_LABELS:
        mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
        terms = load_label_terms(
            *(target_ptr, partner_ptr, lam_ptr, weight_ptr, totals_ptr, factor),
            *(mass, m, C, M, L, ignore_index, one_lam, rule, LAM_PER_SAMPLE, COMPUTE),
        )
    else:
        masses = zero_tile(BLOCK_C, BLOCK_M, M_AXIS, COMPUTE)
        c0 = 0
        while c0 < C:
            c = c0 + tl.arange(0, BLOCK_C)
            at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
            masses += load_counts(
                *(target_ptr, weight_ptr, at, c, C, inside, rule, OF_LABELS, M_AXIS, COMPUTE)
            )
            c0 += BLOCK_C
        terms = probability_terms(tl.sum(masses, AXIS), factor)
    largest = tl.load(stats_ptr + m, mask=m < M, other=0.0)
    total = tl.load(stats_ptr + M + m, mask=m < M, other=1.0)
    scale = terms.mass / total
    store_gradients(
        *(x_ptr, target_ptr, weight_ptr, gradient_ptr, m0, largest, scale, terms, C, M, L),
        *(rule, OF_LABELS, PAIR, SPREADS, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT),
    )
    if OF_LABELS:
        store_label_gradients(
            *(x_ptr, gradient_ptr, m0, largest, scale, terms, C, L),
            *(PAIR, SPREADS, M_AXIS, SHORT_ROWS, UNIT),
        )


@triton.jit
def rescale_kernel(
    x_ptr,  # [numel] in storage order
    factor_ptr,  # one number
    numel,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.load(factor_ptr).to(COMPUTE)
    if factor != 1.0:
        blocks = tl.cdiv(numel, BLOCK)
        block = tl.program_id(0)
        while block < blocks:
            at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            if block < blocks - 1:  # without a mask, which would take vectors apart
                x = tl.load(x_ptr + at).to(COMPUTE) * factor
                tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty))
            else:
                x = tl.load(x_ptr + at, mask=at < numel).to(COMPUTE) * factor
                tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < numel)
            block += tl.num_programs(0)


def _registers(
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    traced_smoothing: Tensor | None,
) -> int:
    """How many an element of a tile takes: an exponential, and what its class counts for."""
    weighs = weight is not None and (traced_smoothing is not None or label_smoothing > 0.0)
    return 4 if weighs or target.is_floating_point() else 1


def cross_entropy(
    input: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op: (loss, stats, gradient)."""
    of_target = (target, partner, lam, one_lam)
    options = (weight, ignore_index, label_smoothing, reduction, traced_smoothing)
    tiles = plan(input, _registers(target, weight, label_smoothing, traced_smoothing))
    loss, stats, gradient = empty_results(input, 2, reduction, keep_gradient, tiles.programs)
    with device_of(input):
        cross_entropy_kernel[(tiles.programs,)](
            x_ptr=input,
            loss_ptr=loss,
            stats_ptr=stats,
            gradient_ptr=gradient if keep_gradient else None,
            SUMS=reduction != NONE,
            SINGLE=tiles.single,
            **target_arguments(input, *of_target, *options),
            **tiles.arguments,
        )
    return finished(loss, input, reduction), stats, gradient


def cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
) -> Tensor:
    """The op's gradient by the input."""
    of_target = (target, partner, lam, one_lam)
    options = (weight, ignore_index, label_smoothing, reduction, traced_smoothing)
    tiles = plan(input, _registers(target, weight, label_smoothing, traced_smoothing), loops=True)
    gradient = dense_like(input)
    with device_of(input):
        cross_entropy_backward_kernel[(tiles.programs,)](
            grad_output_ptr=grad_output,
            x_ptr=input,
            stats_ptr=stats,
            gradient_ptr=gradient,
            GRAD_PER_POSITION=grad_output.dim() > 0,
            **target_arguments(input, *of_target, *options),
            **tiles.arguments,
        )
    return gradient


def rescale_(x: Tensor, factor: Tensor) -> None:
    """The dense x times the one number in `factor`; where that is 1, x is not even read."""
    if x.numel() == 0:
        return
    programs = min(triton.cdiv(x.numel(), BLOCK), PROGRAMS * processors(x))
    with device_of(x):
        rescale_kernel[(programs,)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=8)
