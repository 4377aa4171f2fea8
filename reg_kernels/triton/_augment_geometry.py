"""What augment's instructions read of an image beside a pixel itself: BOX and BLUR by tables of
taps, which one kernel makes for all of them, WARP and SHARPNESS by themselves.

A table has, for each of `count` taps and each of `out` places of an axis, the row or column that is
read, or FILL, in the low half of an int64, and the bits of its weight in the high one. A place that
has fewer taps than others has FILL in their stead, by a weight of 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._augment_program import Filter, Flip, Pad, WarpFilter
from . import _augment_names as names
from ._augment_values import (
    and_one,
    constant,
    product_sum,
    rounded,
    settled,
    settled_nearest,
)
from ._random import product_apart

FILL = tl.constexpr(-1)
UP_DOWN = tl.constexpr(int(Flip.UP_DOWN))
LEFT_RIGHT = tl.constexpr(int(Flip.LEFT_RIGHT))
PAD_EDGE = tl.constexpr(int(Pad.EDGE))
PAD_REFLECT = tl.constexpr(int(Pad.REFLECT))
PAD_SYMMETRIC = tl.constexpr(int(Pad.SYMMETRIC))
NEAREST_EXACT = tl.constexpr(int(Filter.NEAREST_EXACT))
BILINEAR = tl.constexpr(int(Filter.BILINEAR))
BICUBIC = tl.constexpr(int(Filter.BICUBIC))
BILINEAR_ANTIALIAS = tl.constexpr(int(Filter.BILINEAR_ANTIALIAS))
WARP_NEAREST = tl.constexpr(int(WarpFilter.NEAREST))
WARP_FADED = tl.constexpr(int(WarpFilter.BILINEAR_FADED))
WARP_BICUBIC = tl.constexpr(int(WarpFilter.BICUBIC))


class Image(NamedTuple):
    """Where an image is read: of pixel (y, x) channel c is at y row + x STEP + c plane."""

    ptr: Any
    height: Any
    width: Any
    row: Any
    plane: Any


class Taps(NamedTuple):
    """Of an axis: its table, of how many taps and places."""

    ptr: Any
    count: Any
    out: Any


@triton.jit
def cubic_near(x, a: tl.constexpr):
    """The cubic kernel at x in [0, 1], and after it in [1, 2]."""
    inner = product_apart(x, constant(a + 2.0)) - (a + 3.0)
    return product_apart(inner * x, x) + 1.0


@triton.jit
def cubic_far(x, a: tl.constexpr):
    inner = product_apart(x, constant(a)) - 5.0 * a
    return product_apart(product_apart(inner, x) + 8.0 * a, x) - 4.0 * a


@triton.jit
def tap_weight(t, j, is_cubic):
    """Of tap j of the two or four about a place, t of the way from the first of the middle ones."""
    rest = 1.0 - t
    weight = tl.where(j == 0, rest, t)
    if is_cubic:
        near = cubic_near(tl.where(j == 1, t, rest), -0.75)
        far = cubic_far(tl.where(j == 0, t + 1.0, 2.0 - t), -0.75)
        weight = tl.where((j == 0) | (j == 3), far, near)
    return weight


# Tables


@triton.jit
def reached(index, side, pad):
    """The row or column of an image that is read for one that may lie outside of it, or FILL."""
    inside = (index >= 0) & (index < side)
    if pad == PAD_EDGE:
        index = tl.minimum(tl.maximum(index, 0), side - 1)
    elif pad == PAD_REFLECT:
        j = tl.abs(index) % tl.maximum(2 * (side - 1), 1)
        index = tl.where(j >= side, 2 * (side - 1) - j, j)
    elif pad == PAD_SYMMETRIC:
        j = index % (2 * side)
        j = tl.where(j < 0, j + 2 * side, j)
        index = tl.where(j >= side, 2 * side - 1 - j, j)
    else:
        index = tl.where(inside, index, FILL)
    return index


@triton.jit
def wide_weight(j, centre, stretch, kind):
    """Of the filter that is `stretch` times as wide, about `centre`, at place j."""
    x = tl.abs(tl.div_rn((j.to(tl.float32) - centre) + 0.5, stretch))
    far = tl.where(x < 2.0, cubic_far(x, -0.5), 0.0)
    cubic = tl.where(x < 1.0, cubic_near(x, -0.5), far)
    return tl.where(kind == BILINEAR_ANTIALIAS, tl.maximum(1.0 - x, 0.0), cubic)


@triton.jit(do_not_specialize=["S", "segments"])
def taps_kernel(
    program_ptr,  # float32 [N, S, WIDTH]
    plan_ptr,  # int64 [fields, segments]
    taps_ptr,  # int64
    S,
    segments,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tables of both axes of each segment."""
    segment, is_row = tl.program_id(0) // 2, tl.program_id(0) % 2
    plan_ptr += segment
    kind = tl.load(plan_ptr + names.AT_KIND * segments)
    if is_row == 1:
        count = tl.load(plan_ptr + names.AT_COLUMNS * segments).to(tl.int32)
        at = tl.load(plan_ptr + names.AT_COLUMNS_TAPS * segments)
        out = tl.load(plan_ptr + names.AT_WIDTH * segments).to(tl.int32)
        side = tl.load(plan_ptr + names.AT_SOURCE_WIDTH * segments).to(tl.int32)
    else:
        count = tl.load(plan_ptr + names.AT_ROWS * segments).to(tl.int32)
        at = tl.load(plan_ptr + names.AT_ROWS_TAPS * segments)
        out = tl.load(plan_ptr + names.AT_HEIGHT * segments).to(tl.int32)
        side = tl.load(plan_ptr + names.AT_SOURCE_HEIGHT * segments).to(tl.int32)
    if (kind != names.BOX) | (tl.program_id(1) * BLOCK >= out):
        return
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < out
    place = tl.minimum(place, out - 1)
    sample = tl.load(plan_ptr + names.AT_SAMPLE * segments)
    geometry = tl.load(plan_ptr + names.AT_GEOMETRY * segments)
    ptr = program_ptr + (sample * S + geometry) * WIDTH
    taps_ptr += at + place
    if count == 0:
        store_tap(taps_ptr, place, place.to(tl.float32) * 0.0 + 1.0, there)
    elif tl.load(ptr) == names.BLUR:
        j, reach = 0, count // 2
        while j < count:
            index = reached(place + (j - reach), side, PAD_REFLECT)
            distance = tl.maximum(j - reach, reach - j)
            weight = place.to(tl.float32) * 0.0 + tl.load(ptr + names.BLUR__W0 + distance)
            store_tap(taps_ptr + j * out, index, weight, there)
            j += 1
    else:
        box_taps(ptr, is_row, place, there, count, out, side, taps_ptr)


