"""Image augmentation in Triton: one launch for the first segment of all samples' programs, one for
their second, ...; a segment is a geometric instruction and the instructions of single pixels after
it (_augment_plan.py), and a program of the grid has all channels of BLOCK of its pixels.

Bytes an element: sizeof(pixels) read for each one that is in a crop, and sizeof(dtype) written;
between two segments 4 written and 4 read again. Tables of taps (_augment_geometry.py) are made by a
launch of their own, 8 bytes a tap and place of an axis. Statistics are added up by atomics on
integers at the end of the segment before, in any order with the same bits.

Images and programs are on the host, which decides what to launch; it waits for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._augment_program import WIDTH
from . import _augment_names as names
from ._augment_geometry import Image, Taps, read, sharpened, summed, taps_kernel, warped
from ._augment_plan import plan_for
from ._augment_values import (
    INTERPRETED,
    AugmentForm,
    Pixels,
    and_one,
    chosen,
    executed,
    gray_level,
    gray_of,
    gray_unit,
    number_between,
    ordered,
    rounded,
    settled_nearest,
)
from ._launch import ceil_div, device_of
from ._random import product_apart

BLOCK = 256  # pixels of a program, 2 a thread
TAPS_BLOCK = 128  # places of an axis that a program makes the taps of
ARGUMENTS = tl.constexpr(WIDTH)


@triton.jit(do_not_specialize=["first", "segments", "tiles", "S"])
def segments_kernel(
    source_ptr,  # pixels of the input, or scratch
    result_ptr,  # [N, C, height, width], or [N, height, width, C] where LAST_OUT
    scratch_ptr,  # float32
    taps_ptr,  # int64
    statistics_ptr,  # int32, zeros at first
    program_ptr,  # float32 [N, S, ARGUMENTS]
    plan_ptr,  # int64 [fields, segments]
    first,  # the launch's first segment
    segments,
    tiles,  # of the largest image
    S,
    FORM: tl.constexpr,
):
    C: tl.constexpr = FORM.C
    # Offsets into an image.
    OFFSET: tl.constexpr = tl.int64 if FORM.WIDE else tl.int32
    plan_ptr += first + tl.program_id(0) // tiles
    height = tl.load(plan_ptr + names.AT_HEIGHT * segments).to(tl.int32)
    width = tl.load(plan_ptr + names.AT_WIDTH * segments).to(tl.int32)
    size = height.to(OFFSET) * width
    start = (tl.program_id(0) % tiles).to(OFFSET) * FORM.BLOCK
    if start >= size:
        return
    # A tile is in int32 from the row on that it begins in.
    first_row = (start // width).to(tl.int32)
    first_column = (start - first_row.to(OFFSET) * width).to(tl.int32)
    column = first_column + tl.arange(0, FORM.BLOCK)
    rows = column // width
    index = start + tl.arange(0, FORM.BLOCK)
    pixels = Pixels(
        index,
        tl.minimum(first_row + rows, height - 1),
        column - rows * width,
        index < size,
        size,
        first_row,
        first_row + (first_column + FORM.BLOCK - 1) // width,
    )
    sample = tl.load(plan_ptr + names.AT_SAMPLE * segments)
    program_ptr += sample * S * ARGUMENTS
    ptr = program_ptr + tl.load(plan_ptr + names.AT_GEOMETRY * segments) * ARGUMENTS
    v = gathered(source_ptr, taps_ptr, ptr, plan_ptr, segments, pixels, FORM)

    at = tl.load(plan_ptr + names.AT_BEGIN * segments).to(tl.int32)
    end = tl.load(plan_ptr + names.AT_END * segments).to(tl.int32)
    known_at_ptr = plan_ptr + names.AT_KNOWN_AT * segments
    while at < end:
        ptr = program_ptr + at * ARGUMENTS
        v = executed(tl.load(ptr).to(tl.int32), ptr, v, pixels, statistics_ptr, known_at_ptr, FORM)
        at += 1

    statistic = tl.load(plan_ptr + names.AT_STATISTIC * segments)
    if statistic != 0:
        to_ptr = statistics_ptr + tl.load(plan_ptr + names.AT_STATISTIC_AT * segments)
        count(statistic, to_ptr, v, pixels.there, FORM)
    sink = tl.load(plan_ptr + names.AT_SINK * segments)
    sink_at = tl.load(plan_ptr + names.AT_SINK_AT * segments)
    if sink == 0:
        for c in tl.static_range(C):
            offset = index * FORM.C + c if FORM.LAST_OUT else c * size + index
            store(result_ptr + sink_at + offset, v[c], pixels.there)
    else:
        sums_ptr = scratch_ptr + tl.load(plan_ptr + names.AT_SUMS_AT * segments) + index
        # Of SAVE and JOIN, which end their segments.
        weight = tl.load(program_ptr + tl.maximum(end - 1, 0) * ARGUMENTS + names.JOIN__WEIGHT)
        for c in tl.static_range(C):
            if sink == names.JOIN:
                sums = tl.load(sums_ptr + c * size, mask=pixels.there, other=0.0)
                sums += product_apart(v[c], weight)
                tl.store(sums_ptr + c * size, sums, mask=pixels.there)
            else:
                to_ptr = scratch_ptr + sink_at + c * size + index
                tl.store(to_ptr, v[c], mask=pixels.there)
                if sink == names.SAVE:
                    tl.store(sums_ptr + c * size, v[c] * weight, mask=pixels.there)


@triton.jit
def gathered(source_ptr, taps_ptr, ptr, plan_ptr, segments, pixels, FORM: tl.constexpr):
    """The segment's pixels after its geometric instruction, which is at ptr."""
    C: tl.constexpr = FORM.C
    height = tl.load(plan_ptr + names.AT_SOURCE_HEIGHT * segments).to(tl.int32)
    width = tl.load(plan_ptr + names.AT_SOURCE_WIDTH * segments).to(tl.int32)
    row = width.to(pixels.size.dtype)
    image = Image(
        source_ptr + tl.load(plan_ptr + names.AT_SOURCE * segments),
        height,
        width,
        row * C if FORM.LAST_IN else row,
        row * 0 + 1 if FORM.LAST_IN else row * height,
    )
    kind = tl.load(plan_ptr + names.AT_KIND * segments)
    if kind == names.BOX:
        rows = Taps(
            taps_ptr + tl.load(plan_ptr + names.AT_ROWS_TAPS * segments),
            tl.maximum(tl.load(plan_ptr + names.AT_ROWS * segments), 1).to(tl.int32),
            tl.load(plan_ptr + names.AT_HEIGHT * segments).to(tl.int32),
        )
        columns = Taps(
            taps_ptr + tl.load(plan_ptr + names.AT_COLUMNS_TAPS * segments),
            tl.maximum(tl.load(plan_ptr + names.AT_COLUMNS * segments), 1).to(tl.int32),
            tl.load(plan_ptr + names.AT_WIDTH * segments).to(tl.int32),
        )
        sums = summed(image, rows, columns, ptr + names.BOX__FILL0, pixels, FORM)
        finish = tl.load(plan_ptr + names.AT_FINISH * segments)
        v = ()
        for c in tl.static_range(C):
            v = and_one(v, tl.where(finish == 1, settled_nearest(sums[c], FORM), sums[c]))
    elif kind == names.WARP:
        v = warped(ptr, image, pixels, FORM)
    elif kind == names.SHARPNESS:
        v = sharpened(ptr, image, pixels, FORM)
    else:
        v = read(image, pixels.y, pixels.x, pixels.there, FORM)
    return v


