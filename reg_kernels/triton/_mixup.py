"""What mixup's kernels share: how a sample is mixed, and tiles of one.

A tile is of one sample, (C, L) in memory or (L, C) with the channels last. FLAT, where input and
output lie alike, it is [BLOCK_L] elements side by side, whichever channels they belong to; else
[BLOCK_C, BLOCK_L] channels and positions, which reach memory in the order of either side. It begins
at its Start, FLAT at (0, its first element). Elements are divided by the size of rows only where a
box reaches into the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class MixupForm(NamedTuple):
    """What kernels are compiled for: one constexpr, FORM."""

    FLAT: bool
    LAST_IN: bool  # whether the input has the channels last
    LAST_OUT: bool
    WIDE: bool  # a sample has more elements than an int32 counts
    BLOCK_C: int
    BLOCK_L: int
    ONE_LAM: bool
    ONE_BOX: bool


class Mix(NamedTuple):
    """What samples are mixed by and finished with, one argument; None for what there is not."""

    lam: Any  # [N], or [1] where ONE_LAM
    boxes: Any  # int64 [N, 4], or [1, 4] where ONE_BOX: x1, y1, x2, y2
    scale: Any  # [C] in the type that is computed in
    shift: Any = None  # likewise


class Batch(NamedTuple):
    """Sizes: N samples of C L elements."""

    N: Any
    size: Any  # C L
    C: Any
    L: Any
    H: Any
    row: Any  # elements of one: W, or W C where a flat tile has the channels last


class Start(NamedTuple):
    """Where a tile begins."""

    c0: Any
    l0: Any


# On values


@triton.jit
def mixup_values(x, partner, w, rest, COMPUTE: tl.constexpr):
    """w x + rest partner in COMPUTE; a weight of 0 leaves out what may be infinite."""
    x, partner = x.to(COMPUTE), partner.to(COMPUTE)
    blended = w * x + rest * partner
    return tl.where(rest == 0.0, x, tl.where(w == 0.0, partner, blended))


@triton.jit
def rounded(values, T: tl.constexpr):
    """In T; from float64 to 16 bits by float32, as torch does it."""
    if values.dtype == tl.float64 and T.primitive_bitwidth == 16:
        values = values.to(tl.float32)
    return values.to(T)


@triton.jit
def weighted(values, weight):
    return tl.where(weight == 0.0, 0.0, weight * values)


@triton.jit
def quotient(i, D, BLOCK: tl.constexpr):
    """i // D of int32 tensors: 0 <= i < D + BLOCK, of a BLOCK up to 2^11."""
    # From ceil(2^31 / D), exact while i D < 2^31; i of a larger D has passed it once or not at all.
    reciprocal = 2147483648 // D.to(tl.uint32) + 1
    small = tl.umulhi(2 * i.to(tl.uint32), reciprocal).to(tl.int32)
    return tl.where(D > BLOCK, (i >= D).to(tl.int32), small)


@triton.jit
def is_not_zero(x):
    """x != 0 of a scalar, for masks: the interpreter cannot spread what compares floats."""
    return (x != 0.0).to(tl.int32) != 0


# How a sample is mixed


@triton.jit
def weights_of(n, mix, one_lam, COMPUTE: tl.constexpr, FORM: tl.constexpr):
    """What sample n and its partner count for, each rounded once."""
    if mix.lam is None:
        lam = tl.full([], one_lam, tl.float64)
    else:
        lam = tl.load(mix.lam + (0 if FORM.ONE_LAM else n)).to(tl.float64)
    tl.device_assert((lam >= 0.0) & (lam <= 1.0), "lam is not in [0, 1]")
    return lam.to(COMPUTE), (1.0 - lam).to(COMPUTE)


@triton.jit
def partner_of(n, index_ptr, N):
    """By default that of the batch reversed. int64."""
    if index_ptr is None:
        partner = N - 1 - n
    else:
        partner = tl.load(index_ptr + n)
        tl.device_assert((partner >= 0) & (partner < N), "index is not in [0, N)")
    return partner


@triton.jit
def occurrences(n, index_ptr, N, BLOCK: tl.constexpr):
    """How often n is a partner."""
    found = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < N:
        i = first + tl.arange(0, BLOCK)
        found += (tl.load(index_ptr + i, mask=i < N, other=-1) == n).to(tl.int32)
        first += BLOCK
    return tl.sum(found, 0)


@triton.jit
def begins_cycle(n, index_ptr, N):
    """Whether no sample on the way from n back to n comes before it."""
    at, steps = partner_of(n, index_ptr, N), 1
    while (at > n) & (steps < N):  # of what is no permutation some ways do not lead back
        at = partner_of(at, index_ptr, N)
        steps += 1
    return at == n


