"""Philox draws in the house's order, on values: other kernels can fuse them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half_words(key, offset, first_group, GROUPS: tl.constexpr):
    """Draws mask elements [8 first_group, 8 (first_group + GROUPS)): uint32 [8 GROUPS], in order.

    `key` is seed ^ tag. A group's draw is four words of two half-words each, low half first.
    """
    group = first_group + tl.arange(0, GROUPS).to(tl.int64)
    w0, w1, w2, w3 = philox(key, offset, group)
    # join appends the fastest dimension: [group, word / 2, word % 2, half].
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [8 * GROUPS])


@triton.jit
def words(key, offset, first_group, GROUPS: tl.constexpr):
    """The same of whole words, four a group: uint32 [4 GROUPS], in order."""
    group = first_group + tl.arange(0, GROUPS).to(tl.int64)
    w0, w1, w2, w3 = philox(key, offset, group)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * GROUPS])


@triton.jit
def half_word_at(key, offset, index):
    """The draw of mask element `index`, by itself: for draws that lie apart."""
    w0, w1, w2, w3 = philox(key, offset, index // 8)
    word = (index % 8) // 2
    w = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return tl.where(index % 2 == 0, w & 0xFFFF, w >> 16)


@triton.jit
def word_at(key, offset, index):
    """The same of a whole word, of which a group has four."""
    w0, w1, w2, w3 = philox(key, offset, index // 4)
    word = index % 4
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def product_apart(x, factor):
    """x factor, which no compiler joins with a sum after it in one rounding: it adds -0 to the
    product, which nobody can know. One joins pairs of float32 even where it is told not to."""
    return tl.fma(x, factor, -(factor - factor))


@triton.jit
def normals(key, offset, first_group, GROUPS: tl.constexpr):
    """The same of normal numbers, four a group: float32 [4 GROUPS], in order."""
    group = first_group + tl.arange(0, GROUPS).to(tl.int64)
    w0, w1, w2, w3 = philox(key, offset, group)
    n0, n1 = normal_pair(w0, w3)
    n2, n3 = normal_pair(w2, w1)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * GROUPS])


@triton.jit
def normal_at(key, offset, index):
    """The same of one number."""
    w0, w1, w2, w3 = philox(key, offset, index // 4)
    later = index % 4 >= 2
    first, second = normal_pair(tl.where(later, w2, w0), tl.where(later, w1, w3))
    return tl.where(index % 2 == 0, first, second)


# The interpreter's own multiply-add rounds twice.
INTERPRETED = tl.constexpr(not isinstance(normals, triton.JITFunction))


@triton.jit
def product_and_sum(a, b, c):
    """a b + c of float32, rounded once, of numbers of which float64 has the product and the sum."""
    zero = tl.zeros_like(a)
    b, c = b + zero, c + zero
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def normal_pair(radius, angle):
    """Two normal numbers of two words, by the steps of csrc/include/reg_kernels/normal.h."""
    k = radius.to(tl.int32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    e = (0x4F3504F3 - k) & 0x0F800000
    v = ((k + e) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    v = product_and_sum(v, 4.656612873077393e-10, -1.0)
    p = product_and_sum(v, 1.223156750e06, -1.963289500e06)
    p = product_and_sum(p, v, 2.087730500e06)
    p = product_and_sum(p, v, -2.408358500e06)
    p = product_and_sum(p, v, 3.021909000e06)
    p = product_and_sum(p, v, -4.034276500e06)
    p = product_and_sum(p, v, 6.051146000e06)
    p = product_and_sum(p, v, -1.210220200e07)
    r = tl.sqrt_rn(product_and_sum(p, v, e.to(tl.float32)))
    t = angle.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    z = t * t
    sine = product_and_sum(z, 3.139158798e-05, -2.431178000e-04)
    sine = product_and_sum(sine, z, 1.036640839e-03)
    sine = product_and_sum(sine, z, -2.100780373e-03)
    sine = product_and_sum(sine, z, 1.277122763e-03) * t
    cosine = product_and_sum(z, 8.931131742e-05, -5.414370098e-04)
    cosine = product_and_sum(cosine, z, 1.649828861e-03)
    cosine = product_and_sum(cosine, z, -2.006096067e-03)
    cosine = product_and_sum(cosine, z, 4.065207904e-04)
    return r * tl.where(k < 0, -cosine, cosine), r * sine


@triton.jit
def half_word_runs(key, offset, first, RUN: tl.constexpr):
    """Draws runs of RUN mask elements from each of `first` on: [A, RUN B] of int64 [A, B].

    RUN is 1, 2, 4 or 8 and `first` multiples of it: a run lies in one group, and costs one draw.
    """
    A: tl.constexpr = first.shape[0]
    B: tl.constexpr = first.shape[1]
    if RUN == 1:
        halves = half_word_at(key, offset, first)
    else:
        w0, w1, w2, w3 = philox(key, offset, first // 8)
        if RUN == 8:
            words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        else:
            upper = first % 8 >= 4
            low, high = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
            words = tl.join(low, high) if RUN == 4 else tl.where(first % 4 >= 2, high, low)
        halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [A, RUN * B])
    return halves


@triton.jit
def philox(key, offset, group):
    """The four words of each group: counter (group low, group high, offset low, offset high)."""
    zero = group * 0
    return tl.philox(
        key,
        (group & 0xFFFFFFFF).to(tl.uint32),
        ((group >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ((zero + offset) & 0xFFFFFFFF).to(tl.uint32),
        (((zero + offset) >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def load_state(state_ptr, seed, offset):
    """(seed, offset): from int64 [2] at state_ptr where a graph drew them, else by value."""
    if state_ptr is not None:
        return tl.load(state_ptr), tl.load(state_ptr + 1)
    # The interpreter takes a small integer for an int32, whatever the kernel's annotation says.
    return seed.to(tl.int64), offset.to(tl.int64)
