"""Philox4x32-10 in int64 tensor arithmetic.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_MASK = 0xFFFFFFFF
_GROUP = 8


def _low(x: Tensor) -> Tensor:
    return x & _MASK


def _high(x: Tensor) -> Tensor:
    # The shift copies the sign bit; the mask takes it off again.
    return (x >> 32) & _MASK


def philox4x32(key: Tensor, counter_low: Tensor, counter_high: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words, in int64 tensors, of each 64-bit `key` and 128-bit counter.

    Int64 products wrap around modulo 2^64, whose bits are those of the unsigned product.
    """
    k0, k1 = _low(key), _high(key)
    c0, c1 = _low(counter_low), _high(counter_low)
    c2, c3 = _low(counter_high), _high(counter_high)
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, _low(p1), _high(p0) ^ c3 ^ k1, _low(p0)
        k0, k1 = _low(k0 + _W0), _low(k1 + _W1)
    return c0, c1, c2, c3


def tag(letters: str) -> int:
    """What a kind of op xors into the seed: its eight letters, the first one highest."""
    return int.from_bytes(letters.encode(), "big")


def half_words(rng_state: Tensor, tag: int, first: int, count: int) -> Tensor:
    """Draws `count` mask elements from index `first` on: int64 [count], each 0 to 65535.

    Element e takes half-word e % 8 of group e // 8: word (e % 8) // 2, low half first.
    """
    device = rng_state.device
    key = rng_state[0] ^ (tag - 2**64 if tag >= 2**63 else tag)
    lead = first % _GROUP
    groups = torch.arange(-(-(lead + count) // _GROUP), device=device) + first // _GROUP
    words = torch.stack(philox4x32(key, groups, rng_state[1].expand_as(groups)), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.reshape(-1)[lead : lead + count]