@triton.jit
def store_tap(ptr, index, weight, mask):
    high = weight.to(tl.int32, bitcast=True).to(tl.int64) << 32
    tl.store(ptr, high | (index.to(tl.int64) & 0xFFFFFFFF), mask=mask)


@triton.jit
def box_taps(ptr, is_row, place, there, count, out, side, taps_ptr):
    start = tl.load(ptr + names.BOX__TOP + is_row).to(tl.int32)
    length = tl.load(ptr + names.BOX__HEIGHT + is_row).to(tl.int32)
    flips = tl.load(ptr + names.BOX__FLIPS).to(tl.int32)
    kind = tl.load(ptr + names.BOX__FILTER).to(tl.int32)
    pad = tl.load(ptr + names.BOX__PAD).to(tl.int32)
    flipped = (flips & tl.where(is_row == 1, LEFT_RIGHT, UP_DOWN)) != 0
    place = tl.where(flipped, out - 1 - place, place)
    scale = tl.div_rn(length.to(tl.float32), out.to(tl.float32))
    x = place.to(tl.float32)
    centre = product_apart(x + 0.5, scale)
    # Of all filters: the first tap, how many there are, and what their weights come of.
    many = tl.zeros_like(place) + 1
    first, fraction, total = place, x, x
    stretch = tl.maximum(scale, 1.0)
    if length != out:
        if kind >= BILINEAR_ANTIALIAS:
            radius = tl.where(kind == BILINEAR_ANTIALIAS, stretch, 2.0 * stretch)
            first = tl.maximum(((centre - radius) + 0.5).to(tl.int32), 0)
            many = tl.minimum(((centre + radius) + 0.5).to(tl.int32), length) - first
            fraction, total = centre, tl.zeros_like(x)
            j = 0
            while j < count:
                weight = wide_weight(first + j, centre, stretch, kind)
                total = tl.where(j < many, total + weight, total)
                j += 1
        elif kind >= BILINEAR:
            middle = centre - 0.5
            middle = tl.where(kind == BILINEAR, tl.maximum(middle, 0.0), middle)
            below = tl.floor(middle)
            fraction = middle - below
            first = below.to(tl.int32) - tl.where(kind == BILINEAR, 0, 1)
            many = tl.zeros_like(place) + tl.where(kind == BILINEAR, 2, 4)
        else:
            nearest = tl.where(kind == NEAREST_EXACT, centre, scale * x)
            first = tl.minimum(nearest.to(tl.int32), length - 1)
    j = 0
    while j < count:
        inside = tl.minimum(tl.maximum(first + j, 0), length - 1)
        index = tl.where(j < many, reached(start + inside, side, pad), FILL)
        weight = tl.zeros_like(x) + 1.0
        if length != out:
            if kind >= BILINEAR_ANTIALIAS:
                weight = tl.div_rn(wide_weight(first + j, fraction, stretch, kind), total)
            elif kind >= BILINEAR:
                weight = tap_weight(fraction, j, kind == BICUBIC)
        store_tap(taps_ptr + j * out, index, tl.where(j < many, weight, 0.0), there)
        j += 1


