"""BatchNorm, residual, activation and dropout in Triton, and their gradients.

Bytes an element, s = sizeof(dtype), each residual read s and each gate access 1/8 more:
    moments_kernel         x                                        1 s
    forward_kernel         x, y                                     2 s
    gradient_sums_kernel   g, x                                     2 s
    backward_kernel        g, x, grad_input                         3 s; grad_residual 1 s
A program has a block of channels and a range of their positions (_channels.py). Where the blocks
alone keep the device busy, or a channel fits one tile, the second kernel takes the moments or sums
itself, in one launch: from a tile it then maps without reading it again (2 s forward, 3 s
backward), else from a range that it has just brought into the cache. Otherwise the range is split,
the first kernel leaves each part's moments or sums in a workspace, and the programs of the second
merge those of their channels, always in one order. The second pass walks the other way, from what
was read last.

The loops are `while`: Triton's interpreter takes no bounds of a `for` from a kernel's arguments
(numpy 2.4 refuses the conversion).

Shapes: input [N, C, L] of M = N L positions, channel values [C], workspace float64 [2, C, splits]
in an order of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._activation import has_gate, needs_preactivation
from .._layout import dense_like, is_channels_last
from .._rng import TAG_DROPOUT
from ._activation import LEAKY_RELU, RELU, activate, behind_activation
from ._bits import pack_bits, unpack_bits
from ._channels import gate_at, run_starts, tile_at
from ._launch import device_of, processors, state_arguments
from ._moments import merge_all, merged_m2, pivot_of, tile_moments
from ._plan import Plan, plan_for
from ._random import half_word_runs, load_state
from .dropout import dropout_values, load_rate

FORWARD_TILE = 16384  # bytes of x in a tile: with 8 warps, 4 loads of 16 bytes a thread
BACKWARD_TILE = 8192  # of x and of g each
MAP_TILE = 8192

# Where a kernel has its statistics, or sums, from.
GIVEN = tl.constexpr(0)
OWN = tl.constexpr(1)
MERGED = tl.constexpr(2)

UNSPECIALISED = ["seed", "offset"]  # no recompiling by value


# On values


@triton.jit
def rounded(values, COMPUTE: tl.constexpr):
    """Channel values in the elements' type; of a single channel without a layout of their own.

    A tensor [1] made from a merge would be spread over a tile first and then go through shared
    memory to the threads that want it.
    """
    values = values.to(COMPUTE)
    if values.shape[0] == 1:
        values = tl.full([1], tl.sum(values, 0), COMPUTE)
    return values


@triton.jit
def channel_affine(mean, invstd, weight, bias, COMPUTE: tl.constexpr, FROZEN: tl.constexpr):
    """(shift, scale, offset) of y = (x - shift) scale + offset; ChannelAffine of batch_norm_math.h.

    The shift is the mean as COMPUTE rounds it, the offset makes up for the rounding: x - shift is
    exact where the deviation is small beside the mean. Frozen statistics need no shift.
    """
    scale = invstd * weight
    shift = tl.zeros_like(mean).to(COMPUTE) if FROZEN else mean.to(COMPUTE)
    rest = mean - shift.to(tl.float64)  # NaN for an infinite mean, as its channel's values become
    return (
        rounded(shift, COMPUTE),
        rounded(scale, COMPUTE),
        rounded(bias - rest * scale, COMPUTE),
    )


@triton.jit
def channel_gradient(scale, mean, invstd, d_sum, dx_sum, share, COMPUTE: tl.constexpr):
    """(k1, k2, k3, sum d xhat) of grad_input = d k1 + (x - shift) k2 + k3; ChannelGradient.

    d_sum is sum d, dx_sum is sum d (x - shift), scale is weight invstd, share is 1 / M.
    """
    rest = mean - mean.to(COMPUTE).to(tl.float64)
    projection = invstd * (dx_sum - rest * d_sum)
    k2 = -scale * invstd * projection * share
    k3 = -scale * d_sum * share - k2 * rest
    return rounded(scale, COMPUTE), rounded(k2, COMPUTE), rounded(k3, COMPUTE), projection


@triton.jit
def gate_bits(z, kept, ACTIVATION: tl.constexpr, DROPS: tl.constexpr):
    """What the backward has to know of an element; has_gate in batch_norm_math.h."""
    if ACTIVATION == RELU:
        kept = kept & ((z <= 0.0) == 0)
    elif ACTIVATION == LEAKY_RELU and not DROPS:
        kept = z > 0.0
    return kept


@triton.jit
def behind_gate(g, z, bits, scale, slope, ACTIVATION: tl.constexpr, DROPS: tl.constexpr):
    """dL/dz where the forward kept those bits; dropout scaled by `scale`."""
    if ACTIVATION == RELU:
        g = tl.where(bits, g * scale, 0.0)
    elif ACTIVATION == LEAKY_RELU and not DROPS:
        g = tl.where(bits, g, g * slope)
    else:
        g = behind_activation(g * tl.where(bits, scale, 0.0), z, slope, ACTIVATION)
    return g


# On memory


@triton.jit
def load_channels(ptr, c, C, default: tl.constexpr):
    """Channel values in float64, `default` each where there are none."""
    if ptr is None:
        values = tl.full(c.shape, default, tl.float64)
    else:
        values = tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float64)
    return values


@triton.jit
def store_channels(ptr, values, c, mask):
    if ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)  # float64 to 16 bits is not one conversion everywhere
    tl.store(ptr + c, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def program_range(
    C, M, tiles, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, REVERSED: tl.constexpr
):
    """(first channel, number of the range, its first tile, the one behind its last)."""
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    blocks = tl.cdiv(C, BLOCK_C)
    split = program // blocks
    first = split * tiles
    return program % blocks * BLOCK_C, split, first, tl.minimum(first + tiles, tl.cdiv(M, BLOCK_M))


@triton.jit
def position_of(tile, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        tile = tile.to(tl.int64)
    return tile * BLOCK_M


@triton.jit
def partial_at(c, split, C, splits, M_AXIS: tl.constexpr):
    """Where the parts of channels c lie in a plane of the workspace: together for a merge."""
    return split * C + c if M_AXIS == 0 else c * splits + split


@triton.jit
def store_partials(ptr, a, b, c, split, C, splits, M_AXIS: tl.constexpr):
    at = partial_at(c, split, C, splits, M_AXIS)
    tl.store(ptr + at, a, mask=c < C)
    tl.store(ptr + C * splits + at, b, mask=c < C)


@triton.jit
def load_partials(ptr, c, C, splits, BLOCK_S: tl.constexpr, M_AXIS: tl.constexpr):
    """(a, b, numbers of the parts) with the parts along M_AXIS, zeros where there is none."""
    c = tl.expand_dims(c, M_AXIS)
    split = tl.expand_dims(tl.arange(0, BLOCK_S), 1 - M_AXIS)
    at = partial_at(c, split, C, splits, M_AXIS)
    inside = (c < C) & (split < splits)
    a = tl.load(ptr + at, mask=inside, other=0.0)
    return a, tl.load(ptr + C * splits + at, mask=inside, other=0.0), split


@triton.jit
def sampled_pivot(
    x_ptr,
    m0,
    c0,
    C,
    M,
    L,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The pivot of a range by its first values: of several, so that an outlier weighs less."""
    at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    return pivot_of(x, tl.minimum(M - m0, BLOCK_M), M_AXIS)


