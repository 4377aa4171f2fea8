"""What BatchNorm's forward and backward kernels share: channel values, parts and their order."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Where a kernel has its statistics, or sums, from.
GIVEN = tl.constexpr(0)
OWN = tl.constexpr(1)
MERGED = tl.constexpr(2)
OF_RANKS = tl.constexpr(3)

UNSPECIALISED = ["seed", "offset", "element_offset"]  # no recompiling by value


class Chain(NamedTuple):
    """What comes behind the statistics, that kernels are compiled for: one constexpr, CHAIN."""

    ACTIVATION: int
    DROPS: bool
    GATE_AXIS: int
    RUN: int = 1  # elements of one mask group that surely lie along the tile's second axis


class Affine(NamedTuple):
    """y = (x - shift) scale + offset, by channels; ChannelAffine of batch_norm_math.h."""

    shift: Any
    scale: Any
    offset: Any


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
def channel_affine(mean, invstd, weight, bias, COMPUTE: tl.constexpr):
    """The shift is the mean as COMPUTE rounds it, the offset makes up for the rounding.

    x - shift is exact where the deviation is small beside the mean.
    """
    scale = invstd * weight
    shift = mean.to(COMPUTE)
    # Of an infinite mean there is no rest; x - shift is what it should be already.
    rest = tl.where(mean - mean == 0.0, mean - shift.to(tl.float64), 0.0)
    return Affine(
        rounded(shift, COMPUTE),
        rounded(scale, COMPUTE),
        rounded(bias - rest * scale, COMPUTE),
    )


@triton.jit
def normalised(x, affine, M_AXIS: tl.constexpr):
    """A tile of x by its channels' Affine."""
    z = (x - tl.expand_dims(affine.shift, M_AXIS)) * tl.expand_dims(affine.scale, M_AXIS)
    return z + tl.expand_dims(affine.offset, M_AXIS)


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
def program_range(sizes, tiles, REVERSED: tl.constexpr, TILES: tl.constexpr):
    """(first channel, number of the range, its first tile, the one behind its last)."""
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    blocks = tl.cdiv(sizes.C, TILES.BLOCK_C)
    split = program // blocks
    first = split * tiles
    c0 = program % blocks * TILES.BLOCK_C
    return c0, split, first, tl.minimum(first + tiles, tl.cdiv(sizes.M, TILES.BLOCK_M))


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
