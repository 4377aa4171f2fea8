"""Tiles of a dense (N, C, L) tensor by channel and position m = n L + l, M = N L to a channel.

A tile lies as the memory does, so that its second axis is the one to load along:
channels first [BLOCK_C, BLOCK_M], positions along axis 1; channels last [BLOCK_M, BLOCK_C],
positions along axis 0. M_AXIS tells the two apart. Positions run on from sample to sample: rows of
49 values leave no gaps in a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tiles(NamedTuple):
    """What kernels are compiled for: one constexpr, TILES."""

    BLOCK_C: int
    BLOCK_M: int
    M_AXIS: int
    SHORT_ROWS: bool  # L is at most 2^13 and BLOCK_M at most 2^14
    UNIT: int  # divides L and M or, channels last, C
    WIDE: bool  # positions need 64 bits


class Sizes(NamedTuple):
    C: Any
    M: Any
    L: Any


@triton.constexpr_function
def shorter(tiles, parts):
    """Tiles of a part of the positions."""
    tiles = Tiles(*tiles)  # the interpreter hands over a tuple without names
    return tiles._replace(BLOCK_M=tiles.BLOCK_M // parts)


@triton.jit
def known_sizes(C, M, L, TILES: tl.constexpr):
    """Sizes in a form that tells the compiler what UNIT divides, so that it loads UNITs."""
    if TILES.WIDE:
        M = M.to(tl.int64)
    if TILES.UNIT > 1:
        if TILES.M_AXIS == 0:
            C = C // TILES.UNIT * TILES.UNIT
        else:
            M, L = M // TILES.UNIT * TILES.UNIT, L // TILES.UNIT * TILES.UNIT
    return Sizes(C, M, L)


@triton.jit
def position_of(tile, TILES: tl.constexpr):
    """The first of a tile's positions."""
    if TILES.WIDE:
        tile = tile.to(tl.int64)
    return tile * TILES.BLOCK_M


@triton.jit
def position_offsets(
    m0,  # the first position, a multiple of UNIT
    sizes,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    TILES: tl.constexpr,
):
    """Where positions m0, m0 + STEP, ... of channel 0 lie: int64 [COUNT], COUNT STEP positions
    being at most BLOCK_M."""
    step = STEP * tl.arange(0, COUNT)
    if TILES.M_AXIS == 0:
        offsets = (m0 + step).to(tl.int64) * sizes.C
    else:
        n = m0 // sizes.L  # once a tile; its positions then count from the beginning of that row
        l = (m0 - n * sizes.L) + step  # noqa: E741
        if TILES.SHORT_ROWS:
            # The quotient by L from ceil(2^32 / L), exact while l L < 2^32.
            reciprocal = 4294967295 // sizes.L.to(tl.uint32) + 1
            row = tl.umulhi(l.to(tl.uint32), reciprocal).to(tl.int64)
        else:
            row = (l >= sizes.L).to(tl.int64)
        offsets = n.to(tl.int64) * sizes.C * sizes.L + (l + row * (sizes.C - 1) * sizes.L)
        if STEP == 1:
            # Positions of one unit lie in one row, together: without being told, the compiler
            # would load them one by one.
            UNIT: tl.constexpr = TILES.UNIT
            offsets = tl.max_contiguous(tl.multiple_of(offsets, UNIT), UNIT)
    return offsets


@triton.jit
def tile_at(m0, c0, sizes, TILES: tl.constexpr):
    """(offsets, inside) of the tile at position m0 and channel c0."""
    M_AXIS: tl.constexpr = TILES.M_AXIS
    c = c0 + tl.arange(0, TILES.BLOCK_C)
    m = m0 + tl.arange(0, TILES.BLOCK_M)
    at = position_offsets(m0, sizes, 1, TILES.BLOCK_M, TILES)
    inside = tl.expand_dims(c < sizes.C, M_AXIS) & tl.expand_dims(m < sizes.M, 1 - M_AXIS)
    channel = c if M_AXIS == 0 else c.to(tl.int64) * sizes.L
    return tl.expand_dims(at, 1 - M_AXIS) + tl.expand_dims(channel, M_AXIS), inside


@triton.jit
def zero_tile(TILES: tl.constexpr, T: tl.constexpr):
    BLOCK_C: tl.constexpr = TILES.BLOCK_C
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    return tl.zeros([BLOCK_M, BLOCK_C] if TILES.M_AXIS == 0 else [BLOCK_C, BLOCK_M], T)


@triton.jit
def run_starts(m0, c0, sizes, RUN: tl.constexpr, TILES: tl.constexpr):
    """Offsets of every RUN-th element along the tile's second axis."""
    if TILES.M_AXIS == 0:
        at = position_offsets(m0, sizes, 1, TILES.BLOCK_M, TILES)
        starts = at[:, None] + (c0 + RUN * tl.arange(0, TILES.BLOCK_C // RUN))[None, :]
    else:
        at = position_offsets(m0, sizes, RUN, TILES.BLOCK_M // RUN, TILES)
        starts = (c0 + tl.arange(0, TILES.BLOCK_C)).to(tl.int64)[:, None] * sizes.L + at[None, :]
    return starts


@triton.jit
def gate_at(
    m0,  # a multiple of 8
    c0,
    sizes,
    GATE_AXIS: tl.constexpr,  # of the tile, along which its bits are packed
    TILES: tl.constexpr,
):
    """(offsets, inside) of a tile's bytes in a gate of one bit an element, C ceil(M / 8) bytes.

    A byte holds eight positions of a channel; for channels last with C a multiple of 8, eight
    channels of a position, which one thread has. No two tiles share one, and all are written.
    """
    rows = (sizes.M + 7) // 8
    byte = m0 // 8 + tl.arange(0, TILES.BLOCK_M // 8)
    c = c0 + tl.arange(0, TILES.BLOCK_C)
    if TILES.M_AXIS == 1:
        offsets = c.to(tl.int64)[:, None] * rows + byte[None, :]
        inside = (c < sizes.C)[:, None] & (byte < rows)[None, :]
    elif GATE_AXIS == 0:
        offsets = byte.to(tl.int64)[:, None] * sizes.C + c[None, :]
        inside = (byte < rows)[:, None] & (c < sizes.C)[None, :]
    else:
        m = m0 + tl.arange(0, TILES.BLOCK_M)
        octet = c0 // 8 + tl.arange(0, TILES.BLOCK_C // 8)
        offsets = m.to(tl.int64)[:, None] * (sizes.C // 8) + octet[None, :]
        inside = (m < 8 * rows)[:, None] & (octet < sizes.C // 8)[None, :]
    return offsets, inside