@triton.jit
def range_moments(
    x_ptr,
    c0,
    first,
    last,
    C,
    M,
    L,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(mean, m2) in float64 of tiles first to last - 1."""
    start = position_of(first, BLOCK_M, WIDE)
    pivot = sampled_pivot(
        x_ptr, start, c0, C, M, L, BLOCK_C, BLOCK_M // 8, M_AXIS, SHORT_ROWS, UNIT, COMPUTE
    )
    count = start * 0
    total = tl.zeros([BLOCK_C], COMPUTE)
    m2 = tl.zeros([BLOCK_C], COMPUTE)
    tile = first
    while tile < last:
        m0 = position_of(tile, BLOCK_M, WIDE)
        at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        x = tl.where(inside, x - tl.expand_dims(pivot, M_AXIS), 0.0)
        more = tl.minimum(M - m0, BLOCK_M)
        tile_total, tile_m2 = tile_moments(x, inside, more, M_AXIS)
        m2 = merged_m2(count, total, m2, more, tile_total, tile_m2)
        total += tile_total
        count += more
        tile += 1
    mean = pivot.to(tl.float64) + total.to(tl.float64) * (1.0 / count.to(tl.float64))
    return mean, m2.to(tl.float64)


@triton.jit
def forward_tile(
    x,  # the values at `at`
    at,
    inside,
    m0,
    c0,
    shift,
    scale,
    offset,
    residual_ptr,
    y_ptr,
    gate_ptr,
    slope,
    key,
    draw_offset,
    threshold,
    drop_scale,
    C,
    M,
    L,
    ACTIVATION: tl.constexpr,
    DROPS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    GATE_AXIS: tl.constexpr,
):
    """Everything behind the statistics, for one tile."""
    z = (x - tl.expand_dims(shift, M_AXIS)) * tl.expand_dims(scale, M_AXIS)
    z += tl.expand_dims(offset, M_AXIS)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(z.dtype)
    y = activate(z, slope, ACTIVATION)
    kept = inside
    if DROPS:
        starts = run_starts(m0, c0, C, L, RUN, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS)
        drawn = half_word_runs(key, draw_offset, starts, RUN)
        y = dropout_values(y, drawn, threshold, drop_scale)
        kept = kept & (drawn < threshold)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if gate_ptr is not None:
        bits = gate_bits(z, kept, ACTIVATION, DROPS) & inside
        gate, whole = gate_at(m0, c0, C, M, BLOCK_C, BLOCK_M, M_AXIS, GATE_AXIS)
        tl.store(gate_ptr + gate, pack_bits(bits, GATE_AXIS), mask=whole)


@triton.jit
def gradient_tile(
    g_ptr,
    x_ptr,
    residual_ptr,
    gate_ptr,
    m0,
    c0,
    shift,
    scale,
    offset,
    centre,
    slope,
    drop_scale,
    C,
    M,
    L,
    ACTIVATION: tl.constexpr,
    DROPS: tl.constexpr,
    NEEDS_Z: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    GATE_AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(d = dL/dz, x - centre, offsets, inside) of one tile."""
    at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    x = g  # stands for what is not read
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    z = g
    if NEEDS_Z:
        z = (x - tl.expand_dims(shift, M_AXIS)) * tl.expand_dims(scale, M_AXIS)
        z += tl.expand_dims(offset, M_AXIS)
        if residual_ptr is not None:
            z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    if gate_ptr is not None:
        gate, whole = gate_at(m0, c0, C, M, BLOCK_C, BLOCK_M, M_AXIS, GATE_AXIS)
        bits = unpack_bits(tl.load(gate_ptr + gate, mask=whole, other=0), GATE_AXIS)
        d = behind_gate(g, z, bits, drop_scale, slope, ACTIVATION, DROPS)
    else:
        d = behind_activation(g, z, slope, ACTIVATION)
    d = tl.where(inside, d, 0.0)
    return d, tl.where(inside, x - tl.expand_dims(centre, M_AXIS), 0.0), at, inside


@triton.jit
def store_gradients(
    d,
    x,
    at,
    inside,
    k1,
    k2,
    k3,
    grad_input_ptr,
    grad_residual_ptr,
    TRAINING: tl.constexpr,
    M_AXIS: tl.constexpr,
):
    """grad_residual = d, and grad_input from it; without x where the statistics are frozen."""
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + at, d.to(grad_residual_ptr.dtype.element_ty), mask=inside)
    if grad_input_ptr is not None:
        grad = d * tl.expand_dims(k1, M_AXIS)
        if TRAINING:
            grad += x * tl.expand_dims(k2, M_AXIS) + tl.expand_dims(k3, M_AXIS)
        tl.store(grad_input_ptr + at, grad.to(grad_input_ptr.dtype.element_ty), mask=inside)


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
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,  # divides M, and L or, channels last, C
    WIDE: tl.constexpr,  # whether positions need 64 bits
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    c0, split, first, last = program_range(C, M, tiles, BLOCK_C, BLOCK_M, False)
    mean, m2 = range_moments(
        x_ptr, c0, first, last, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT, WIDE, COMPUTE
    )
    c = c0 + tl.arange(0, BLOCK_C)
    store_partials(partials_ptr, mean, m2, c, split, C, splits, M_AXIS)


