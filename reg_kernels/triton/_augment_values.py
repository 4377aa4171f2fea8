"""What augment's instructions of single pixels do to values: v is a tuple of float32 tiles, one a
channel, of the same pixels. Each product is rounded by itself, but where FORM.EXACT asks for a
multiply-add, so that every implementation has the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._rng import tag
from . import _augment_names as names
from ._random import half_word_at, normal_at, product_apart

# A multiply-add is rounded once, which the interpreter's is not.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
STREAM = tl.constexpr(tag("augment1"))


class AugmentForm(NamedTuple):
    """What kernels are compiled for: one constexpr, FORM."""

    C: int
    BOUND: float  # values lie in [0, BOUND]: 255 of bytes, else 1
    EXACT: bool  # they are whole numbers after each instruction
    LAST_IN: bool  # the image that is read has the channels last, which none in scratch has
    LAST_OUT: bool  # the result has
    BLOCK: int  # pixels of a tile
    WIDE: bool  # an int32 does not count the elements of an image


class Pixels(NamedTuple):
    """Which pixels of an image a tile has."""

    index: Any  # y width + x
    y: Any  # inside of the image even where there is no pixel
    x: Any
    there: Any  # whether there is one
    size: Any  # pixels of the image
    first_row: Any  # of the tile, and its last
    last_row: Any


@triton.jit
def element_at(pixels, c):
    """The number of an element in its image."""
    return c * pixels.size.to(tl.int64) + pixels.index


# Numbers


@triton.jit
def rounded(v):
    """To the nearest whole number, ties to even; v as it is from 2^22 on."""
    return tl.where(tl.abs(v) < 4194304.0, (v + 12582912.0) - 12582912.0, v)


@triton.jit
def truncated(v):
    return tl.where(v < 0.0, -tl.floor(-v), tl.floor(v))


@triton.jit
def between(v, low, high):
    """Brought into [low, high]; NaN stays NaN."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def number_between(v, low, high):
    """Brought into [low, high]; NaN becomes the lowest."""
    return tl.minimum(tl.where(v > low, v, low), high)


@triton.jit
def multiply_add(x, y, z):
    """x y + z, rounded once."""
    if INTERPRETED:
        total = x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)
    else:
        total = tl.fma(x, y, z)
    return total.to(tl.float32)


@triton.jit
def product_sum(x, y, z, FORM: tl.constexpr):
    """x y + z as blends, grays and sharpness have it."""
    return multiply_add(x, y, z) if FORM.EXACT else product_apart(x, y) + z


@triton.jit
def settled(v, FORM: tl.constexpr):
    """In range, and cut off where values are whole."""
    v = between(v, 0.0, FORM.BOUND)
    return tl.floor(v) if FORM.EXACT else v


@triton.jit
def settled_nearest(v, FORM: tl.constexpr):
    """The same of what is resampled, rounded instead; floats are let out of range."""
    if FORM.EXACT:
        v = rounded(v)
    return between(v, 0.0, FORM.BOUND) if FORM.BOUND == 255.0 else v


@triton.jit
def constant(value):
    return tl.full([1], value, tl.float32)


# Channels


@triton.jit
def and_one(values, value):
    """The values of one more channel; kernels know no starred tuple."""
    return values + (value,)  # noqa: RUF005


@triton.jit
def each(v, FUNCTION: tl.constexpr, a, b, FORM: tl.constexpr):
    C: tl.constexpr = FORM.C
    out = ()
    for c in tl.static_range(C):
        out = and_one(out, FUNCTION(v[c], a, b, FORM))
    return out


@triton.jit
def chosen(v, channel, FORM: tl.constexpr):
    """The values of a channel whose number is no constant. Where a channel takes many registers a
    loop has them one by one."""
    C: tl.constexpr = FORM.C
    value = v[0]
    for c in tl.static_range(1, C):
        value = tl.where(channel == c, v[c], value)
    return value


@triton.jit
def with_chosen(v, channel, value, FORM: tl.constexpr):
    """v with other values of that channel."""
    C: tl.constexpr = FORM.C
    new = ()
    for c in tl.static_range(C):
        new = and_one(new, tl.where(channel == c, value, v[c]))
    return new


# Instructions