@triton.jit
def box_in_tile(n, mix, start, batch, FORM: tl.constexpr):
    """(whether sample n's box reaches into the tile, which of its elements lie inside)."""
    C, H, row, l0 = batch.C, batch.H, batch.row, start.l0
    BLOCK_L: tl.constexpr = FORM.BLOCK_L
    box_ptr = mix.boxes + (0 if FORM.ONE_BOX else 4 * n)
    x1, y1 = tl.load(box_ptr), tl.load(box_ptr + 1)
    x2, y2 = tl.load(box_ptr + 2), tl.load(box_ptr + 3)
    if FORM.FLAT and FORM.LAST_IN:
        x1, x2 = x1 * C, x2 * C
    fits = (x1 >= 0) & (x1 <= x2) & (x2 <= row) & (y1 >= 0) & (y1 <= y2) & (y2 <= H)
    tl.device_assert(fits, "a box is not 0 <= x1 <= x2 <= W and 0 <= y1 <= y2 <= H")
    x1, y1, x2, y2 = x1.to(tl.int32), y1.to(tl.int32), x2.to(tl.int32), y2.to(tl.int32)
    # Rows of the whole sample: after the H of one channel, or slice, come those of the next.
    first = l0 // row
    above = first % H
    end = above + ((l0 + BLOCK_L - 1) // row - first + 1)
    reaches = ((above < y2) & (end > y1)) | (end > H + y1)
    reaches &= (x1 < x2) & (y1 < y2)
    inside = tl.zeros([BLOCK_L], tl.int1)
    if reaches:
        column = (l0 - first * row).to(tl.int32) + tl.arange(0, BLOCK_L)
        passed = quotient(column, row, BLOCK_L)
        column -= passed * row
        y = above.to(tl.int32) + passed
        y -= quotient(y, H, BLOCK_L) * H
        inside = (y >= y1) & (y < y2) & (column >= x1) & (column < x2)
    return reaches, (inside if FORM.FLAT else inside[None, :])


# Tiles


@triton.jit
def tile_start(tile, batch, FORM: tl.constexpr):
    if FORM.WIDE:
        tile = tile.to(tl.int64)
    if FORM.FLAT:
        start = Start(0 * tile, tile * FORM.BLOCK_L)
    else:
        blocks = tl.cdiv(batch.L, FORM.BLOCK_L)
        start = Start(tile // blocks * FORM.BLOCK_C, tile % blocks * FORM.BLOCK_L)
    return start


@triton.jit
def tile_offsets(start, batch, LAST: tl.constexpr, FORM: tl.constexpr):
    """Where the tile's elements lie in a sample."""
    l = start.l0 + tl.arange(0, FORM.BLOCK_L)  # noqa: E741
    if FORM.FLAT:
        offsets = l
    else:
        c = start.c0 + tl.arange(0, FORM.BLOCK_C)
        offsets = l[None, :] * batch.C + c[:, None] if LAST else c[:, None] * batch.L + l[None, :]
    return offsets


@triton.jit
def tile_mask(start, batch, FORM: tl.constexpr):
    """Which of them there are."""
    l = start.l0 + tl.arange(0, FORM.BLOCK_L)  # noqa: E741
    if FORM.FLAT:
        mask = l < batch.size
    else:
        c = start.c0 + tl.arange(0, FORM.BLOCK_C)
        mask = (c[:, None] < batch.C) & (l[None, :] < batch.L)
    return mask


@triton.jit
def tile_channels(ptr, start, batch, FORM: tl.constexpr):
    """Of values at ptr, one a channel, those of the tile's; a flat tile has the channels last."""
    BLOCK_L: tl.constexpr = FORM.BLOCK_L
    C = batch.C
    if FORM.FLAT:
        i = (start.l0 % C).to(tl.int32) + tl.arange(0, BLOCK_L)
        values = tl.load(ptr + (i - quotient(i, C, BLOCK_L) * C))
    else:
        c = start.c0 + tl.arange(0, FORM.BLOCK_C)
        values = tl.load(ptr + c, mask=c < C, other=0.0)[:, None]
    return values


@triton.jit
def finished(values, mix, start, batch, FORM: tl.constexpr):
    """Times the scale plus the shift of each channel, where there are some."""
    if mix.scale is not None:
        values *= tile_channels(mix.scale, start, batch, FORM)
    if mix.shift is not None:
        values += tile_channels(mix.shift, start, batch, FORM)
    return values