@triton.jit
def known_multiples(C, M, L, M_AXIS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """C, M and L in a form that tells the compiler what UNIT divides, so that it loads UNITs."""
    if WIDE:
        M = M.to(tl.int64)
    if UNIT > 1:
        if M_AXIS == 0:
            C = C // UNIT * UNIT
        else:
            M, L = M // UNIT * UNIT, L // UNIT * UNIT
    return C, M, L


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    x_ptr,  # [N, C, L]
    residual_ptr,  # likewise, or None
    y_ptr,  # likewise
    gate_ptr,  # C ceil(M / 8) bytes, or None
    weight_ptr,  # [C] or None, as all that follow
    bias_ptr,
    mean_ptr,  # written in training
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
    STATISTICS: tl.constexpr,  # GIVEN by the running ones, OWN of a range that is all, or MERGED
    ACTIVATION: tl.constexpr,
    DROPS: tl.constexpr,
    AVERAGES: tl.constexpr,  # the batches counted weigh alike; then the host moves the counter on
    TAG: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    SINGLE: tl.constexpr,  # whether a range is one tile, kept between the passes
    BLOCK_S: tl.constexpr,  # at least splits
    RUN: tl.constexpr,  # elements of one mask group that surely lie along the tile's second axis
    GATE_AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    c0, split, first, last = program_range(C, M, tiles, BLOCK_C, BLOCK_M, True)
    c = c0 + tl.arange(0, BLOCK_C)
    weight = load_channels(weight_ptr, c, C, 1.0)
    bias = load_channels(bias_ptr, c, C, 0.0)
    slope = tl.full([1], slope, tl.float64).to(COMPUTE)
    key, draw_offset, threshold, drop_scale = 0, 0, 0, 0
    if DROPS:
        key, draw_offset = load_state(state_ptr, seed, offset, ON_DEVICE)
        key = key ^ TAG
        threshold, drop_scale = load_rate(x_ptr, p, False)

    if SINGLE:
        m0 = position_of(first, BLOCK_M, WIDE)
        at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)

    share = 1.0 / tl.full([1], M, tl.float64)
    if STATISTICS == GIVEN:
        mean = load_channels(running_mean_ptr, c, C, 0.0)
        variance = load_channels(running_var_ptr, c, C, 0.0)
    elif STATISTICS == MERGED:
        means, m2s, part = load_partials(partials_ptr, c, C, splits, BLOCK_S, M_AXIS)
        start = position_of(part * tiles, BLOCK_M, WIDE)
        counts = tl.maximum(tl.minimum(M - start, tiles * BLOCK_M), 0).to(tl.float64)
        counts = tl.where(part < splits, counts, 0.0)
        mean, m2 = merge_all(counts, means, m2s, share, M_AXIS)
        variance = m2 * share
    elif SINGLE:
        pivot = pivot_of(x, M, M_AXIS)
        deviation = tl.where(inside, x - tl.expand_dims(pivot, M_AXIS), 0.0)
        total, m2 = tile_moments(deviation, inside, M, M_AXIS)
        mean = pivot.to(tl.float64) + total.to(tl.float64) * share
        variance = m2.to(tl.float64) * share
    else:
        mean, m2 = range_moments(
            *(x_ptr, c0, first, last, C, M, L, BLOCK_C, BLOCK_M),
            *(M_AXIS, SHORT_ROWS, UNIT, WIDE, COMPUTE),
        )
        variance = m2 * share
    invstd = tl.rsqrt(variance + eps)

    if STATISTICS != GIVEN:
        # One program of those that know these channels writes them, and alone reads what it moves.
        writes = (c < C) & (split == 0)
        store_channels(mean_ptr, mean, c, writes)
        store_channels(invstd_ptr, invstd, c, writes)
        if running_mean_ptr is not None:
            factor = tl.full([1], momentum, tl.float64)
            if AVERAGES:
                factor = 1.0 / (tl.load(batches_ptr) + 1 + tl.zeros([1], tl.float64))
            unbiased = variance * (M / tl.full([1], M - 1, tl.float64))
            average = load_channels(running_mean_ptr, c, C, 0.0)
            spread = load_channels(running_var_ptr, c, C, 0.0)
            average = (1.0 - factor) * average + factor * mean
            spread = (1.0 - factor) * spread + factor * unbiased
            store_channels(running_mean_ptr, average, c, writes)
            store_channels(running_var_ptr, spread, c, writes)
        if batches_ptr is not None and not AVERAGES:
            alone = tl.program_id(0) == 0
            tl.store(batches_ptr, tl.load(batches_ptr, mask=alone, other=0) + 1, mask=alone)

    shift, scale, bias = channel_affine(mean, invstd, weight, bias, COMPUTE, STATISTICS == GIVEN)
    if SINGLE:
        forward_tile(
            *(x, at, inside, m0, c0, shift, scale, bias, residual_ptr, y_ptr, gate_ptr),
            *(slope, key, draw_offset, threshold, drop_scale, C, M, L, ACTIVATION, DROPS, RUN),
            *(BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, GATE_AXIS),
        )
    else:
        # Half tiles: a tensor more, draws and the activation want their registers.
        HALF_M: tl.constexpr = BLOCK_M // 2
        tile = 2 * last
        while tile > 2 * first:
            tile -= 1
            m0 = position_of(tile, HALF_M, WIDE)
            at, inside = tile_at(m0, c0, C, M, L, BLOCK_C, HALF_M, M_AXIS, SHORT_ROWS, UNIT)
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
            forward_tile(
                *(x, at, inside, m0, c0, shift, scale, bias, residual_ptr, y_ptr, gate_ptr),
                *(slope, key, draw_offset, threshold, drop_scale, C, M, L, ACTIVATION, DROPS, RUN),
                *(BLOCK_C, HALF_M, M_AXIS, SHORT_ROWS, GATE_AXIS),
            )