@triton.jit
def count(statistic, to_ptr, v, there, FORM: tl.constexpr):
    """Adds the tile's share of what the instruction `statistic` needs of the image."""
    C: tl.constexpr = FORM.C
    if statistic == names.CONTRAST:
        if FORM.C == 1 or FORM.C == 3:
            gray = gray_of(v, FORM) if FORM.C == 3 else v[0]
            gray = rounded(number_between(gray, 0.0, FORM.BOUND) * gray_unit(FORM))
            gray = tl.where(there, gray.to(tl.int32), 0)
            tl.atomic_add(
                to_ptr.to(tl.pointer_type(tl.int64)), tl.sum(gray, 0).to(tl.int64), sem="relaxed"
            )
    elif statistic == names.AUTOCONTRAST:
        for c in tl.static_range(C):
            word = ordered(v[c])
            number = there & (v[c] == v[c])
            words_ptr = to_ptr.to(tl.pointer_type(tl.uint32)) + 2 * c
            tl.atomic_max(
                words_ptr, tl.max(tl.where(number, word ^ 0xFFFFFFFF, 0), 0), sem="relaxed"
            )
            tl.atomic_max(words_ptr + 1, tl.max(tl.where(number, word, 0), 0), sem="relaxed")
    else:
        channel = 0
        while channel < C:
            levels = gray_level(chosen(v, channel, FORM), FORM)
            found = tl.histogram(levels, 256, mask=there)
            bins_ptr = to_ptr + 256 * channel + tl.arange(0, 256)
            tl.atomic_add(bins_ptr, found, mask=found > 0, sem="relaxed")
            channel += 1


