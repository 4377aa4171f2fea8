"""What mixup's kernels share: how a sample is mixed, and tiles of one.

A tile is of one sample, (C, L) in memory or (L, C) with the channels last. FLAT, where input and
output lie alike, it is [BLOCK_L] elements side by side, whichever channels they belong to; else
[BLOCK_C, BLOCK_L] channels and positions, which reach memory in the order of either side. (c0, l0)
is where it begins; FLAT that is (0, its first element). Elements are divided by the size of rows
only where a box reaches into the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def compute_type(dtype, other):
    """float64 where one of the two is, else float32."""
    return tl.float64 if tl.float64 in (dtype, other) else tl.float32


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
def weights_of(n, lam_ptr, one_lam, ONE_LAM: tl.constexpr, COMPUTE: tl.constexpr):
    """What sample n and its partner count for, each rounded once."""
    if lam_ptr is None:
        lam = tl.full([], one_lam, tl.float64)
    else:
        lam = tl.load(lam_ptr + (0 if ONE_LAM else n)).to(tl.float64)
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
def box_in_tile(
    n,
    boxes_ptr,  # int64 [N, 4], or [1, 4]: x1, y1, x2, y2
    l0,
    C,
    H,
    row,  # elements of one: W, or W C where a flat tile has the channels last
    ONE_BOX: tl.constexpr,
    FLAT: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """(whether sample n's box reaches into the tile, which of its elements lie inside)."""
    box_ptr = boxes_ptr + (0 if ONE_BOX else 4 * n)
    x1, y1 = tl.load(box_ptr), tl.load(box_ptr + 1)
    x2, y2 = tl.load(box_ptr + 2), tl.load(box_ptr + 3)
    if FLAT and LAST:
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
    return reaches, (inside if FLAT else inside[None, :])


# Tiles


@triton.jit
def tile_start(tile, L, FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C, BLOCK_L):
    """(c0, l0), int64 where a sample has more elements than an int32 counts."""
    if WIDE:
        tile = tile.to(tl.int64)
    if FLAT:
        start = 0 * tile, tile * BLOCK_L
    else:
        blocks = tl.cdiv(L, BLOCK_L)
        start = tile // blocks * BLOCK_C, tile % blocks * BLOCK_L
    return start


@triton.jit
def tile_offsets(
    c0,
    l0,
    C,
    L,
    FLAT: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Where the tile's elements lie in a sample."""
    l = l0 + tl.arange(0, BLOCK_L)  # noqa: E741
    if FLAT:
        offsets = l
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        offsets = l[None, :] * C + c[:, None] if LAST else c[:, None] * L + l[None, :]
    return offsets


@triton.jit
def tile_mask(c0, l0, size, C, L, FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """Which of them there are."""
    l = l0 + tl.arange(0, BLOCK_L)  # noqa: E741
    if FLAT:
        mask = l < size
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < C) & (l[None, :] < L)
    return mask


@triton.jit
def tile_channels(ptr, c0, l0, C, FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """Of values at ptr, one a channel, those of the tile's; a flat tile has the channels last."""
    if FLAT:
        i = (l0 % C).to(tl.int32) + tl.arange(0, BLOCK_L)
        values = tl.load(ptr + (i - quotient(i, C, BLOCK_L) * C))
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        values = tl.load(ptr + c, mask=c < C, other=0.0)[:, None]
    return values


@triton.jit
def finished(values, scale_ptr, shift_ptr, c0, l0, C, FLAT: tl.constexpr, BLOCK_C, BLOCK_L):
    """Times the scale plus the shift of each channel, where there are some."""
    if scale_ptr is not None:
        values *= tile_channels(scale_ptr, c0, l0, C, FLAT, BLOCK_C, BLOCK_L)
    if shift_ptr is not None:
        values += tile_channels(shift_ptr, c0, l0, C, FLAT, BLOCK_C, BLOCK_L)
    return values
