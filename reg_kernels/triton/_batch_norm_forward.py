"""BatchNorm's forward kernels: moments, and the chain from the input to the output.

`batch_norm.py` says how they go together and which bytes they move.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._rng import TAG_DROPOUT
from ._activation import LEAKY_RELU, RELU, activate
from ._batch_norm import (
    GIVEN,
    MERGED,
    OF_RANKS,
    UNSPECIALISED,
    channel_affine,
    load_channels,
    load_partials,
    normalised,
    program_range,
    store_channels,
    store_partials,
)
from ._bits import pack_bits
from ._channels import gate_at, known_sizes, position_of, run_starts, shorter, tile_at
from ._elementwise import Draws, load_draws
from ._moments import merge_all, merged_m2, pivot_of, tile_moments
from ._random import half_word_runs
from ._types import compute_type
from .dropout import dropout_values

TAG = tl.constexpr(TAG_DROPOUT)


@triton.jit
def gate_bits(z, kept, ACTIVATION: tl.constexpr, DROPS: tl.constexpr):
    """What the backward has to know of an element; has_gate in batch_norm_math.h."""
    if ACTIVATION == RELU:
        kept = kept & ((z <= 0.0) == 0)
    elif ACTIVATION == LEAKY_RELU and not DROPS:
        kept = z > 0.0
    return kept


@triton.jit
def load_tile(x_ptr, m0, c0, sizes, COMPUTE: tl.constexpr, TILES: tl.constexpr):
    """(x, offsets, inside) of the tile at position m0 and channel c0; x is 0 outside."""
    at, inside = tile_at(m0, c0, sizes, TILES)
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE), at, inside


@triton.jit
def range_moments(x_ptr, c0, first, last, sizes, COMPUTE: tl.constexpr, TILES: tl.constexpr):
    """(mean, m2) in float64 of tiles first to last - 1."""
    M_AXIS: tl.constexpr = TILES.M_AXIS
    start = position_of(first, TILES)
    # By the first values: of several, so that an outlier weighs less.
    SAMPLE: tl.constexpr = shorter(TILES, 8)
    sample = load_tile(x_ptr, start, c0, sizes, COMPUTE, SAMPLE)[0]
    pivot = pivot_of(sample, tl.minimum(sizes.M - start, SAMPLE.BLOCK_M), M_AXIS)
    count = start * 0
    total = tl.zeros_like(pivot)
    m2 = tl.zeros_like(pivot)
    tile = first
    while tile < last:
        m0 = position_of(tile, TILES)
        x, _, inside = load_tile(x_ptr, m0, c0, sizes, COMPUTE, TILES)
        x = tl.where(inside, x - tl.expand_dims(pivot, M_AXIS), 0.0)
        more = tl.minimum(sizes.M - m0, TILES.BLOCK_M)
        tile_total, tile_m2 = tile_moments(x, inside, more, M_AXIS)
        m2 = merged_m2(count, total, m2, more, tile_total, tile_m2)
        total += tile_total
        count += more
        tile += 1
    mean = pivot.to(tl.float64) + total.to(tl.float64) * (1.0 / count.to(tl.float64))
    return mean, m2.to(tl.float64)


@triton.jit
def merged_range_moments(
    partials_ptr, c, sizes, tiles, splits, share, BLOCK_S: tl.constexpr, TILES: tl.constexpr
):
    """(mean, m2) of all parts of channels c that moments_kernel has left."""
    means, m2s, part = load_partials(partials_ptr, c, sizes.C, splits, BLOCK_S, TILES.M_AXIS)
    start = position_of(part * tiles, TILES)
    counts = tl.maximum(tl.minimum(sizes.M - start, tiles * TILES.BLOCK_M), 0).to(tl.float64)
    counts = tl.where(part < splits, counts, 0.0)
    return merge_all(counts, means, m2s, share, TILES.M_AXIS)


@triton.jit
def move_statistics(
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    c,
    C,
    mean,
    unbiased,
    momentum,
    writes,
    AVERAGES: tl.constexpr,
):
    """Moves the running statistics of channels c, where `writes`."""
    factor = tl.full([1], momentum, tl.float64)
    if AVERAGES:
        factor = 1.0 / (tl.load(batches_ptr) + 1 + tl.zeros([1], tl.float64))
    average = load_channels(running_mean_ptr, c, C, 0.0)
    spread = load_channels(running_var_ptr, c, C, 0.0)
    average = (1.0 - factor) * average + factor * mean
    spread = (1.0 - factor) * spread + factor * unbiased
    store_channels(running_mean_ptr, average, c, writes)
    store_channels(running_var_ptr, spread, c, writes)


@triton.jit
def count_batch(batches_ptr):
    """One program of all counts."""
    alone = tl.program_id(0) == 0
    tl.store(batches_ptr, tl.load(batches_ptr, mask=alone, other=0) + 1, mask=alone)


@triton.jit
def forward_tile(
    x,  # the values at `at`
    at,
    inside,
    m0,
    c0,
    affine,
    residual_ptr,
    y_ptr,
    gate_ptr,
    slope,
    draws,
    element_offset,
    sizes,
    CHAIN: tl.constexpr,
    TILES: tl.constexpr,
):
    """Everything behind the statistics, for one tile."""
    z = normalised(x, affine, TILES.M_AXIS)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(z.dtype)
    y = activate(z, slope, CHAIN.ACTIVATION)
    kept = inside
    if CHAIN.DROPS:
        starts = run_starts(m0, c0, sizes, CHAIN.RUN, TILES) + element_offset
        drawn = half_word_runs(draws.key, draws.offset, starts, CHAIN.RUN)
        y = dropout_values(y, drawn, draws.threshold, draws.scale)
        kept = kept & (drawn < draws.threshold)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if gate_ptr is not None:
        bits = gate_bits(z, kept, CHAIN.ACTIVATION, CHAIN.DROPS) & inside
        gate, whole = gate_at(m0, c0, sizes, CHAIN.GATE_AXIS, TILES)
        tl.store(gate_ptr + gate, pack_bits(bits, CHAIN.GATE_AXIS), mask=whole)


# Kernels


@triton.jit
def moments_kernel(
    x_ptr,  # [N, C, L] in either layout
    partials_ptr,  # [2, C, splits]: mean and m2 of each part
    C,
    M,
    L,
    tiles,  # a part
    splits,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty)
    sizes = known_sizes(C, M, L, TILES)
    c0, split, first, last = program_range(sizes, tiles, False, TILES)
    mean, m2 = range_moments(x_ptr, c0, first, last, sizes, COMPUTE, TILES)
    c = c0 + tl.arange(0, TILES.BLOCK_C)
    store_partials(partials_ptr, mean, m2, c, split, sizes.C, splits, TILES.M_AXIS)


@triton.jit
def merge_kernel(
    partials_ptr,  # of moments_kernel, [2, C, splits]
    moments_ptr,  # [4, C]: count, mean, what the mean has lost by its rounding, and m2
    C,
    M,
    L,
    tiles,
    splits,
    BLOCK_S: tl.constexpr,  # at least splits
    TILES: tl.constexpr,
):
    sizes = known_sizes(C, M, L, TILES)
    c = tl.program_id(0) * TILES.BLOCK_C + tl.arange(0, TILES.BLOCK_C)
    count = tl.full([TILES.BLOCK_C], sizes.M, tl.float64)
    mean, m2 = merged_range_moments(
        *(partials_ptr, c, sizes, tiles, splits, 1.0 / tl.full([1], sizes.M, tl.float64)),
        *(BLOCK_S, TILES),
    )
    inside = c < sizes.C
    tl.store(moments_ptr + c, count, mask=inside)
    tl.store(moments_ptr + sizes.C + c, mean, mask=inside)
    # What the parts have lost, they had lost before they were stored.
    tl.store(moments_ptr + 2 * sizes.C + c, tl.zeros_like(mean), mask=inside)
    tl.store(moments_ptr + 3 * sizes.C + c, m2, mask=inside)


@triton.jit
def ranks_kernel(
    gathered_ptr,  # [ranks, 4, C], as merge_kernel leaves them of each rank
    mean_ptr,  # [C], as all that follow
    invstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,  # int64, or None; moved on unless AVERAGES
    C,
    ranks,
    momentum: tl.float64,
    eps: tl.float64,
    AVERAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The statistics of all ranks, merged in their order: each rank gets the same bits. Means are
    merged as differences from the first one, which costs them no digits where they are large."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    count = tl.zeros([BLOCK_C], tl.float64)
    mean = tl.zeros([BLOCK_C], tl.float64)
    m2 = tl.zeros([BLOCK_C], tl.float64)
    base = tl.zeros([BLOCK_C], tl.float64)
    rank = ranks * 0
    while rank < ranks:
        of = gathered_ptr + 4 * rank.to(tl.int64) * C + c
        n = tl.load(of, mask=inside, other=0.0)
        other = tl.load(of + C, mask=inside, other=0.0)
        rest = tl.load(of + 2 * C, mask=inside, other=0.0)
        other_m2 = tl.load(of + 3 * C, mask=inside, other=0.0)
        base = tl.where(count > 0.0, base, tl.where(other - other == 0.0, other, 0.0))
        other = (other - base) + rest
        share = n / tl.maximum(count + n, 1.0)
        delta = tl.where((n > 0.0) & (count > 0.0), other - mean, 0.0)
        # An infinite mean stays so, as in a sum, and leaves no variance.
        moved = tl.where(delta - delta == 0.0, mean + delta * share, mean + other)
        mean = tl.where(count > 0.0, moved, other)
        m2 += other_m2 + delta * delta * (share * count) + (delta - delta)
        count += n
        rank += 1
    mean += base
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(invstd_ptr + c, tl.rsqrt(m2 / tl.maximum(count, 1.0) + eps), mask=inside)
    if running_mean_ptr is not None:
        # A single value has no unbiased variance.
        unbiased = m2 / tl.maximum(count - 1.0, 1.0)
        move_statistics(
            *(running_mean_ptr, running_var_ptr, batches_ptr, c, C, mean, unbiased, momentum),
            *(inside & (count > 1.0), AVERAGES),
        )
    if batches_ptr is not None and not AVERAGES:
        count_batch(batches_ptr)


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    x_ptr,  # [N, C, L]
    residual_ptr,  # likewise, or None
    y_ptr,  # likewise
    gate_ptr,  # C ceil(M / 8) bytes, or None
    weight_ptr,  # [C] or None, as all that follow
    bias_ptr,
    mean_ptr,  # written in training, but read of OF_RANKS
    invstd_ptr,
    running_mean_ptr,  # moved on in training, else the statistics
    running_var_ptr,
    batches_ptr,  # int64, or None; moved on unless AVERAGES
    partials_ptr,  # what MERGED merges
    state_ptr,
    C,
    M,
    L,
    tiles,
    splits,
    momentum: tl.float64,
    eps: tl.float64,
    slope: tl.float64,
    p: tl.float64,
    seed: tl.int64,
    offset: tl.int64,
    element_offset: tl.int64,  # mask index of element 0
    # GIVEN by the running ones, OWN of a range that is all, MERGED, or OF_RANKS by ranks_kernel
    STATISTICS: tl.constexpr,
    AVERAGES: tl.constexpr,  # the batches counted weigh alike; then the host moves the counter on
    SINGLE: tl.constexpr,  # whether a range is one tile, kept between the passes
    BLOCK_S: tl.constexpr,  # at least splits
    CHAIN: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty)
    M_AXIS: tl.constexpr = TILES.M_AXIS
    sizes = known_sizes(C, M, L, TILES)
    C, M = sizes.C, sizes.M
    c0, split, first, last = program_range(sizes, tiles, True, TILES)
    c = c0 + tl.arange(0, TILES.BLOCK_C)
    weight = load_channels(weight_ptr, c, C, 1.0)
    bias = load_channels(bias_ptr, c, C, 0.0)
    slope = tl.full([1], slope, tl.float64).to(COMPUTE)
    draws = Draws(0, 0, 0, 0)
    if CHAIN.DROPS:
        draws = load_draws(None, p, state_ptr, seed, offset, TAG)

    if SINGLE:
        m0 = position_of(first, TILES)
        x, at, inside = load_tile(x_ptr, m0, c0, sizes, COMPUTE, TILES)

    share = 1.0 / tl.full([1], M, tl.float64)
    if STATISTICS == GIVEN:
        mean = load_channels(running_mean_ptr, c, C, 0.0)
        variance = load_channels(running_var_ptr, c, C, 0.0)
    elif STATISTICS == OF_RANKS:
        mean = load_channels(mean_ptr, c, C, 0.0)
        variance = mean  # stands for what is not read
    elif STATISTICS == MERGED:
        mean, m2 = merged_range_moments(
            partials_ptr, c, sizes, tiles, splits, share, BLOCK_S, TILES
        )
        variance = m2 * share
    elif SINGLE:
        pivot = pivot_of(x, M, M_AXIS)
        deviation = tl.where(inside, x - tl.expand_dims(pivot, M_AXIS), 0.0)
        total, m2 = tile_moments(deviation, inside, M, M_AXIS)
        mean = pivot.to(tl.float64) + total.to(tl.float64) * share
        variance = m2.to(tl.float64) * share
    else:
        mean, m2 = range_moments(x_ptr, c0, first, last, sizes, COMPUTE, TILES)
        variance = m2 * share
    if STATISTICS == OF_RANKS:
        invstd = load_channels(invstd_ptr, c, C, 0.0)
    else:
        invstd = tl.rsqrt(variance + eps)

    if STATISTICS != GIVEN and STATISTICS != OF_RANKS:
        # One program of those that know these channels writes them, and alone reads what it moves.
        writes = (c < C) & (split == 0)
        store_channels(mean_ptr, mean, c, writes)
        store_channels(invstd_ptr, invstd, c, writes)
        if running_mean_ptr is not None:
            unbiased = variance * (M / tl.full([1], M - 1, tl.float64))
            move_statistics(
                *(running_mean_ptr, running_var_ptr, batches_ptr, c, C, mean, unbiased, momentum),
                *(writes, AVERAGES),
            )
        if batches_ptr is not None and not AVERAGES:
            count_batch(batches_ptr)

    affine = channel_affine(mean, invstd, weight, bias, COMPUTE)
    if SINGLE:
        forward_tile(
            *(x, at, inside, m0, c0, affine, residual_ptr, y_ptr, gate_ptr),
            *(slope, draws, element_offset, sizes, CHAIN, TILES),
        )
    else:
        # Half tiles: a tensor more, draws and the activation want their registers.
        HALF: tl.constexpr = shorter(TILES, 2)
        tile = 2 * last
        while tile > 2 * first:
            tile -= 1
            m0 = position_of(tile, HALF)
            x, at, inside = load_tile(x_ptr, m0, c0, sizes, COMPUTE, HALF)
            forward_tile(
                *(x, at, inside, m0, c0, affine, residual_ptr, y_ptr, gate_ptr),
                *(slope, draws, element_offset, sizes, CHAIN, HALF),
            )
