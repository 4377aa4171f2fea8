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
    """The same as normal numbers, float32: two of each two words, as normal.h has it. Those of
    words 0 and 3 of a group come first."""
    groups = _groups(rng_state, tag, first // 4, -(-(first % 4 + count) // 4))
    w0, w1, w2, w3 = groups.unbind(1)
    drawn = torch.stack([*_normal_pair(w0, w3), *_normal_pair(w2, w1)], dim=-1)
    return drawn.reshape(-1)[first % 4 :][:count]


def _groups(rng_state: Tensor, tag: int, first: int, count: int) -> Tensor:
    """The words of `count` groups: [count, 4]."""
    key = rng_state[0] ^ (tag - 2**64 if tag >= 2**63 else tag)
    groups = torch.arange(count, device=rng_state.device) + first
    return torch.stack(philox4x32(key, groups, rng_state[1].expand_as(groups)), dim=-1)


def _normal_pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    k = _signed(radius).float().view(torch.int32)
    e = (0x4F3504F3 - k) & 0x0F800000
    v = ((k + e) & 0x7FFFFFFF).view(torch.float32) * 2.0**-31 - 1  # exact
    square = _product_and_sum(_polynomial(v, _LOGARITHM), v, e.float())
    r = square.double().sqrt().float()  # torch's root of a float is off by an ulp at times
    t = _signed(angle).float() * 2.0**-32
    z = t * t
    sine, cosine = _polynomial(z, _SINE) * t, _polynomial(z, _COSINE)
    return r * torch.where(k < 0, -cosine, cosine), r * sine


def _signed(word: Tensor) -> Tensor:
    return (word - ((word >> 31) << 32)).to(torch.int32)


def _product_and_sum(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """a b + c of float32, rounded once: of these numbers every product is exact in float64, and no
    sum of theirs rounds twice."""
    return (a.double() * b.double() + c).float()


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's scheme, the highest coefficient first; they are float32."""
    value, *others = torch.tensor(coefficients, device=x.device).unbind()
    for coefficient in others:
        value = _product_and_sum(value, x, coefficient)
    return value


# -log2(1 + v) / v; then sin(pi t) / t and cos(pi t), both in t^2. Times powers of two and of
# sqrt(2 ln 2) that make up for e standing where a float has its exponent.
_LOGARITHM = (
    *(1.223156750e06, -1.963289500e06, 2.087730500e06, -2.408358500e06),
    *(3.021909000e06, -4.034276500e06, 6.051146000e06, -1.210220200e07),
)
_SINE = (3.139158798e-05, -2.431178000e-04, 1.036640839e-03, -2.100780373e-03, 1.277122763e-03)
_COSINE = (8.931131742e-05, -5.414370098e-04, 1.649828861e-03, -2.006096067e-03, 4.065207904e-04)