# Reading


@triton.jit
def all_channels(value, FORM: tl.constexpr):
    C: tl.constexpr = FORM.C
    out = ()
    for _ in tl.static_range(C):
        out = and_one(out, tl.full([FORM.BLOCK], value, tl.float32))
    return out


@triton.jit
def read(image, y, x, mask, FORM: tl.constexpr):
    """All channels at rows y and columns x; 0 where masked."""
    C: tl.constexpr = FORM.C
    STEP: tl.constexpr = FORM.C if FORM.LAST_IN else 1
    at = image.ptr + (y.to(image.row.dtype) * image.row + x * STEP)
    values = ()
    for c in tl.static_range(C):
        value = tl.load(at + c * image.plane, mask=mask, other=0)
        values = and_one(values, value.to(tl.float32))
    return values


@triton.jit
def fills_at(ptr, COUNT: tl.constexpr, FORM: tl.constexpr):
    """The fill of each channel, of COUNT numbers; the last one counts for what is left."""
    C: tl.constexpr = FORM.C
    fills = ()
    for c in tl.static_range(C):
        fills = and_one(fills, tl.load(ptr + (c if c < COUNT else COUNT - 1)))
    return fills


@triton.jit
def either(here, values, others, FORM: tl.constexpr):
    C: tl.constexpr = FORM.C
    new = ()
    for c in tl.static_range(C):
        new = and_one(new, tl.where(here, values[c], others[c]))
    return new


@triton.jit
def plus_weighted(sums, values, weight, FORM: tl.constexpr):
    """Each product apart, as product_apart has it."""
    C: tl.constexpr = FORM.C
    nothing = weight - weight
    new = ()
    for c in tl.static_range(C):
        new = and_one(new, sums[c] + tl.fma(values[c], weight, nothing))
    return new