@triton.jit
def gray_of(v, FORM: tl.constexpr):
    gray = product_apart(v[0], constant(0.2989))
    gray = product_sum(v[1], constant(0.587), gray, FORM)
    gray = product_sum(v[2], constant(0.114), gray, FORM)
    return tl.floor(gray) if FORM.EXACT else gray


@triton.jit
def brightened(v, factor, _, FORM: tl.constexpr):
    return settled(v * factor, FORM)


@triton.jit
def inverted(v, _, __, FORM: tl.constexpr):
    return FORM.BOUND - v


@triton.jit
def solarized(v, threshold, _, FORM: tl.constexpr):
    return tl.where(v >= threshold, FORM.BOUND - v, v)


@triton.jit
def solarize_added(v, threshold, addend, FORM: tl.constexpr):
    return tl.where(v < threshold, settled(v + addend, FORM), v)


@triton.jit
def posterized(v, bits, _, FORM: tl.constexpr):
    exponent = bits.to(tl.int32) << 23  # 2^bits and 2^-bits by their exponents
    levels = (exponent + 0x3F800000).to(tl.float32, bitcast=True)
    level = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
    if FORM.BOUND == 255.0:
        v = tl.floor(v * (levels * 0.00390625)) * (level * 256.0)
    else:
        v = between(tl.floor(v * levels), 0.0, levels - 1.0) * level
    return v


@triton.jit
def wrapped(h):
    """h modulo 1."""
    return h - tl.floor(h)


@triton.jit
def hue_turned(v, turn, FORM: tl.constexpr):
    """By `turn` of a circle, by way of hue, saturation and value."""
    r, g, b = v[0], v[1], v[2]
    if FORM.BOUND == 255.0:
        unit = constant(0.00392156862745098)
        r, g, b = product_apart(r, unit), product_apart(g, unit), product_apart(b, unit)
    most = tl.maximum(r, g, propagate_nan=tl.PropagateNan.ALL)
    most = tl.maximum(most, b, propagate_nan=tl.PropagateNan.ALL)
    least = tl.minimum(tl.minimum(r, g), b)
    span = most - least
    gray = most == least
    s = tl.div_rn(span, tl.where(gray, 1.0, most))
    divisor = tl.where(gray, 1.0, span)
    rc, gc = tl.div_rn(most - r, divisor), tl.div_rn(most - g, divisor)
    bc = tl.div_rn(most - b, divisor)
    h = tl.where(most == r, bc - gc, tl.where(most == g, (rc + 2.0) - bc, (gc + 4.0) - rc))
    h = wrapped(wrapped(product_apart(h, constant(0.16666666666666666)) + 1.0) + turn)
    h6 = product_apart(h, constant(6.0))
    sector = tl.floor(h6)
    sf = product_apart(s, h6 - sector)
    rest = 1.0 - s
    p = between(rest * most, 0.0, 1.0)
    q = between((1.0 - sf) * most, 0.0, 1.0)
    t = between((sf + rest) * most, 0.0, 1.0)
    # Sector 6 is 0 again; NaN is none, and all are NaN there.
    even = (sector == 0.0) | (sector == 2.0) | (sector == 4.0) | (sector == 6.0)
    third = tl.where(sector == 6.0, 0.0, tl.floor(sector * 0.5))
    side = tl.where(even, t, q)
    first, last = tl.where(even, most, side), tl.where(even, side, most)
    # Of sectors 0 and 1, and likewise of the next two with the colours moved on by one.
    red = tl.where(third == 0.0, first, tl.where(third == 1.0, p, last))
    green = tl.where(third == 0.0, last, tl.where(third == 1.0, first, p))
    blue = tl.where(third == 0.0, p, tl.where(third == 1.0, last, first))
    return unit_stored(red, FORM), unit_stored(green, FORM), unit_stored(blue, FORM)


@triton.jit
def unit_stored(v, FORM: tl.constexpr):
    """From [0, 1] to the range."""
    return settled(v * 255.999 if FORM.EXACT else v * FORM.BOUND, FORM)