@triton.jit
def gradient_sums_kernel(
    g_ptr,  # [N, C, L], as x, the residual and the gradients
    x_ptr,
    residual_ptr,  # or None
    gate_ptr,  # or None
    weight_ptr,  # [C] or None
    bias_ptr,
    mean_ptr,  # [C]
    invstd_ptr,
    grad_input_ptr,  # written where the statistics are frozen; or None
    grad_residual_ptr,  # or None
    partials_ptr,  # [2, C, splits]: sum d and sum d (x - shift) of each part
    C,
    M,
    L,
    tiles,
    splits,
    slope: tl.float64,
    p: tl.float64,
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPS: tl.constexpr,
    NEEDS_Z: tl.constexpr,
    GATE_AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    c0, split, first, last = program_range(C, M, tiles, BLOCK_C, BLOCK_M, False)
    c = c0 + tl.arange(0, BLOCK_C)
    mean, invstd = load_channels(mean_ptr, c, C, 0.0), load_channels(invstd_ptr, c, C, 0.0)
    weight, bias = load_channels(weight_ptr, c, C, 1.0), load_channels(bias_ptr, c, C, 0.0)
    shift, scale, bias = channel_affine(mean, invstd, weight, bias, COMPUTE, not TRAINING)
    slope = tl.full([1], slope, tl.float64).to(COMPUTE)
    drop_scale = load_rate(g_ptr, p, False)[1].to(COMPUTE)
    sums = range_sums(
        *(g_ptr, x_ptr, residual_ptr, gate_ptr, grad_input_ptr, grad_residual_ptr),
        *(c0, first, last, shift, scale, bias, mean.to(COMPUTE), slope, drop_scale, C, M, L),
        *(TRAINING, ACTIVATION, DROPS, NEEDS_Z, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT),
        *(GATE_AXIS, WIDE, COMPUTE),
    )
    store_partials(partials_ptr, sums[0], sums[1], c, split, C, splits, M_AXIS)


@triton.jit
def range_sums(
    g_ptr,
    x_ptr,
    residual_ptr,
    gate_ptr,
    grad_input_ptr,
    grad_residual_ptr,
    c0,
    first,
    last,
    shift,
    scale,
    bias,
    centre,
    slope,
    drop_scale,
    C,
    M,
    L,
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPS: tl.constexpr,
    NEEDS_Z: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    GATE_AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(sum d, sum d (x - centre)) in float64 of tiles first to last - 1; stores what is wanted."""
    # Each lane sums for itself: within the loop no thread waits for another.
    shape: tl.constexpr = [BLOCK_M, BLOCK_C] if M_AXIS == 0 else [BLOCK_C, BLOCK_M]
    d_sum = tl.zeros(shape, COMPUTE)
    dx_sum = tl.zeros(shape, COMPUTE)
    tile = first
    while tile < last:
        m0 = position_of(tile, BLOCK_M, WIDE)
        d, x, at, inside = gradient_tile(
            *(g_ptr, x_ptr, residual_ptr, gate_ptr, m0, c0, shift, scale, bias, centre),
            *(slope, drop_scale, C, M, L, ACTIVATION, DROPS, NEEDS_Z),
            *(BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT, GATE_AXIS, COMPUTE),
        )
        d_sum += d
        dx_sum += d * x
        if not TRAINING or grad_input_ptr is None:
            store_gradients(
                *(d, x, at, inside, scale, scale, scale, grad_input_ptr, grad_residual_ptr),
                *(False, M_AXIS),
            )
        tile += 1
    return tl.sum(d_sum, M_AXIS).to(tl.float64), tl.sum(dx_sum, M_AXIS).to(tl.float64)


@triton.jit
def backward_kernel(
    g_ptr,  # [N, C, L], as x, the residual and the gradients
    x_ptr,  # or None where nothing depends on it
    residual_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    invstd_ptr,
    grad_input_ptr,  # or None where it is not wanted, as all gradients
    grad_residual_ptr,
    grad_weight_ptr,  # [C]
    grad_bias_ptr,
    partials_ptr,  # what MERGED merges
    C,
    M,
    L,
    tiles,
    splits,
    slope: tl.float64,
    p: tl.float64,
    SUMS: tl.constexpr,  # GIVEN: none are needed; OWN or MERGED, as forward_kernel's STATISTICS
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPS: tl.constexpr,
    NEEDS_Z: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GATE_AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, M, L = known_multiples(C, M, L, M_AXIS, UNIT, WIDE)
    c0, split, first, last = program_range(C, M, tiles, BLOCK_C, BLOCK_M, True)
    c = c0 + tl.arange(0, BLOCK_C)
    mean, invstd = load_channels(mean_ptr, c, C, 0.0), load_channels(invstd_ptr, c, C, 0.0)
    weight, bias = load_channels(weight_ptr, c, C, 1.0), load_channels(bias_ptr, c, C, 0.0)
    shift, scale, bias = channel_affine(mean, invstd, weight, bias, COMPUTE, not TRAINING)
    centre = mean.to(COMPUTE)
    slope = tl.full([1], slope, tl.float64).to(COMPUTE)
    drop_scale = load_rate(g_ptr, p, False)[1].to(COMPUTE)

    if SINGLE:
        m0 = position_of(first, BLOCK_M, WIDE)
        d, x, at, inside = gradient_tile(
            *(g_ptr, x_ptr, residual_ptr, gate_ptr, m0, c0, shift, scale, bias, centre),
            *(slope, drop_scale, C, M, L, ACTIVATION, DROPS, NEEDS_Z),
            *(BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT, GATE_AXIS, COMPUTE),
        )

    k1, k2, k3 = scale, scale, scale  # frozen: grad_input = d scale
    if SUMS != GIVEN:
        if SUMS == MERGED:
            d_sums, dx_sums, _ = load_partials(partials_ptr, c, C, splits, BLOCK_S, M_AXIS)
            d_sum, dx_sum = tl.sum(d_sums, M_AXIS), tl.sum(dx_sums, M_AXIS)
        elif SINGLE:
            d_sum = tl.sum(d, M_AXIS).to(tl.float64)
            dx_sum = tl.sum(d * x, M_AXIS).to(tl.float64)
        else:
            d_sum, dx_sum = range_sums(
                *(g_ptr, x_ptr, residual_ptr, gate_ptr, None, None),
                *(c0, first, last, shift, scale, bias, centre, slope, drop_scale, C, M, L),
                *(TRAINING, ACTIVATION, DROPS, NEEDS_Z, BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS),
                *(UNIT, GATE_AXIS, WIDE, COMPUTE),
            )
        m1, m2, m3, projection = channel_gradient(
            invstd * weight, mean, invstd, d_sum, dx_sum, 1.0 / tl.full([1], M, tl.float64), COMPUTE
        )
        if TRAINING:
            k1, k2, k3 = m1, m2, m3
        if grad_weight_ptr is not None:
            writes = (c < C) & (split == 0)
            store_channels(grad_weight_ptr, projection, c, writes)
            store_channels(grad_bias_ptr, d_sum, c, writes)

    if grad_input_ptr is not None or grad_residual_ptr is not None:
        if SINGLE:
            store_gradients(
                d, x, at, inside, k1, k2, k3, grad_input_ptr, grad_residual_ptr, TRAINING, M_AXIS
            )
        else:
            tile = last
            while tile > first:
                tile -= 1
                m0 = position_of(tile, BLOCK_M, WIDE)
                d, x, at, inside = gradient_tile(
                    *(g_ptr, x_ptr, residual_ptr, gate_ptr, m0, c0, shift, scale, bias, centre),
                    *(slope, drop_scale, C, M, L, ACTIVATION, DROPS, NEEDS_Z),
                    *(BLOCK_C, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT, GATE_AXIS, COMPUTE),
                )
                store_gradients(
                    *(d, x, at, inside, k1, k2, k3, grad_input_ptr, grad_residual_ptr),
                    *(TRAINING, M_AXIS),
                )


# Launchers


def _plan(x: Tensor, tile_bytes: int, merges: bool) -> Plan:
    samples, channels = x.shape[:2]
    return plan_for(
        samples,
        channels,
        x.numel() // (samples * channels),
        is_channels_last(x),
        x.element_size(),
        tile_bytes,
        processors(x),
        merges,
    )


def _workspace(x: Tensor, plan: Plan) -> Tensor:
    return x.new_empty(2 * plan.channels * plan.splits, dtype=torch.float64)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    p: float,
    rng_state: Tensor | None,
    keep_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op in training: (output, mean, invstd, gate)."""
    plan = _plan(input, FORWARD_TILE, merges=True)
    output = dense_like(input)
    mean = input.new_empty(plan.channels, dtype=torch.float64)
    invstd = torch.empty_like(mean)
    gated = keep_gate and has_gate(activation, residual is not None, p)
    gate = input.new_empty(
        plan.channels * ((plan.count + 7) // 8) if gated else 0, dtype=torch.uint8
    )
    with device_of(input):
        partials = None
        if plan.splits > 1:
            partials = _workspace(input, plan)
            moments_kernel[(plan.programs,)](input, partials, *plan.sizes, **plan.constants)
        _launch_forward(
            plan,
            *(input, residual, output, gate if gated else None, weight, bias, mean, invstd),
            *(running_mean, running_var, num_batches_tracked, partials, momentum),
            *(eps, activation, slope, p, rng_state),
            statistics=OWN if partials is None else MERGED,
        )
    if num_batches_tracked is not None and momentum is None:
        num_batches_tracked.add_(1)  # behind all programs that read it
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
    """The op with frozen statistics."""
    output = dense_like(input)
    if input.numel() == 0:
        return output
    plan = _plan(input, MAP_TILE, merges=False)
    with device_of(input):
        _launch_forward(
            plan,
            *(input, residual, output, None, weight, bias, None, None),
            *(running_mean, running_var, None, None, 0.0),
            *(eps, activation, slope, 0.0, None),
            statistics=GIVEN,
        )
    return output


def _launch_forward(
    plan: Plan,
    input: Tensor,
    residual: Tensor | None,
    output: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    partials: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    p: float,
    rng_state: Tensor | None,
    statistics: tl.constexpr,
) -> None:
    if p > 0.0 and rng_state is not None:
        state = state_arguments(rng_state, input)
    else:
        state = {"state_ptr": None, "seed": 0, "offset": 0, "ON_DEVICE": False}
    forward_kernel[(plan.programs,)](
        *(input, residual, output, gate, weight, bias, mean, invstd),
        *(running_mean, running_var, num_batches_tracked, partials, state.pop("state_ptr")),
        *plan.sizes,
        momentum=0.0 if momentum is None else momentum,
        eps=eps,
        slope=slope,
        p=p,
        STATISTICS=statistics.value,
        ACTIVATION=activation,
        DROPS=p > 0.0,
        AVERAGES=momentum is None,
        TAG=TAG_DROPOUT,
        SINGLE=plan.single,
        BLOCK_S=triton.next_power_of_2(plan.splits) if partials is not None else 1,
        RUN=plan.run,
        GATE_AXIS=plan.gate_axis,
        **state,
        **plan.constants,
    )


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
    training: bool,
    activation: int,
    slope: float,
    p: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of either: (grad_input, grad_weight, grad_bias, grad_residual)."""

    def parameter(values: Tensor | None) -> Tensor:
        dtype = input.dtype if values is None else values.dtype
        return input.new_empty(input.shape[1] if wants_parameters else 0, dtype=dtype)

    results = (
        dense_like(input) if wants_input else input.new_empty(0),
        parameter(weight),
        parameter(bias),
        dense_like(input) if wants_residual else input.new_empty(0),
    )
    if input.numel() == 0 or not (wants_input or wants_parameters or wants_residual):
        return results
    grad_input = results[0] if wants_input else None
    grad_parameters = results[1:3] if wants_parameters else (None, None)
    grad_residual = results[3] if wants_residual else None

    through_statistics = wants_input and training
    summed = wants_parameters or through_statistics
    needs_z = needs_preactivation(activation, gate is not None, p)
    plan = _plan(input, BACKWARD_TILE if summed else MAP_TILE, merges=summed)
    tensors = (
        grad_output,
        input if summed or needs_z else None,
        residual if needs_z else None,
        gate,
        weight,
        bias,
        mean,
        invstd,
    )
    constants = {
        "slope": slope,
        "p": p,
        "TRAINING": training,
        "ACTIVATION": activation,
        "DROPS": p > 0.0,
        "NEEDS_Z": needs_z,
        "GATE_AXIS": plan.gate_axis,
        **plan.constants,
    }
    programs, partials = plan.programs, None
    with device_of(input):
        # Gradients that do not wait for the sums are written as these are taken.
        early = summed and not through_statistics and not plan.single
        if early or (summed and plan.splits > 1):
            partials = _workspace(input, plan)
            gradient_sums_kernel[(programs,)](
                *tensors,
                *((grad_input, grad_residual) if early else (None, None)),
                partials,
                *plan.sizes,
                **constants,
            )
            if early:
                grad_input = grad_residual = None
                programs //= plan.splits
        sums = MERGED if partials is not None else OWN if summed else GIVEN
        backward_kernel[(programs,)](
            *tensors,
            *(grad_input, grad_residual, *grad_parameters),
            partials,
            *plan.sizes,
            SUMS=sums.value,
            SINGLE=plan.single and sums is not MERGED,
            BLOCK_S=triton.next_power_of_2(plan.splits) if sums is MERGED else 1,
            **constants,
        )
    return results