@triton.jit
def tap_at(taps, j, place):
    """(row or column, weight) of tap j."""
    tap = tl.load(taps.ptr + j * taps.out + place)
    return tap.to(tl.int32), (tap >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def summed(image, rows, columns, fill_ptr, pixels, FORM: tl.constexpr):
    """Taps down the columns, and sums of those along the rows, each sum from its first term on."""
    fills = fills_at(fill_ptr, 4, FORM)
    total = all_channels(-0.0, FORM)
    i = 0
    while i < columns.count:
        x, by_column = tap_at(columns, i, pixels.x)
        line = all_channels(-0.0, FORM)
        j = 0
        while j < rows.count:
            y, by_row = tap_at(rows, j, pixels.y)
            inside = (x >= 0) & (y >= 0)
            values = either(inside, read(image, y, x, inside, FORM), fills, FORM)
            line = plus_weighted(line, values, by_row, FORM)
            j += 1
        total = plus_weighted(total, either(x >= 0, line, fills, FORM), by_column, FORM)
        i += 1
    return total


@triton.jit
def moved(m_ptr, x, y):
    """A row of a matrix times (x, y, 1)."""
    u = product_apart(x, tl.load(m_ptr)) + product_apart(y, tl.load(m_ptr + 1))
    return u + tl.load(m_ptr + 2)


@triton.jit
def warp_source(ptr, image, pixels, FORM: tl.constexpr):
    """Where in the image each pixel lies, as an index of its column and row. Of exact programs in
    torchvision's steps: by a grid in which an image is from -1 to 1."""
    m_ptr = ptr + names.WARP__M0
    affine = (tl.load(m_ptr + 6) == 0.0) & (tl.load(m_ptr + 7) == 0.0)
    affine = affine & (tl.load(m_ptr + 8) == 1.0)
    x, y = pixels.x.to(tl.float32) + 0.5, pixels.y.to(tl.float32) + 0.5
    if affine:
        if FORM.EXACT:
            x = x - 0.5 * tl.load(ptr + names.WARP__OUT_WIDTH)
            y = y - 0.5 * tl.load(ptr + names.WARP__OUT_HEIGHT)
        u, v = moved(m_ptr, x, y), moved(m_ptr + 3, x, y)
    else:
        q = moved(m_ptr + 6, x, y)
        u, v = tl.div_rn(moved(m_ptr, x, y), q), tl.div_rn(moved(m_ptr + 3, x, y), q)
        if FORM.EXACT:
            u, v = u - 1.0, v - 1.0
    if FORM.EXACT:
        u = product_apart(u + 1.0, 0.5 * image.width.to(tl.float32))
        v = product_apart(v + 1.0, 0.5 * image.height.to(tl.float32))
    return u - 0.5, v - 0.5


@triton.jit
def warped(ptr, image, pixels, FORM: tl.constexpr):
    C: tl.constexpr = FORM.C
    ux, uy = warp_source(ptr, image, pixels, FORM)
    near = (tl.abs(ux) < 1073741824.0) & (tl.abs(uy) < 1073741824.0)
    ux, uy = tl.where(near, ux, 0.0), tl.where(near, uy, 0.0)
    kind = tl.load(ptr + names.WARP__FILTER).to(tl.int32)
    fills = fills_at(ptr + names.WARP__FILL0, 3, FORM)
    if kind == WARP_FADED:
        out = faded(image, ux, uy, fills, pixels.there, FORM)
    else:
        taps = tl.where(kind == WARP_BICUBIC, 4, tl.where(kind == WARP_NEAREST, 1, 2))
        if kind == WARP_NEAREST:
            ux, uy = rounded(ux), rounded(uy)
        out = crossing(image, ux, uy, fills, pixels.there, taps, FORM)
    out = either(near, out, fills, FORM)
    new = ()
    for c in tl.static_range(C):
        new = and_one(new, settled_nearest(out[c], FORM))
    return new


@triton.jit
def is_inside(image, x, y):
    return (x >= 0) & (x < image.width) & (y >= 0) & (y < image.height)


@triton.jit
def crossing(image, ux, uy, fills, there, taps, FORM: tl.constexpr):
    """Sums along rows about a place, summed: of 4 taps each, bicubic, of 2, bilinear, or of 1."""
    left, above = tl.floor(ux), tl.floor(uy)
    x_part, y_part = ux - left, uy - above
    x0, y0 = left.to(tl.int32) - taps // 4, above.to(tl.int32) - taps // 4
    total = all_channels(-0.0, FORM)
    j = 0
    while j < taps:
        line = all_channels(-0.0, FORM)
        i = 0
        while i < taps:
            inside = is_inside(image, x0 + i, y0 + j)
            values = read(image, y0 + j, x0 + i, there & inside, FORM)
            values = either(inside, values, fills, FORM)
            line = plus_weighted(line, values, tap_weight(x_part, i, taps == 4), FORM)
            i += 1
        total = plus_weighted(total, line, tap_weight(y_part, j, taps == 4), FORM)
        j += 1
    return total


@triton.jit
def faded(image, ux, uy, fills, there, FORM: tl.constexpr):
    """Bilinear as torchvision has it: what is inside weighs twice, in the sum and on it."""
    C: tl.constexpr = FORM.C
    left, above = tl.floor(ux), tl.floor(uy)
    x_part, y_part = ux - left, uy - above
    x0, y0 = left.to(tl.int32), above.to(tl.int32)
    total = all_channels(0.0, FORM)
    share = tl.zeros_like(ux)
    j = 0
    while j < 4:
        x, y = x0 + j % 2, y0 + j // 2
        inside = is_inside(image, x, y)
        by_column = tap_weight(x_part, j % 2, False)
        weight = product_apart(tap_weight(y_part, j // 2, False), by_column)
        share += tl.where(inside, weight, 0.0)
        total = plus_weighted(total, read(image, y, x, there & inside, FORM), weight, FORM)
        j += 1
    new = ()
    for c in tl.static_range(C):
        new = and_one(new, product_apart(total[c] - fills[c], share) + fills[c])
    return new


@triton.jit
def sharpened(ptr, image, pixels, FORM: tl.constexpr):
    C: tl.constexpr = FORM.C
    inner = (pixels.x > 0) & (pixels.x < image.width - 1)
    inner = inner & (pixels.y > 0) & (pixels.y < image.height - 1) & pixels.there
    sums = all_channels(-0.0, FORM)
    j = 0
    while j < 9:
        weight = tl.where(j == 4, constant(0.38461538461538464), constant(0.07692307692307693))
        values = read(image, pixels.y + (j // 3 - 1), pixels.x + (j % 3 - 1), inner, FORM)
        sums = plus_weighted(sums, values, weight, FORM)
        j += 1
    rest = tl.load(ptr + names.SHARPNESS__REST)
    values = read(image, pixels.y, pixels.x, pixels.there, FORM)
    new = ()
    for c in tl.static_range(C):
        smooth = rounded(sums[c]) if FORM.EXACT else sums[c]
        sharp = settled(product_sum(smooth - values[c], rest, values[c], FORM), FORM)
        new = and_one(new, tl.where(inner, sharp, values[c]))
    return new
