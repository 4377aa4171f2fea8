"""Philox4x32-10 in int64 tensor arithmetic.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    drawn = _groups(rng_state, tag, first // _GROUP, -(-(first % _GROUP + count) // _GROUP))
    halves = torch.stack((drawn & 0xFFFF, drawn >> 16), dim=-1)
    return halves.reshape(-1)[first % _GROUP :][:count]


def words(rng_state: Tensor, tag: int, first: int, count: int) -> Tensor:
    """The same of whole words: element e takes word e % 4 of group e // 4, 0 to 2^32 - 1."""
    drawn = _groups(rng_state, tag, first // 4, -(-(first % 4 + count) // 4))
    return drawn.reshape(-1)[first % 4 :][:count]


def normals(rng_state: Tensor, tag: int, first: int, count: int) -> Tensor:
    """The same as normal numbers, float32: two of each two words, as normal.h has it."""
    drawn = words(rng_state, tag, first - first % 2, count + 2)
    pairs = drawn[: len(drawn) // 2 * 2].view(-1, 2)
    return torch.stack(_normal_pair(*pairs.unbind(1)), dim=-1).reshape(-1)[first % 2 :][:count]


def _groups(rng_state: Tensor, tag: int, first: int, count: int) -> Tensor:
    """The words of `count` groups: [count, 4]."""
    key = rng_state[0] ^ (tag - 2**64 if tag >= 2**63 else tag)
    groups = torch.arange(count, device=rng_state.device) + first
    return torch.stack(philox4x32(key, groups, rng_state[1].expand_as(groups)), dim=-1)


def _normal_pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Each product and each sum is an operation of its own, and so rounded by itself."""
    k = _signed(radius | 1).float().view(torch.int32)
    negative, bits = k < 0, k & 0x7FFFFFFF
    e = (0x4F3504F3 - bits) >> 23
    v = (bits + (e << 23) - (31 << 23)).view(torch.float32) - 1
    square = e.float() * 1.386294361 + _logarithm(v) * v
    r = square.double().sqrt().float()  # torch's root of a float is off by an ulp at times
    t = _signed(angle).float() * 2.0**-32
    z = t * t
    sine = _polynomial(z, _SINE) * t
    cosine = _polynomial(z, _COSINE)
    cosine = torch.where(negative, -cosine, cosine)
    swapped = angle % 2 == 1
    return r * torch.where(swapped, sine, cosine), r * torch.where(swapped, cosine, sine)


def _logarithm(v: Tensor) -> Tensor:
    """-2 ln(1 + v) / v, by pairs and pairs of pairs."""
    v2 = v * v
    low = (v * 4.993981719e-01 - 6.667011976e-01) * v2 + (v * 1.000007272 - 1.999999881)
    high = (v * 2.021379322e-01 - 3.244517148e-01) * v2 + (v * 3.450166285e-01 - 3.980033100e-01)
    return high * (v2 * v2) + low


def _signed(word: Tensor) -> Tensor:
    return (word - ((word >> 31) << 32)).to(torch.int32)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's scheme, the highest coefficient first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


# sin(pi t / 2) / t and cos(pi t / 2), both in t^2.
_SINE = (-4.601657856e-03, 7.968003303e-02, -6.459634900e-01, 1.570796371e00)
_COSINE = (-2.042624913e-02, 2.536063492e-01, -1.233698010e00, 1.0)
