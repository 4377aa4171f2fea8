"""BatchNorm's backward kernels: the sums of the gradient, and the gradients.

`batch_norm.py` says how they go together and which bytes they move.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._activation import LEAKY_RELU, RELU, behind_activation
from ._batch_norm import (
    GIVEN,
    MERGED,
    OF_RANKS,
    channel_affine,
    load_channels,
    load_partials,
    normalised,
    program_range,
    rounded,
    store_channels,
    store_partials,
)
from ._bits import unpack_bits
from ._channels import gate_at, known_sizes, position_of, tile_at, zero_tile
from ._elementwise import load_rate
from ._types import compute_type


@triton.jit
def channel_gradient(scale, mean, invstd, d_sum, dx_sum, share, COMPUTE: tl.constexpr):
    """(k1, k2, k3, sum d xhat) of grad_input = (d + (x - shift) k2 + k3) k1.

    ChannelGradient of batch_norm_math.h.

    d_sum is sum d, dx_sum is sum d (x - shift), scale is weight invstd, share is 1 / M.
    """
    rest = mean - mean.to(COMPUTE).to(tl.float64)
    projection = invstd * (dx_sum - rest * d_sum)
    k1, k2, k3 = gradient_of_sums(scale, mean, invstd, d_sum, projection, share, COMPUTE)
    return k1, k2, k3, projection


@triton.jit
def gradient_of_sums(scale, mean, invstd, d_sum, projection, share, COMPUTE: tl.constexpr):
    """The same of `projection`, sum d xhat."""
    rest = mean - mean.to(COMPUTE).to(tl.float64)
    k2 = -invstd * projection * share
    k3 = -d_sum * share - k2 * rest
    return rounded(scale, COMPUTE), rounded(k2, COMPUTE), rounded(k3, COMPUTE)


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


class Source(NamedTuple):
    """What the gradient in front of the activation is made from."""

    g_ptr: Any
    x_ptr: Any  # or None where nothing depends on it
    residual_ptr: Any
    gate_ptr: Any
    affine: Any
    slope: Any
    drop_scale: Any


@triton.jit
def gradient_tile(
    source, m0, c0, sizes, NEEDS_Z: tl.constexpr, CHAIN: tl.constexpr, TILES: tl.constexpr
):
    """(d = dL/dz, x - shift, offsets, inside) of one tile."""
    COMPUTE: tl.constexpr = source.slope.dtype
    M_AXIS: tl.constexpr = TILES.M_AXIS
    at, inside = tile_at(m0, c0, sizes, TILES)
    g = tl.load(source.g_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    x = g  # stands for what is not read
    if source.x_ptr is not None:
        x = tl.load(source.x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    z = g
    if NEEDS_Z:
        z = normalised(x, source.affine, M_AXIS)
        if source.residual_ptr is not None:
            z += tl.load(source.residual_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    if source.gate_ptr is not None:
        gate, whole = gate_at(m0, c0, sizes, CHAIN.GATE_AXIS, TILES)
        packed = tl.load(source.gate_ptr + gate, mask=whole, other=0)
        bits = unpack_bits(packed, CHAIN.GATE_AXIS)
        d = behind_gate(g, z, bits, source.drop_scale, source.slope, CHAIN.ACTIVATION, CHAIN.DROPS)
    else:
        d = behind_activation(g, z, source.slope, CHAIN.ACTIVATION)
    d = tl.where(inside, d, 0.0)
    return d, tl.where(inside, x - tl.expand_dims(source.affine.shift, M_AXIS), 0.0), at, inside


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
        grad = d
        if TRAINING:
            grad += x * tl.expand_dims(k2, M_AXIS) + tl.expand_dims(k3, M_AXIS)
        grad *= tl.expand_dims(k1, M_AXIS)
        tl.store(grad_input_ptr + at, grad.to(grad_input_ptr.dtype.element_ty), mask=inside)


@triton.jit
def range_sums(
    source,
    grad_input_ptr,
    grad_residual_ptr,
    c0,
    first,
    last,
    sizes,
    TRAINING: tl.constexpr,
    NEEDS_Z: tl.constexpr,
    CHAIN: tl.constexpr,
    TILES: tl.constexpr,
):
    """(sum d, sum d (x - shift)) in float64 of tiles first to last - 1; stores what is wanted."""
    # Each lane sums for itself: within the loop no thread waits for another.
    scale = source.affine.scale
    d_sum = zero_tile(TILES, scale.dtype)
    dx_sum = zero_tile(TILES, scale.dtype)
    tile = first
    while tile < last:
        m0 = position_of(tile, TILES)
        d, x, at, inside = gradient_tile(source, m0, c0, sizes, NEEDS_Z, CHAIN, TILES)
        d_sum += d
        dx_sum += d * x
        if not TRAINING or grad_input_ptr is None:
            store_gradients(
                *(d, x, at, inside, scale, scale, scale, grad_input_ptr, grad_residual_ptr),
                *(False, TILES.M_AXIS),
            )
        tile += 1
    M_AXIS: tl.constexpr = TILES.M_AXIS
    return tl.sum(d_sum, M_AXIS).to(tl.float64), tl.sum(dx_sum, M_AXIS).to(tl.float64)


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
    NEEDS_Z: tl.constexpr,
    CHAIN: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(g_ptr.dtype.element_ty)
    sizes = known_sizes(C, M, L, TILES)
    c0, split, first, last = program_range(sizes, tiles, False, TILES)
    c = c0 + tl.arange(0, TILES.BLOCK_C)
    C = sizes.C
    mean, invstd = load_channels(mean_ptr, c, C, 0.0), load_channels(invstd_ptr, c, C, 0.0)
    weight, bias = load_channels(weight_ptr, c, C, 1.0), load_channels(bias_ptr, c, C, 0.0)
    affine = channel_affine(mean, invstd, weight, bias, COMPUTE)
    slope = tl.full([1], slope, tl.float64).to(COMPUTE)
    drop_scale = load_rate(None, p)[1].to(COMPUTE)
    source = Source(g_ptr, x_ptr, residual_ptr, gate_ptr, affine, slope, drop_scale)
    d_sum, dx_sum = range_sums(
        *(source, grad_input_ptr, grad_residual_ptr, c0, first, last, sizes),
        *(TRAINING, NEEDS_Z, CHAIN, TILES),
    )
    store_partials(partials_ptr, d_sum, dx_sum, c, split, C, splits, TILES.M_AXIS)


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
    partials_ptr,  # what MERGED merges; [2 C + 1] OF_RANKS: sum d, sum d xhat, and their count
    C,
    M,
    L,
    tiles,
    splits,
    slope: tl.float64,
    p: tl.float64,
    SUMS: tl.constexpr,  # GIVEN: none are needed; the others as forward_kernel's STATISTICS
    SINGLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TRAINING: tl.constexpr,
    NEEDS_Z: tl.constexpr,
    CHAIN: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(g_ptr.dtype.element_ty)
    M_AXIS: tl.constexpr = TILES.M_AXIS
    sizes = known_sizes(C, M, L, TILES)
    c0, split, first, last = program_range(sizes, tiles, True, TILES)
    c = c0 + tl.arange(0, TILES.BLOCK_C)
    C = sizes.C
    mean, invstd = load_channels(mean_ptr, c, C, 0.0), load_channels(invstd_ptr, c, C, 0.0)
    weight, bias = load_channels(weight_ptr, c, C, 1.0), load_channels(bias_ptr, c, C, 0.0)
    affine = channel_affine(mean, invstd, weight, bias, COMPUTE)
    slope = tl.full([1], slope, tl.float64).to(COMPUTE)
    drop_scale = load_rate(None, p)[1].to(COMPUTE)
    source = Source(g_ptr, x_ptr, residual_ptr, gate_ptr, affine, slope, drop_scale)

    if SINGLE:
        m0 = position_of(first, TILES)
        d, x, at, inside = gradient_tile(source, m0, c0, sizes, NEEDS_Z, CHAIN, TILES)

    k1, k2, k3 = affine.scale, affine.scale, affine.scale  # frozen: grad_input = d scale
    if SUMS == OF_RANKS:
        d_sum = load_channels(partials_ptr, c, C, 0.0)
        projection = load_channels(partials_ptr + C, c, C, 0.0)
        share = 1.0 / tl.load(partials_ptr + 2 * C + tl.zeros([1], tl.int32))
        k1, k2, k3 = gradient_of_sums(
            invstd * weight, mean, invstd, d_sum, projection, share, COMPUTE
        )
    elif SUMS != GIVEN:
        if SUMS == MERGED:
            d_sums, dx_sums, _ = load_partials(partials_ptr, c, C, splits, BLOCK_S, M_AXIS)
            d_sum, dx_sum = tl.sum(d_sums, M_AXIS), tl.sum(dx_sums, M_AXIS)
        elif SINGLE:
            d_sum = tl.sum(d, M_AXIS).to(tl.float64)
            dx_sum = tl.sum(d * x, M_AXIS).to(tl.float64)
        else:
            d_sum, dx_sum = range_sums(
                *(source, None, None, c0, first, last, sizes, TRAINING, NEEDS_Z, CHAIN, TILES)
            )
        m1, m2, m3, projection = channel_gradient(
            invstd * weight,
            mean,
            invstd,
            d_sum,
            dx_sum,
            1.0 / tl.full([1], sizes.M, tl.float64),
            COMPUTE,
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
                m0 = position_of(tile, TILES)
                d, x, at, inside = gradient_tile(source, m0, c0, sizes, NEEDS_Z, CHAIN, TILES)
                store_gradients(
                    *(d, x, at, inside, k1, k2, k3, grad_input_ptr, grad_residual_ptr),
                    *(TRAINING, M_AXIS),
                )