@triton.jit
def store(ptr, v, mask):
    if ptr.dtype.element_ty == tl.uint8:
        v = number_between(rounded(v), 0.0, 255.0)
    elif INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts bits off.
        bits = v.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        v = tl.where(v == v, nearest, v)
    tl.store(ptr, v.to(ptr.dtype.element_ty), mask=mask)


def augment(
    pixels: Tensor,
    images: Tensor,
    program: Tensor,
    channels: int,
    channels_last: bool,
    height: int,
    width: int,
    dtype: torch.dtype,
    result_channels_last: bool,
    exact: bool,
) -> Tensor:
    """The op; images and program on the CPU, where their values have been checked."""
    device = pixels.device
    layout = torch.channels_last if result_channels_last else torch.contiguous_format
    shape = (len(images), channels, height, width)
    result = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
    if result.numel() == 0:
        return result
    plan = plan_for(images, program, channels, channels * height * width)
    # Rows of 64 bytes come first, so that both are aligned alike whatever their lengths.
    instructions, fields = _sent((plan.program, plan.fields), device)
    segments, steps = plan.fields.shape[1], plan.program.shape[1]
    scratch = torch.empty(plan.scratch, dtype=torch.float32, device=device)
    taps = torch.empty(plan.taps, dtype=torch.int64, device=device)
    statistics = torch.zeros(plan.statistics, dtype=torch.int32, device=device)
    form = AugmentForm(
        C=channels,
        BOUND=255.0 if pixels.dtype == torch.uint8 else 1.0,
        EXACT=exact,
        LAST_IN=channels_last and channels > 1,
        LAST_OUT=result_channels_last and channels > 1,
        BLOCK=BLOCK,
        WIDE=plan.largest >= 2**31 - BLOCK,
    )
    with device_of(pixels):
        if plan.taps:
            taps_kernel[(2 * segments, ceil_div(plan.longest, TAPS_BLOCK))](
                *(instructions, fields, taps, steps, segments, WIDTH, TAPS_BLOCK), num_warps=4
            )
        source = pixels
        for launch in plan.launches:
            tiles = ceil_div(launch.pixels, BLOCK)
            segments_kernel[(launch.count * tiles,)](
                *(source, result, scratch, taps, statistics, instructions, fields),
                *(launch.first, segments, tiles, steps, form),
                num_warps=4,
            )
            source, form = scratch, form._replace(LAST_IN=False)
    return result


def _sent(tensors: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """The same on the device, in one copy that nobody waits for."""
    if device.type == "cpu":
        return [x.contiguous() for x in tensors]
    sizes = [x.numel() * x.itemsize for x in tensors]
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, x in zip(host.split(sizes), tensors, strict=True):
        part.view(x.dtype).view(x.shape).copy_(x)
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]
