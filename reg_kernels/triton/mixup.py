"""Mixup and CutMix, and their gradient, in Triton.

Bytes an element, each counted once: sizeof(input) read and sizeof(output) written, forward,
backward and in place (4 B in bf16, 3 B from bytes to bf16). A sample is read by itself and by
whoever has it for a partner. Programs are in the order of tiles, all samples of one place side by
side, so that the second reading finds it in L2. In place a program walks a cycle of samples, and
reads each once. Tiles are those of _mixup.py.

The values of lam, index and boxes are asserted here, by the forward and in place, and those of
receivers and starts by the backward: nothing waits for them on the host.

The loops are `while`, as in batch_norm.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import is_channels_last
from ._launch import ASSERTING, ceil_div, device_of, next_power_of_2
from ._mixup import (
    Batch,
    Mix,
    MixupForm,
    begins_cycle,
    box_in_tile,
    finished,
    is_not_zero,
    mixup_values,
    occurrences,
    partner_of,
    rounded,
    tile_mask,
    tile_offsets,
    tile_start,
    weighted,
    weights_of,
)
from ._types import compute_type

TILE = 2048  # elements of a program: 16 bytes a thread and load, in bf16 with 8 warps
CHANNELS = 32  # of a tile whose channels lie together on one side only, at most
UNSPECIALISED = ["N", "H", "row"]  # no recompiling by value

# Kernels


@triton.jit(do_not_specialize=UNSPECIALISED)
def mixup_kernel(
    x_ptr,  # [N, C, L], or [N, L, C] where LAST_IN
    y_ptr,  # likewise by LAST_OUT
    mix,
    one_lam: tl.float64,  # where mix has no lam
    index_ptr,  # int64 [N], or None
    N,  # this and what follows: Batch
    size,
    C,
    L,
    H,
    row,
    FORM: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
    batch = Batch(N, size, C, L, H, row)
    program = tl.program_id(0)
    n = (program % N).to(tl.int64)
    start = tile_start(program // N, batch, FORM)
    w, rest = weights_of(n, mix, one_lam, COMPUTE, FORM)
    partner = partner_of(n, index_ptr, N)
    reads_partner = is_not_zero(rest)
    if mix.boxes is not None:
        reaches, inside = box_in_tile(n, mix, start, batch, FORM)
        reads_partner |= reaches
    there = tile_mask(start, batch, FORM)
    at = tile_offsets(start, batch, FORM.LAST_IN, FORM)
    own = tl.load(x_ptr + n * size + at, mask=there & is_not_zero(w), other=0)
    other = tl.load(x_ptr + partner * size + at, mask=there & reads_partner, other=0)
    y = mixup_values(own, other, w, rest, COMPUTE)
    if mix.boxes is not None:
        y = tl.where(inside, other.to(COMPUTE), y)
    y = finished(y, mix, start, batch, FORM)
    to = tile_offsets(start, batch, FORM.LAST_OUT, FORM)
    tl.store(y_ptr + n * size + to, rounded(y, y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "leaders"])
def mixup_cycles_kernel(
    x_ptr,  # [N, C, L] or [N, L, C], as LAST_IN and LAST_OUT say; written over
    mix,
    one_lam: tl.float64,
    index_ptr,  # a permutation
    leaders,  # of the first so many samples some begin a cycle
    N,
    size,
    C,
    L,
    H,
    row,
    FORM: tl.constexpr,
):
    """From sample to partner, and on to its partner: each is written when its partner has been
    read, and the first one's values are kept for the last. No other program touches them here."""
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty)
    batch = Batch(N, size, C, L, H, row)
    program = tl.program_id(0)
    leader = (program % leaders).to(tl.int64)
    if index_ptr is None:
        begins = True
    else:
        if program < leaders:  # once for all tiles
            once = occurrences(leader, index_ptr, N, 256) == 1
            tl.device_assert(once, "index is not a permutation")
        begins = begins_cycle(leader, index_ptr, N)
    if begins:
        start = tile_start(program // leaders, batch, FORM)
        there = tile_mask(start, batch, FORM)
        at = tile_offsets(start, batch, FORM.LAST_IN, FORM)
        first = tl.load(x_ptr + leader * size + at, mask=there, other=0)
        n, own, steps, goes_on = leader, first, 0, True
        while goes_on:
            partner = partner_of(n, index_ptr, N)
            steps += 1
            goes_on = (partner != leader) & (steps < N)
            other = tl.load(x_ptr + partner * size + at, mask=there & goes_on, other=0)
            other = tl.where(goes_on, other, first)
            w, rest = weights_of(n, mix, one_lam, COMPUTE, FORM)
            y = mixup_values(own, other, w, rest, COMPUTE)
            if mix.boxes is not None:
                _, inside = box_in_tile(n, mix, start, batch, FORM)
                y = tl.where(inside, other.to(COMPUTE), y)
            y = finished(y, mix, start, batch, FORM)
            tl.store(x_ptr + n * size + at, rounded(y, x_ptr.dtype.element_ty), mask=there)
            n, own = partner, other


@triton.jit
def given_by(
    n,
    grad_ptr,
    mix,
    one_lam,
    at,
    there,
    start,
    batch,
    TO_PARTNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORM: tl.constexpr,
):
    """What sample n's gradient gives to itself, or to its partner."""
    w, rest = weights_of(n, mix, one_lam, COMPUTE, FORM)
    weight = rest if TO_PARTNER else w
    reads = is_not_zero(weight)
    if mix.boxes is not None:
        reaches, inside = box_in_tile(n, mix, start, batch, FORM)
        if TO_PARTNER:
            reads |= reaches
    grad = tl.load(grad_ptr + n * batch.size + at, mask=there & reads, other=0).to(COMPUTE)
    given = weighted(grad, weight)
    if mix.boxes is not None:
        given = tl.where(inside, grad if TO_PARTNER else 0.0, given)
    return given


@triton.jit(do_not_specialize=UNSPECIALISED)
def mixup_backward_kernel(
    grad_ptr,  # [N, C, L], or [N, L, C] where LAST_IN
    y_ptr,  # the input's gradient, likewise by LAST_OUT
    mix,
    one_lam: tl.float64,
    receivers_ptr,  # int64 [N], those of partner n from starts[n] to starts[n + 1]; or None
    starts_ptr,  # int64 [N + 1], or None
    N,
    size,
    C,
    L,
    H,
    row,
    FORM: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(grad_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
    batch = Batch(N, size, C, L, H, row)
    program = tl.program_id(0)
    n = (program % N).to(tl.int64)
    start = tile_start(program // N, batch, FORM)
    there = tile_mask(start, batch, FORM)
    at = tile_offsets(start, batch, FORM.LAST_IN, FORM)
    own = given_by(n, grad_ptr, mix, one_lam, at, there, start, batch, False, COMPUTE, FORM)
    given = tl.zeros_like(own)
    if receivers_ptr is None:
        j, end = n, n + 1
    else:
        j, end = tl.load(starts_ptr + n), tl.load(starts_ptr + n + 1)
        tl.device_assert((j >= 0) & (j <= end) & (end <= N), "starts must be those of an index")
    while j < end:  # in their order: two runs give the same bits
        receiver = N - 1 - n if receivers_ptr is None else tl.load(receivers_ptr + j)
        tl.device_assert((receiver >= 0) & (receiver < N), "receivers must be samples")
        given += given_by(
            receiver, grad_ptr, mix, one_lam, at, there, start, batch, True, COMPUTE, FORM
        )
        j += 1
    y = finished(own + given, mix, start, batch, FORM)
    to = tile_offsets(start, batch, FORM.LAST_OUT, FORM)
    tl.store(y_ptr + n * size + to, rounded(y, y_ptr.dtype.element_ty), mask=there)


# Launchers


class _Tiles(NamedTuple):
    """How a batch falls apart."""

    count: int  # of a sample
    batch: Batch
    form: MixupForm
    warps: int


@functools.lru_cache(1024)
def _tiles(
    shape: tuple[int, ...],
    last_in: bool,
    last_out: bool,
    by_channel: bool,
    double: bool,
    one_lam: bool,
    one_box: bool,
) -> _Tiles:
    """`by_channel`: whether there is a scale or a shift; `double`: whether in float64."""
    tile = TILE // 2 if double else TILE  # for registers
    samples, channels = shape[0], shape[1] if len(shape) > 1 else 1
    size = torch.Size(shape[1:]).numel()
    length = size // channels
    if 1 in (channels, length):  # both layouts are the same
        last_in = last_out = channels > 1
    flat = last_in == last_out and (last_in or not by_channel)
    if flat:
        block_c, block_l = 1, min(next_power_of_2(size), tile)
        count = ceil_div(size, block_l)
    else:
        wanted = tile // CHANNELS if last_in != last_out else tile
        block_l = min(next_power_of_2(length), wanted)
        block_c = min(next_power_of_2(channels), tile // block_l)
        block_l = min(next_power_of_2(length), tile // block_c)
        count = ceil_div(channels, block_c) * ceil_div(length, block_l)
    row = shape[-1] * (channels if flat and last_in else 1)
    height = shape[-2] if len(shape) > 2 else 1
    wide = size > 2**31 - 2**16
    return _Tiles(
        count=count,
        batch=Batch(samples, size, channels, length, height, row),
        form=MixupForm(flat, last_in, last_out, wide, block_c, block_l, one_lam, one_box),
        warps=max(1, block_c * block_l * 8 // tile),
    )


def _tiles_of(x: Tensor, mix: Mix, dtype: torch.dtype, channels_last: bool) -> _Tiles:
    """Of a batch, and of a result in `dtype` that has the channels last or not."""
    return _tiles(
        x.shape,
        _is_last(x),
        channels_last,
        mix.scale is not None or mix.shift is not None,
        torch.float64 in (x.dtype, dtype),
        mix.lam is not None and mix.lam.numel() == 1,
        mix.boxes is not None and mix.boxes.numel() == 4,
    )


def _is_last(x: Tensor) -> bool:
    return x.dim() > 2 and is_channels_last(x)


def _empty(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    if not channels_last:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    strides = [1] * x.dim()
    step = x.shape[1]
    for d in (*range(x.dim() - 1, 1, -1), 0):
        strides[d], step = step, step * x.shape[d]
    # Not a view of a contiguous one: autograd lets nobody write to a view that an op made.
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)


def mixup(
    input: Tensor,
    lam: Tensor | None,
    one_lam: float,
    index: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The op; input contiguous or with the channels last."""
    output = _empty(input, dtype, channels_last)
    if output.numel() == 0:
        return output
    mix = Mix(lam, boxes, scale, shift)
    tiles = _tiles_of(input, mix, dtype, channels_last)
    with device_of(input):
        mixup_kernel[(tiles.count * len(input),)](
            *(input, output, mix, one_lam, index, *tiles.batch, tiles.form),
            num_warps=tiles.warps,
            **ASSERTING,
        )
    return output


def mixup_(
    input: Tensor,
    lam: Tensor | None,
    one_lam: float,
    index: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """The same over the input; index a permutation."""
    if input.numel() == 0:
        return
    mix = Mix(lam, boxes, scale, shift)
    tiles = _tiles_of(input, mix, input.dtype, _is_last(input))
    leaders = len(input) if index is not None else (len(input) + 1) // 2
    with device_of(input):
        mixup_cycles_kernel[(tiles.count * leaders,)](
            *(input, mix, one_lam, index, leaders, *tiles.batch, tiles.form),
            num_warps=tiles.warps,
            **ASSERTING,
        )


def mixup_backward(
    grad_output: Tensor,
    lam: Tensor | None,
    one_lam: float,
    receivers: Tensor | None,
    starts: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The op's gradient by its input."""
    grad_input = _empty(grad_output, dtype, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    mix = Mix(lam, boxes, scale)
    tiles = _tiles_of(grad_output, mix, dtype, channels_last)
    with device_of(grad_output):
        mixup_backward_kernel[(tiles.count * len(grad_output),)](
            *(grad_output, grad_input, mix, one_lam, receivers, starts),
            *(*tiles.batch, tiles.form),
            num_warps=tiles.warps,
            **ASSERTING,
        )
    return grad_input
