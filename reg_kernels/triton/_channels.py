"""Tiles of a dense (N, C, L) tensor by channel and position m = n L + l, M = N L to a channel.

A tile lies as the memory does, so that its second axis is the one to load along:
channels first [BLOCK_C, BLOCK_M], positions along axis 1; channels last [BLOCK_M, BLOCK_C],
positions along axis 0. M_AXIS tells the two apart. Positions run on from sample to sample: rows of
49 values leave no gaps in a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position_offsets(
    m0,  # the first position, a multiple of UNIT
    C,
    L,  # a multiple of UNIT
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,  # L is at most 2^13 and COUNT STEP at most 2^14
    UNIT: tl.constexpr,
):
    """Where positions m0, m0 + STEP, ... of channel 0 lie: int64 [COUNT]."""
    step = STEP * tl.arange(0, COUNT)
    if M_AXIS == 0:
        offsets = (m0 + step).to(tl.int64) * C
    else:
        n = m0 // L  # once a tile; its positions then count from the beginning of that row
        l = (m0 - n * L) + step  # noqa: E741
        if SHORT_ROWS:
            # The quotient by L from ceil(2^32 / L), exact while l L < 2^32.
            reciprocal = 4294967295 // L.to(tl.uint32) + 1
            row = tl.umulhi(l.to(tl.uint32), reciprocal).to(tl.int64)
        else:
            row = (l >= L).to(tl.int64)
        offsets = n.to(tl.int64) * C * L + (l + row * (C - 1) * L)
        # Positions of one unit lie in one row, together: without being told, the compiler would
        # load them one by one.
        offsets = tl.max_contiguous(tl.multiple_of(offsets, UNIT), UNIT)
    return offsets


@triton.jit
def tile_at(
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
):
    """(offsets, inside) of the tile at position m0 and channel c0."""
    c = c0 + tl.arange(0, BLOCK_C)
    m = m0 + tl.arange(0, BLOCK_M)
    at = position_offsets(m0, C, L, 1, BLOCK_M, M_AXIS, SHORT_ROWS, UNIT)
    inside = tl.expand_dims(c < C, M_AXIS) & tl.expand_dims(m < M, 1 - M_AXIS)
    channel = c if M_AXIS == 0 else c.to(tl.int64) * L
    return tl.expand_dims(at, 1 - M_AXIS) + tl.expand_dims(channel, M_AXIS), inside


@triton.jit
def run_starts(
    m0,
    c0,
    C,
    L,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
):
    """Offsets of every RUN-th element along the tile's second axis."""
    if M_AXIS == 0:
        at = position_offsets(m0, C, L, 1, BLOCK_M, M_AXIS, SHORT_ROWS, 1)
        starts = at[:, None] + (c0 + RUN * tl.arange(0, BLOCK_C // RUN))[None, :]
    else:
        at = position_offsets(m0, C, L, RUN, BLOCK_M // RUN, M_AXIS, SHORT_ROWS, 1)
        starts = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None] * L + at[None, :]
    return starts


@triton.jit
def gate_at(
    m0,  # a multiple of 8
    c0,
    C,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_AXIS: tl.constexpr,
    GATE_AXIS: tl.constexpr,  # of the tile, along which its bits are packed
):
    """(offsets, inside) of a tile's bytes in a gate of one bit an element, C ceil(M / 8) bytes.

    A byte holds eight positions of a channel; for channels last with C a multiple of 8, eight
    channels of a position, which one thread has. No two tiles share one, and all are written.
    """
    rows = (M + 7) // 8
    byte = m0 // 8 + tl.arange(0, BLOCK_M // 8)
    c = c0 + tl.arange(0, BLOCK_C)
    if M_AXIS == 1:
        offsets = c.to(tl.int64)[:, None] * rows + byte[None, :]
        inside = (c < C)[:, None] & (byte < rows)[None, :]
    elif GATE_AXIS == 0:
        offsets = byte.to(tl.int64)[:, None] * C + c[None, :]
        inside = (byte < rows)[:, None] & (c < C)[None, :]
    else:
        m = m0 + tl.arange(0, BLOCK_M)
        octet = c0 // 8 + tl.arange(0, BLOCK_C // 8)
        offsets = m.to(tl.int64)[:, None] * (C // 8) + octet[None, :]
        inside = (m < 8 * rows)[:, None] & (octet < C // 8)[None, :]
    return offsets, inside
