"""Booleans of a tile, eight to a byte along one of its axes; the lowest bit comes first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_bits(bits, AXIS: tl.constexpr):
    """uint8 of booleans [A, B]: [A / 8, B] for axis 0, [A, B / 8] for axis 1."""
    A: tl.constexpr = bits.shape[0]
    B: tl.constexpr = bits.shape[1]
    lane = tl.arange(0, 8)
    if AXIS == 0:
        octets = tl.reshape(bits.to(tl.int32), [A // 8, 8, B]) << lane[None, :, None]
    else:
        octets = tl.reshape(bits.to(tl.int32), [A, B // 8, 8]) << lane[None, None, :]
    return tl.sum(octets, 1 + AXIS).to(tl.uint8)


@triton.jit
def unpack_bits(packed, AXIS: tl.constexpr):
    """The booleans of pack_bits."""
    A: tl.constexpr = packed.shape[0]
    B: tl.constexpr = packed.shape[1]
    lane = tl.arange(0, 8)
    packed = packed.to(tl.int32)
    if AXIS == 0:
        bits = tl.reshape((packed[:, None, :] >> lane[None, :, None]) & 1, [8 * A, B])
    else:
        bits = tl.reshape((packed[:, :, None] >> lane[None, None, :]) & 1, [A, 8 * B])
    return bits != 0
