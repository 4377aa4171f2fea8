"""The losses of logits and their gradients: one pair of kernels, with a teacher or without.

A program takes a block of positions with all of their classes. Either one tile holds them all
(SINGLE), and the program keeps its exponentials for the gradient. Or the program walks tile by
tile, and for the gradient again from the last tile to the first.

The loops are `while`, as in batch_norm.py. No jit function returns a None, nor a tuple with one:
Triton refuses that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._channels import tile_at, zero_tile
from ._softmax import (
    Slopes,
    Stats,
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
    positions_of,
    probability_terms,
    soft_gradients,
    store_gradients,
    store_label_gradients,
    store_loss,
    tile_gradients,
)
from ._types import compute_type

UNSPECIALISED = ["ignore_index", "mean_of"]  # no recompiling by value


# With a teacher; distillation_math.h has the formulas.


@triton.jit
def divergence_terms(e_t, above_t, above):
    """What each class adds to Z, times T; divergence_term in distillation_math.h."""
    return e_t * (bounded(above_t) - above)


@triton.jit
def divergence(total_t, softened, z):
    """The KL of positions, from the teacher's and the student's sums at T."""
    return z / total_t + tl.log(softened / total_t)


class Softness(NamedTuple):
    """The factors that temperature and alpha give to the parts of a loss."""

    share: Any  # of its labels' loss: 1 - alpha; of probabilities under a mean, 1 / positions
    soft_share: Any  # of its divergence: alpha T^2; under a mean, that / positions
    inverse_t: Any


@triton.jit
def load_softness(share, soft_share, inverse_t, softness_ptr, mean_of, COMPUTE: tl.constexpr):
    """The Softness from the arguments, or from a temperature and an alpha in memory."""
    if softness_ptr is None:
        softness = Softness(
            number(share, COMPUTE), number(soft_share, COMPUTE), number(inverse_t, COMPUTE)
        )
    else:
        temperature, alpha = tl.load(softness_ptr), tl.load(softness_ptr + 1)
        softness = Softness(
            (1.0 - alpha).to(COMPUTE),
            (alpha * temperature * temperature / mean_of).to(COMPUTE),
            (1.0 / temperature).to(COMPUTE),
        )
    return softness


# The walk over classes


class Sums(NamedTuple):
    """What a walk over classes gathers. The largest and the pivot have one value a position,
    [BLOCK_M]. The others have one for each place in a tile, to which every tile adds its own; after
    a single tile they are that tile's values, and the gradient is made of them. What is not wanted
    is 0."""

    largest: Any
    largest_t: Any  # of the teacher's
    pivot: Any  # the first tile's largest, where KIND.SPREADS
    totals: Any  # exponentials, relative to the largest
    softs: Any  # the exponentials at T
    softs_t: Any  # the teacher's
    zs_t: Any  # what the divergence sums up: divergence_terms
    zs: Any  # v (x - pivot): without the pivot, sums near 1e4 would round 1 away
    counts: Any  # v of Terms


@triton.jit
def no_sums(teacher_ptr, KIND: tl.constexpr, COMPUTE: tl.constexpr, TILES: tl.constexpr):
    """The Sums of no class."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    zeros = zero_tile(TILES, COMPUTE)
    largest = tl.full([BLOCK_M], float("-inf"), COMPUTE)
    largest_t, softs, pivot, zs, counts = 0.0, 0.0, 0.0, 0.0, 0.0
    if teacher_ptr is not None:
        largest_t, softs = largest, zeros
    if KIND.SPREADS:
        pivot, zs = tl.zeros([BLOCK_M], COMPUTE), zeros
    if not KIND.OF_LABELS:
        counts = zeros
    return Sums(largest, largest_t, pivot, zeros, softs, softs, softs, zs, counts)


