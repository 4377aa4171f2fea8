"""The random elementwise family in Triton: y by x and a draw of 16 or 32 bits, which an element has
to itself or shares with its row, a channel or a sample.

Reads x, and the residual where there is one, and writes y: 2 or 3 sizeof(dtype) bytes an element;
x only where it is kept, of an op that does not read what it drops. No mask is stored.

An op of the family is an Element: its function of one, and the tag of its draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._layout import dense_like, is_dense
from ._launch import ceil_div, device_of, next_power_of_2, state_arguments
from ._random import half_word_at, half_words, load_state, normal_at, normals, word_at, words
from ._random import product_apart as product_apart
from ._types import compute_type

TILE = 2048  # elements a program: 16 bytes a thread and load, in bf16 with 8 warps
UNSPECIALISED = ["seed", "offset", "element_offset"]  # no recompiling by value


class DrawnBy(NamedTuple):
    """What the ops of the family are told of their draws, in the order of their schemas."""

    p: float
    rng_state: Tensor
    element_offset: int = 0
    traced_p: Tensor | None = None  # float64 [1], which counts instead of p


class Element(NamedTuple):
    """An op of the family, that kernels are compiled for: one constexpr, OP."""

    # Jit function of (x, drawn, threshold, scale) and, of an op that has them, three further
    # numbers; x in the type of computing.
    VALUES: Any
    TAG: int  # `_rng.tag`
    READS_DROPPED: bool = True
    DROPS: bool = True  # else p is no probability, but the number that comes as the scale
    BITS: int = 16  # of a draw, or 32
    NORMAL: bool = False  # whether draws are normal numbers, of 32 bits each
    OPTIONS: bool = False  # whether there are numbers behind p

    @property
    def cache_key(self) -> str:
        """Triton's files of what it has compiled go by it; else by VALUES' name, not its text."""
        return f"{self.VALUES.cache_key} {self[1:]}"


class Operands(NamedTuple):
    """Pointers to dense tensors that lie alike; y may be x, the residual None."""

    x: Any
    residual: Any
    y: Any


class LayerScale(NamedTuple):
    """A factor for each channel, in the type of computing: that of element l of a row is
    data[l // inner % channels]."""

    data: Any  # not `values`, which a tuple in a kernel has of its own
    channels: Any
    inner: Any


class Draws(NamedTuple):
    """What decides a mask: the stream's key and offset, and what its draws are held to."""

    key: Any
    offset: Any
    threshold: Any
    scale: Any


@triton.jit
def load_rate(p_ptr, p):
    """(threshold, scale), [1] each, of the probability at p_ptr where one is there, else of p."""
    if p_ptr is not None:
        p = tl.load(p_ptr)
    keep = (1.0 - tl.full([1], p, tl.float64)) * 65536.0
    # Adding and taking off 1.5 2^52 rounds to the nearest integer, ties to even.
    threshold = (keep + 6755399441055744.0) - 6755399441055744.0
    scale = tl.where(threshold > 0.0, 65536.0 / tl.maximum(threshold, 1.0), 0.0)
    return threshold.to(tl.uint32), scale


@triton.jit
def load_draws(p_ptr, p, state_ptr, seed, offset, TAG: tl.constexpr, DROPS: tl.constexpr = True):
    seed, offset = load_state(state_ptr, seed, offset)
    if DROPS:
        threshold, scale = load_rate(p_ptr, p)
    else:
        threshold = tl.full([1], 0, tl.uint32)
        scale = tl.full([1], p if p_ptr is None else tl.load(p_ptr), tl.float64)
    return Draws(seed ^ TAG, offset, threshold, scale)


@triton.jit
def stored(y, dtype: tl.constexpr):
    """y in a dtype: of bytes rounded to nearest even and held to [0, 255], 0 for a NaN."""
    if dtype == tl.uint8:
        y = tl.where(y > 0.0, tl.where(y < 255.0, y, 255.0), 0.0)
        y = (y + 12582912.0) - 12582912.0  # 1.5 2^23
    return y.to(dtype)


@triton.jit
def map_elements(
    operands,
    at,
    inside,
    drawn,  # broadcasts to the elements
    draws,
    options,  # three numbers, or None each
    layer_scale,  # factors that broadcast to the elements, or None
    OP: tl.constexpr,
):
    """y of the elements at `at`. What is dropped unread leaves the residual as it is."""
    DTYPE: tl.constexpr = operands.x.dtype.element_ty
    COMPUTE: tl.constexpr = compute_type(DTYPE)
    reads = inside if OP.READS_DROPPED else inside & (drawn < draws.threshold)
    x = tl.load(operands.x + at, mask=reads).to(COMPUTE)
    if OP.OPTIONS:
        first = tl.full([1], options[0], tl.float64)
        second = tl.full([1], options[1], tl.float64)
        third = tl.full([1], options[2], tl.float64)
        y = OP.VALUES(x, drawn, draws.threshold, draws.scale, first, second, third)
    elif layer_scale is not None:  # of an op that leaves unread what it drops
        factor = OP.VALUES(layer_scale, drawn, draws.threshold, draws.scale)
        y = tl.where(drawn < draws.threshold, product_apart(x, factor), 0.0)
    else:
        y = OP.VALUES(x, drawn, draws.threshold, draws.scale)
    if operands.residual is not None:
        residual = tl.load(operands.residual + at, mask=inside).to(COMPUTE)
        sums = residual + y
        y = sums if OP.READS_DROPPED else tl.where(drawn < draws.threshold, sums, residual)
    tl.store(operands.y + at, stored(y, DTYPE), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def elements_kernel(
    operands,  # [numel] in storage order
    numel,
    element_offset: tl.int64,  # mask index of element 0
    p_ptr,  # float64 [1], or None: else it counts instead of p
    p: tl.float64,
    state_ptr,  # int64 [2], or None: else it counts instead of the two
    seed: tl.int64,
    offset: tl.int64,
    option_0: tl.float64,  # the numbers behind p in the op's schema, or None
    option_1: tl.float64,
    option_2: tl.float64,
    OP: tl.constexpr,
    LEAD: tl.constexpr,  # position of element 0 in its group: 0 keeps the accesses aligned
    BLOCK: tl.constexpr,
):
    draws = load_draws(p_ptr, p, state_ptr, seed, offset, OP.TAG, OP.DROPS)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    A_GROUP: tl.constexpr = 128 // OP.BITS
    first_group = (element_offset - LEAD + block) // A_GROUP
    if OP.NORMAL:
        drawn = normals(draws.key, draws.offset, first_group, BLOCK // A_GROUP)
    elif OP.BITS == 32:
        drawn = words(draws.key, draws.offset, first_group, BLOCK // A_GROUP)
    else:
        drawn = half_words(draws.key, draws.offset, first_group, BLOCK // A_GROUP)
    i = block - LEAD + tl.arange(0, BLOCK)
    options = (option_0, option_1, option_2)
    map_elements(operands, i, (i >= 0) & (i < numel), drawn, draws, options, None, OP)


@triton.jit(do_not_specialize=UNSPECIALISED)
def rows_kernel(
    operands,  # (N, R, L) of the strides below: rows are channels, or samples where N is 1
    R,
    L,
    stride_r,  # L and 1, or for channels last 1 and R
    stride_l,
    element_offset: tl.int64,  # mask index of row 0; this and what follows as above
    p_ptr,
    p: tl.float64,
    state_ptr,
    seed: tl.int64,
    offset: tl.int64,
    option_0: tl.float64,  # the numbers behind p in the op's schema, or None
    option_1: tl.float64,
    option_2: tl.float64,
    layer_scale,  # (data, channels, inner) of a LayerScale, or None
    OP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    draws = load_draws(p_ptr, p, state_ptr, seed, offset, OP.TAG, OP.DROPS)
    blocks_r, blocks_l = tl.cdiv(R, BLOCK_R), tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    n = program // (blocks_r * blocks_l)
    r = (program // blocks_l) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    l = program % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    index = element_offset + n * R + r
    if OP.NORMAL:
        drawn = normal_at(draws.key, draws.offset, index)[:, None]
    elif OP.BITS == 32:
        drawn = word_at(draws.key, draws.offset, index)[:, None]
    else:
        drawn = half_word_at(draws.key, draws.offset, index)[:, None]
    i = n * R * L + r[:, None] * stride_r + l[None, :] * stride_l
    inside = (r[:, None] < R) & (l[None, :] < L)
    options = (option_0, option_1, option_2)
    if layer_scale is not None:
        channel = l // layer_scale.inner % layer_scale.channels
        factors = tl.load(layer_scale.data + channel)[None, :]
        map_elements(operands, i, inside, drawn, draws, options, factors, OP)
    else:
        map_elements(operands, i, inside, drawn, draws, options, None, OP)


NO_OPTIONS = (None, None, None)


def _arguments(draw: DrawnBy, options: tuple[Any, ...] = NO_OPTIONS) -> tuple[Any, ...]:
    """The kernels' from element_offset to the options: what decides the mask, by value or by
    pointer, and what else the op is told."""
    p, rng_state, element_offset, traced_p = draw
    if traced_p is not None and traced_p.device.type == "cpu":
        p, traced_p = float(traced_p), None
    return element_offset, traced_p, p, *state_arguments(rng_state), *options


def launch_elements(
    op: Element,
    x: Tensor,
    y: Tensor,
    draw: DrawnBy,
    residual: Tensor | None = None,
    options: tuple[Any, ...] = NO_OPTIONS,
) -> None:
    """y of the dense x, a draw for each element in storage order."""
    if x.numel() == 0:
        return
    lead = draw.element_offset % (128 // op.BITS)
    with device_of(x):
        elements_kernel[(ceil_div(lead + x.numel(), TILE),)](
            *(Operands(x, residual, y), x.numel(), *_arguments(draw, options), op, lead, TILE),
            num_warps=8,
        )


def launch_rows(
    op: Element,
    x: Tensor,
    y: Tensor,
    draw: DrawnBy,
    *,
    samples: int,
    rows: int,
    rows_last: bool = False,
    residual: Tensor | None = None,
    layer_scale: LayerScale | None = None,
) -> None:
    """y of the dense x (samples, rows, ...), or (samples, ..., rows) in storage where `rows_last`;
    a draw for each row of each sample."""
    if x.numel() == 0:
        return
    length = x.numel() // (samples * rows)
    if rows_last:
        stride_r, stride_l = 1, rows
        block_r = min(next_power_of_2(rows), 256)
        block_l = TILE // block_r
    else:
        stride_r, stride_l = length, 1
        block_l = min(next_power_of_2(length), TILE)
        block_r = TILE // block_l
    programs = samples * ceil_div(rows, block_r) * ceil_div(length, block_l)
    with device_of(x):
        rows_kernel[(programs,)](
            *(Operands(x, residual, y), rows, length, stride_r, stride_l, *_arguments(draw)),
            *(layer_scale, op, block_r, block_l),
            num_warps=8,
        )


# Ops whose draws are each for an element, of any shape: what their modules have as functions of
# their names.


def fresh(
    op: Element, input: Tensor, draw: DrawnBy, options: tuple[Any, ...] = NO_OPTIONS
) -> Tensor:
    """The op's result as a fresh tensor; any layout."""
    x = input if is_dense(input) else input.contiguous()
    y = dense_like(x)
    launch_elements(op, x, y, draw, None, options)
    return y


def over(op: Element, input: Tensor, draw: DrawnBy, options: tuple[Any, ...] = NO_OPTIONS) -> None:
    """The same over a dense input."""
    launch_elements(op, input, input, draw, None, options)