@triton.jit
def equalized(v, histograms_ptr, size, FORM: tl.constexpr):
    """By Pillow's table of each channel's histogram, uint32 [256]."""
    C: tl.constexpr = FORM.C
    bins = tl.arange(0, 256)
    channel = 0
    while channel < C:
        counts = tl.load(histograms_ptr.to(tl.pointer_type(tl.uint32)) + 256 * channel + bins)
        counts = counts.to(size.dtype)
        last = tl.max(tl.where(counts > 0, bins, 0), 0)
        step = (size - tl.sum(tl.where(bins == last, counts, 0), 0)) // 255
        below = tl.cumsum(counts, 0) - counts
        table = tl.minimum((step // 2 + below) // tl.maximum(step, 1), 255).to(tl.int32)
        level = tl.gather(table, gray_level(chosen(v, channel, FORM), FORM), 0).to(tl.float32)
        level = level * 0.00392156862745098 if FORM.BOUND == 1.0 else level
        v = with_chosen(v, channel, tl.where(step == 0, chosen(v, channel, FORM), level), FORM)
        channel += 1
    return v


@triton.jit
def gray_level(v, FORM: tl.constexpr):
    """As one of the levels 0 to 255; NaN is 0."""
    level = v * 255.0 if FORM.BOUND == 1.0 else v
    return rounded(number_between(level, 0.0, 255.0)).to(tl.int32)


@triton.jit
def ordered(v):
    """uint32 that are in order as the values are; 0 is none's."""
    bits = v.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def unordered(word):
    """The value of the word."""
    bits = (word ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def stretched(v, known_ptr, FORM: tl.constexpr):
    """From [least, most] to the whole range; known_ptr: their words, of the least its inverse."""
    words = known_ptr.to(tl.pointer_type(tl.uint32))
    least = unordered(tl.load(words) ^ 0xFFFFFFFF)
    most = unordered(tl.load(words + 1))
    scale = (most - least) * (1.0 / FORM.BOUND)
    scaled = settled(tl.div_rn(v - least, tl.where(most > least, scale, 1.0)), FORM)
    return tl.where(most > least, scaled, v)


@triton.jit
def mean_gray(known_ptr, size, FORM: tl.constexpr):
    total = tl.load(known_ptr.to(tl.pointer_type(tl.int64))).to(tl.float64)
    return (total / size.to(tl.float64) / gray_unit(FORM)).to(tl.float32)


@triton.jit
def gray_unit(FORM: tl.constexpr):
    """What grays are counted in."""
    return 1.0 if FORM.EXACT else (65536.0 if FORM.BOUND == 1.0 else 256.0)


# Draws


@triton.jit
def key_at(ptr):
    """The stream's, of four numbers of 16 bits."""
    key = tl.load(ptr).to(tl.int64) | (tl.load(ptr + 1).to(tl.int64) << 16)
    key = key | (tl.load(ptr + 2).to(tl.int64) << 32) | (tl.load(ptr + 3).to(tl.int64) << 48)
    return key ^ STREAM


@triton.jit
def noisy(ptr, v, pixels, FORM: tl.constexpr):
    key = key_at(ptr + names.NOISE__KEY0)
    mean, std = tl.load(ptr + names.NOISE__MEAN), tl.load(ptr + names.NOISE__STD)
    clips = tl.load(ptr + names.NOISE__CLIP) != 0.0
    channel = 0
    while channel < FORM.C:
        noise = product_apart(normal_at(key, 0, element_at(pixels, channel)), std) + mean
        value = chosen(v, channel, FORM) + (truncated(noise) if FORM.EXACT else noise)
        inside = between(value, 0.0, FORM.BOUND)
        value = inside if FORM.EXACT else tl.where(clips, inside, value)
        v = with_chosen(v, channel, value, FORM)
        channel += 1
    return v


@triton.jit
def peppered(ptr, v, pixels, FORM: tl.constexpr):
    key = key_at(ptr + names.SALT_AND_PEPPER__KEY0)
    p = tl.load(ptr + names.SALT_AND_PEPPER__P).to(tl.float64)
    salt = sixteen_bits(p * tl.load(ptr + names.SALT_AND_PEPPER__SALT).to(tl.float64))
    channel = 0
    while channel < FORM.C:
        drawn = half_word_at(key, 0, element_at(pixels, channel))
        value = tl.where(drawn < salt, FORM.BOUND, 0.0)
        value = tl.where(drawn < sixteen_bits(p), value, chosen(v, channel, FORM))
        v = with_chosen(v, channel, value, FORM)
        channel += 1
    return v


@triton.jit
def sixteen_bits(p):
    """A probability times 65536, of float64, to the nearest integer; ties to even."""
    return ((p * 65536.0 + 6755399441055744.0) - 6755399441055744.0).to(tl.uint32)


# One instruction


@triton.jit
def executed(opcode, ptr, v, pixels, statistics_ptr, known_at_ptr, FORM: tl.constexpr):
    """The instruction at ptr, on v; known_at_ptr: where among the statistics its own is, if any."""
    C: tl.constexpr = FORM.C
    a, b = tl.load(ptr + 1), tl.load(ptr + 2)
    out = v
    if opcode == names.BRIGHTNESS:
        out = each(v, brightened, a, b, FORM)
    elif opcode == names.INVERT:
        out = each(v, inverted, a, b, FORM)
    elif opcode == names.SOLARIZE:
        out = each(v, solarized, a, b, FORM)
    elif opcode == names.SOLARIZE_ADD:
        out = each(v, solarize_added, a, b, FORM)
    elif opcode == names.POSTERIZE:
        out = each(v, posterized, a, b, FORM)
    elif opcode == names.NORMALIZE:
        new = ()
        for c in tl.static_range(C):
            factor = tl.load(ptr + names.NORMALIZE__A0 + c)
            new = and_one(new, product_apart(v[c], factor) + tl.load(ptr + names.NORMALIZE__B0 + c))
        out = new
    elif opcode == names.MIX:
        new = ()
        for c in tl.static_range(C):
            new = and_one(new, settled(v[c], FORM))
        out = new
    elif opcode == names.AUTOCONTRAST:
        known_ptr = statistics_ptr + tl.load(known_at_ptr)
        new = ()
        for c in tl.static_range(C):
            new = and_one(new, stretched(v[c], known_ptr + 2 * c, FORM))
        out = new
    elif opcode == names.EQUALIZE:
        out = equalized(v, statistics_ptr + tl.load(known_at_ptr), pixels.size, FORM)
    elif opcode == names.ERASE:
        out = erased(ptr, v, pixels, FORM)
    elif opcode == names.NOISE:
        out = noisy(ptr, v, pixels, FORM)
    elif opcode == names.SALT_AND_PEPPER:
        out = peppered(ptr, v, pixels, FORM)
    elif opcode == names.CONTRAST:
        mean = mean_gray(statistics_ptr + tl.load(known_at_ptr), pixels.size, FORM)
        out = each(v, blended, a, (mean, b), FORM)
    if C == 3:
        if opcode == names.SATURATION:
            out = each(v, blended, a, (gray_of(v, FORM), b), FORM)
        elif opcode == names.GRAYSCALE:
            gray = gray_of(v, FORM)
            out = (gray, gray, gray)
        elif opcode == names.HUE:
            out = hue_turned(v, a, FORM)
        elif opcode == names.PERMUTE:
            new = ()
            for c in tl.static_range(3):
                which = tl.load(ptr + names.PERMUTE__P0 + c)
                new = and_one(new, tl.where(which == 0.0, v[0], tl.where(which == 1.0, v[1], v[2])))
            out = new
    return out


@triton.jit
def blended(v, factor, other, FORM: tl.constexpr):
    """`other`: an image, and its factor."""
    mixed = product_apart(v, factor)
    return settled(product_sum(other[0], other[1], mixed, FORM), FORM)


@triton.jit
def erased(ptr, v, pixels, FORM: tl.constexpr):
    top = tl.load(ptr + names.ERASE__TOP).to(tl.int32)
    left = tl.load(ptr + names.ERASE__LEFT).to(tl.int32)
    bottom = top + tl.load(ptr + names.ERASE__HEIGHT).to(tl.int32)
    right = left + tl.load(ptr + names.ERASE__WIDTH).to(tl.int32)
    inside = (pixels.y >= top) & (pixels.y < bottom) & (pixels.x >= left) & (pixels.x < right)
    mode = tl.load(ptr + names.ERASE__MODE)
    if (pixels.first_row < bottom) & (pixels.last_row >= top):
        key = key_at(ptr + names.ERASE__KEY0)
        channel = 0
        while channel < FORM.C:
            value = tl.full([FORM.BLOCK], tl.load(ptr + names.ERASE__V0 + channel), tl.float32)
            if mode == 1.0:
                value = normal_at(key, 0, element_at(pixels, channel))
            value = tl.where(inside, value, chosen(v, channel, FORM))
            v = with_chosen(v, channel, value, FORM)
            channel += 1
    return v