@triton.jit
def with_tile(
    sums,  # of the tiles before, or None where SINGLE
    c0,
    x_ptr,
    teacher_ptr,
    inverse_t,
    targets,
    positions,
    SINGLE: tl.constexpr,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    """The sums after the tile of the classes from c0 on."""
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty)
    AXIS: tl.constexpr = 1 - TILES.M_AXIS
    at, inside = tile_at(positions.m0, c0, positions.sizes, TILES)
    x = load_logits(x_ptr, at, inside, COMPUTE)
    if teacher_ptr is not None:  # loaded before anything waits for x
        t = load_logits(teacher_ptr, at, inside, COMPUTE)
    largest = tl.max(x, AXIS)
    largest = bounded(largest if SINGLE else tl.maximum(sums.largest, largest))
    largest_t, softs, softs_t, zs_t = 0.0, 0.0, 0.0, 0.0
    if teacher_ptr is not None:
        largest_t = tl.max(t, AXIS)
        largest_t = bounded(largest_t if SINGLE else tl.maximum(sums.largest_t, largest_t))
        t -= tl.expand_dims(largest_t, AXIS)
    above = x - tl.expand_dims(largest, AXIS)
    if SINGLE:
        totals = tl.exp(above)
    else:
        # The sums of the tiles before, made relative to the new maxima.
        rise = sums.largest - largest
        totals = sums.totals * tl.expand_dims(tl.exp(rise), AXIS) + tl.exp(above)
    if teacher_ptr is not None:
        softs, softs_t = tl.exp(above * inverse_t), tl.exp(t * inverse_t)
        zs_t = tl.where(inside, divergence_terms(softs_t, t, above), 0.0)
        if not SINGLE:
            rise_t = sums.largest_t - largest_t
            softs = sums.softs * tl.expand_dims(tl.exp(rise * inverse_t), AXIS) + softs
            before = tl.expand_dims(tl.exp(rise_t * inverse_t), AXIS)
            # In the first tile the rise is infinite.
            shift = sums.softs_t * tl.expand_dims(rise_t - rise, AXIS)
            shift = tl.where(sums.softs_t > 0.0, shift, 0.0)
            zs_t = (sums.zs_t + shift) * before + zs_t
            softs_t = sums.softs_t * before + softs_t
    pivot, zs, counts = 0.0, 0.0, 0.0
    if KIND.SPREADS:
        counts = load_counts(targets, at, c0, inside, positions.sizes, KIND, TILES)
        pivot = largest if SINGLE else tl.where(c0 == 0, largest, sums.pivot)
        zs = tl.where(inside, counts * (x - tl.expand_dims(pivot, AXIS)), 0.0)
        if not SINGLE:
            zs += sums.zs
            counts = sums.counts if KIND.OF_LABELS else sums.counts + counts
    return Sums(largest, largest_t, pivot, totals, softs, softs_t, zs_t, zs, counts)


@triton.jit
def store_stats(ptr, stats, m, M, teacher_ptr):
    for i in tl.static_range(2 if teacher_ptr is None else 5):
        tl.store(ptr + m, stats[i], mask=m < M)
        ptr += M  # i * M might overflow M's type


@triton.jit
def load_stats(ptr, m, M, teacher_ptr):
    ptr += m
    inside = m < M
    largest = tl.load(ptr, mask=inside, other=0.0)
    total = tl.load(ptr + M, mask=inside, other=1.0)
    stats = Stats(largest, total)
    if teacher_ptr is not None:
        softened = tl.load(ptr + M + M, mask=inside, other=1.0)
        largest_t = tl.load(ptr + M + M + M, mask=inside, other=0.0)
        total_t = tl.load(ptr + M + M + M + M, mask=inside, other=1.0)
        stats = Stats(largest, total, softened, largest_t, total_t)
    return stats


# Kernels


