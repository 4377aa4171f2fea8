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

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._channels import known_sizes, position_of, tile_at, zero_tile
from ._launch import ceil_div, device_of, processors
from ._loss import TargetCall, launch_backward, launch_forward
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
    probability_terms,
    store_gradients,
    store_label_gradients,
    store_loss,
    tile_gradients,
)

BLOCK = 4096  # elements at a time of what is rescaled
PROGRAMS = (
    4  # that rescale, to a multiprocessor: they are done at once where there is nothing to do
)


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
    SUMS: tl.constexpr,
    SINGLE: tl.constexpr,  # whether one tile holds all classes
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
    factor = number(share, COMPUTE)
    if KIND.OF_LABELS:
        mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
        terms = load_label_terms(targets, factor, mass, m, sizes, KIND, COMPUTE)

    if SINGLE:
        c = tl.arange(0, TILES.BLOCK_C)
        at, inside = tile_at(m0, 0, sizes, TILES)
        x = load_logits(x_ptr, at, inside, COMPUTE)
        largest = bounded(tl.max(x, AXIS))
        x -= tl.expand_dims(largest, AXIS)
        e = tl.exp(x)
        total = tl.sum(e, AXIS)
        v, z = 0.0, 0.0
        if KIND.SPREADS:
            v = load_counts(targets, at, c, C, inside, KIND, M_AXIS, COMPUTE)
            z = tl.sum(tl.where(inside, v * x, 0.0), AXIS)
            if not KIND.OF_LABELS:
                mass = tl.sum(v, AXIS)
    else:
        largest = tl.full(m.shape, float("-inf"), COMPUTE)
        pivot = tl.zeros(m.shape, COMPUTE)
        totals = zero_tile(TILES, COMPUTE)
        zs = zero_tile(TILES, COMPUTE)
        masses = zero_tile(TILES, COMPUTE)
        c0 = 0
        while c0 < C:
            c = c0 + tl.arange(0, TILES.BLOCK_C)
            at, inside = tile_at(m0, c0, sizes, TILES)
            x = load_logits(x_ptr, at, inside, COMPUTE)
            larger = bounded(tl.maximum(largest, tl.max(x, AXIS)))
            before = tl.exp(largest - larger)
            e = tl.exp(x - tl.expand_dims(larger, AXIS))
            totals = totals * tl.expand_dims(before, AXIS) + e
            largest = larger
            if KIND.SPREADS:
                # Off with what is about the size of all: sums of 1e4 would round a loss of 1 away.
                pivot = tl.where(c0 == 0, larger, pivot)
                v = load_counts(targets, at, c, C, inside, KIND, M_AXIS, COMPUTE)
                zs += tl.where(inside, v * (x - tl.expand_dims(pivot, AXIS)), 0.0)
                if not KIND.OF_LABELS:
                    masses += v
            c0 += TILES.BLOCK_C
        total = tl.sum(totals, AXIS)
        z = 0.0
        if KIND.SPREADS:
            if not KIND.OF_LABELS:
                mass = tl.sum(masses, AXIS)
            z = tl.sum(zs, AXIS) - mass * (largest - pivot)

    if not KIND.OF_LABELS:
        terms = probability_terms(mass, factor)
    tl.store(stats_ptr + m, largest, mask=m < M)
    tl.store(stats_ptr + M + m, total, mask=m < M)
    loss = load_loss(x_ptr, terms, largest, total, z, mass, m0, sizes, KIND, TILES)
    store_loss(loss_ptr, loss, totals_ptr, m, M, KIND, SUMS)

    if gradient_ptr is not None:
        slopes = Slopes(x_ptr, gradient_ptr, largest, terms.mass / total)
        if SINGLE:
            gradient = e * tl.expand_dims(slopes.hard, AXIS)
            gradient = tile_gradients(gradient, v, terms, KIND, AXIS)
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
            if KIND.OF_LABELS:
                store_label_gradients(slopes, terms, m0, sizes, KIND, TILES)
        else:
            store_gradients(slopes, targets, terms, m0, sizes, KIND, TILES)


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
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 1 - TILES.M_AXIS
    sizes = known_sizes(C, M, L, TILES)
    C, M = sizes.C, sizes.M
    m0 = position_of(tl.program_id(0), TILES)
    m = m0 + tl.arange(0, TILES.BLOCK_M)
    rule = load_rule(hard, smooth, traced_smoothing_ptr, sizes.C, COMPUTE)
    targets = Targets(
        *(target_ptr, partner_ptr, lam_ptr, weight_ptr, weight_sum_ptr, totals_ptr),
        *(ignore_index, one_lam, rule),
    )
    factor = number(share, COMPUTE)
    factor *= load_factor(grad_output_ptr, m, M, GRAD_PER_POSITION, COMPUTE)
    if KIND.OF_LABELS:
        mass = load_weight_sum(weight_sum_ptr, C, COMPUTE)
        terms = load_label_terms(targets, factor, mass, m, sizes, KIND, COMPUTE)
    else:
        masses = zero_tile(TILES, COMPUTE)
        c0 = 0
        while c0 < C:
            c = c0 + tl.arange(0, TILES.BLOCK_C)
            at, inside = tile_at(m0, c0, sizes, TILES)
            masses += load_counts(targets, at, c, C, inside, KIND, TILES.M_AXIS, COMPUTE)
            c0 += TILES.BLOCK_C
        terms = probability_terms(tl.sum(masses, AXIS), factor)
    largest = tl.load(stats_ptr + m, mask=m < M, other=0.0)
    total = tl.load(stats_ptr + M + m, mask=m < M, other=1.0)
    slopes = Slopes(x_ptr, gradient_ptr, largest, terms.mass / total)
    store_gradients(slopes, targets, terms, m0, sizes, KIND, TILES)


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


def _registers(call: TargetCall) -> int:
    """How many an element of a tile takes: an exponential, and what its class counts for."""
    weighs = call.weight is not None and call.smooths
    return 4 if weighs or call.target.is_floating_point() else 1


def cross_entropy(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, of its schema's arguments: (loss, stats, gradient)."""
    *target, keep_gradient = arguments
    call = TargetCall(*target)
    return launch_forward(cross_entropy_kernel, input, call, _registers(call), 2, keep_gradient)


def cross_entropy_backward(
    grad_output: Tensor, input: Tensor, stats: Tensor, *target: Any
) -> Tensor:
    """The op's gradient by the input."""
    call = TargetCall(*target)
    kernel = cross_entropy_backward_kernel
    return launch_backward(kernel, grad_output, input, stats, call, _registers(call))


def rescale_(x: Tensor, factor: Tensor) -> None:
    """The dense x times the one number in `factor`; where that is 1, x is not even read."""
    if x.numel() == 0:
        return
    programs = min(ceil_div(x.numel(), BLOCK), PROGRAMS * processors(x))
    with device_of(x):
        rescale_kernel[(programs,)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=8)