@triton.jit(do_not_specialize=UNSPECIALISED)
def loss_kernel(
    x_ptr,  # [N, C, L] in either layout
    teacher_ptr,  # as x lies, or None
    target,  # TargetPointers
    C,
    M,
    L,
    ignore_index: tl.int64,
    one_lam: tl.float64,
    hard: tl.float64,
    smooth: tl.float64,
    share: tl.float64,
    soft_share: tl.float64,
    inverse_t: tl.float64,
    softness_ptr,  # float64 [2], T and alpha, used instead of the three above; or None
    mean_of,  # the number of positions under a mean, else 1
    loss_ptr,  # [M], or float64 [programs] where SUMS
    stats_ptr,  # Stats
    gradient_ptr,  # as x lies, or None
    SUMS: tl.constexpr,
    SINGLE: tl.constexpr,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty)
    AXIS: tl.constexpr = 1 - TILES.M_AXIS
    positions = positions_of(C, M, L, TILES)
    m, M = positions.m, positions.sizes.M
    rule = load_rule(hard, smooth, target.smoothing, positions.sizes.C, COMPUTE)
    targets = Targets(target, ignore_index, one_lam, rule)
    softness = load_softness(share, soft_share, inverse_t, softness_ptr, mean_of, COMPUTE)
    if KIND.OF_LABELS:
        mass = load_weight_sum(target.weight_sum, positions.sizes.C, COMPUTE)
        terms = load_label_terms(targets, softness.share, mass, positions, KIND, COMPUTE)

    if SINGLE:
        sums = with_tile(
            *(None, 0, x_ptr, teacher_ptr, softness.inverse_t, targets, positions),
            SINGLE=True,
            KIND=KIND,
            TILES=TILES,
        )
    else:
        sums = no_sums(teacher_ptr, KIND, COMPUTE, TILES)
        c0 = 0
        while c0 < positions.sizes.C:
            sums = with_tile(
                *(sums, c0, x_ptr, teacher_ptr, softness.inverse_t, targets, positions),
                SINGLE=False,
                KIND=KIND,
                TILES=TILES,
            )
            c0 += TILES.BLOCK_C

    stats = Stats(sums.largest, tl.sum(sums.totals, AXIS))
    if teacher_ptr is not None:
        softened, total_t = tl.sum(sums.softs, AXIS), tl.sum(sums.softs_t, AXIS)
        stats = Stats(stats.largest, stats.total, softened, sums.largest_t, total_t)
        z_t = tl.sum(sums.zs_t, AXIS)
    z = tl.sum(sums.zs, AXIS) if KIND.SPREADS else 0.0
    if not KIND.OF_LABELS:
        mass = tl.sum(sums.counts, AXIS)
        terms = probability_terms(mass, softness.share)
    if KIND.SPREADS and not SINGLE:
        z -= mass * (stats.largest - sums.pivot)
    store_stats(stats_ptr, stats, m, M, teacher_ptr)
    loss = load_loss(x_ptr, terms, stats.largest, stats.total, z, mass, positions, KIND, TILES)
    if teacher_ptr is not None:
        z_t *= softness.inverse_t
        loss += softness.soft_share * divergence(stats.total_t, stats.softened, z_t)
    store_loss(loss_ptr, loss, target.totals, m, M, KIND, SUMS)

    if gradient_ptr is not None:
        soft = softness.soft_share * softness.inverse_t
        slopes = Slopes(
            *(x_ptr, teacher_ptr, gradient_ptr, stats),
            hard=terms.mass / stats.total,
            soft=soft / stats.softened,
            soft_t=soft / stats.total_t,
            inverse_t=softness.inverse_t,
        )
        if SINGLE:
            at, inside = tile_at(positions.m0, 0, positions.sizes, TILES)
            slope = sums.totals * tl.expand_dims(slopes.hard, AXIS)
            gradient = tile_gradients(slope, sums.counts, terms, KIND, AXIS)
            if teacher_ptr is not None:
                gradient += soft_gradients(sums.softs, sums.softs_t, slopes, AXIS)
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
            if KIND.OF_LABELS:
                store_label_gradients(slopes, terms, positions, KIND, TILES)
        else:
            store_gradients(slopes, targets, terms, positions, KIND, TILES)


@triton.jit(do_not_specialize=UNSPECIALISED)
def loss_backward_kernel(
    grad_output_ptr,  # [M], or one number
    x_ptr,  # from here on as in loss_kernel
    teacher_ptr,
    target,
    C,
    M,
    L,
    ignore_index: tl.int64,
    one_lam: tl.float64,
    hard: tl.float64,
    smooth: tl.float64,
    share: tl.float64,
    soft_share: tl.float64,
    inverse_t: tl.float64,
    softness_ptr,
    mean_of,
    stats_ptr,
    gradient_ptr,
    GRAD_PER_POSITION: tl.constexpr,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty)
    positions = positions_of(C, M, L, TILES)
    m, C, M = positions.m, positions.sizes.C, positions.sizes.M
    rule = load_rule(hard, smooth, target.smoothing, positions.sizes.C, COMPUTE)
    targets = Targets(target, ignore_index, one_lam, rule)
    softness = load_softness(share, soft_share, inverse_t, softness_ptr, mean_of, COMPUTE)
    factor = load_factor(grad_output_ptr, m, M, GRAD_PER_POSITION, COMPUTE)
    share = softness.share * factor
    if KIND.OF_LABELS:
        mass = load_weight_sum(target.weight_sum, C, COMPUTE)
        terms = load_label_terms(targets, share, mass, positions, KIND, COMPUTE)
    else:
        counts = zero_tile(TILES, COMPUTE)
        c0 = 0
        while c0 < C:
            at, inside = tile_at(positions.m0, c0, positions.sizes, TILES)
            counts += load_counts(targets, at, c0, inside, positions.sizes, KIND, TILES)
            c0 += TILES.BLOCK_C
        terms = probability_terms(tl.sum(counts, 1 - TILES.M_AXIS), share)
    stats = load_stats(stats_ptr, m, M, teacher_ptr)
    soft = factor * softness.soft_share * softness.inverse_t
    slopes = Slopes(
        *(x_ptr, teacher_ptr, gradient_ptr, stats),
        hard=terms.mass / stats.total,
        soft=soft / stats.softened,
        soft_t=soft / stats.total_t,
        inverse_t=softness.inverse_t,
    )
    store_gradients(slopes, targets, terms, positions, KIND, TILES)
