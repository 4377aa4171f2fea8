"""How augment's programs are cut into segments, on the host; kernels take a segment each.

A segment is a geometric instruction, or none, and the instructions of single pixels after it. One
ends where the next instruction needs the whole image: launch k runs segment k of all samples that
have so many. BLUR, and BOX of many taps, are two segments: the first one sums along columns alone,
the second one along rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional
from torch import Tensor

from .._augment_program import WIDTH, Axes, Filter, Op, column
from ._augment_names import FIELDS

MOST_TAPS = 64  # of a pixel, until a BOX is two segments

SLOTS, SUMS = 5, 4  # images of AugMix in scratch: two that take turns, two for SAVE, the sums
GEOMETRIC = (Op.BOX, Op.WARP, Op.SHARPNESS, Op.BLUR)
STATISTICS = (Op.CONTRAST, Op.AUTOCONTRAST, Op.EQUALIZE)


class Launch(NamedTuple):
    """Of segments [first, first + count), the largest image of which has `pixels`."""

    first: int
    count: int
    pixels: int


class Plan(NamedTuple):
    """What to launch, and on how much memory."""

    fields: Tensor  # int64 [len(FIELDS), segments]
    program: Tensor  # float32 [N, S, WIDTH], NONE at the end of each sample alone
    launches: list[Launch]
    scratch: int  # floats
    taps: int  # of tables, an int64 each
    statistics: int  # int32s
    longest: int  # side that has a table
    largest: int  # image at any point, in elements


def plan_for(images: Tensor, program: Tensor, channels: int, steps: int) -> Plan:
    """The plan of a batch; `steps` is how many elements one of the result has."""
    program = _compacted(program)
    op = program[..., 0].long()

    def argument(of: Op, name: str) -> Tensor:
        return program[..., column(of, name)].long()

    def among(*ops: Op) -> Tensor:
        return torch.stack([op == one for one in ops]).any(0)

    box, blur, statistic = op == Op.BOX, op == Op.BLUR, among(*STATISTICS)
    geometric = among(*GEOMETRIC)
    rows, columns = _taps(box, blur, argument)
    split = (box & (rows * columns > MOST_TAPS)) | (blur & (rows > 0) & (columns > 0))
    begins = geometric | statistic | (op == Op.MIX)
    begins[:, 1:] |= among(Op.SAVE, Op.JOIN)[:, :-1]
    begins[:, 0] = statistic[:, 0]
    segment = (begins.long() + split).cumsum(1)  # of each instruction; where split, its last
    last = segment[:, -1:]
    count = int(last.max()) + 1
    number = torch.arange(count)
    before = (segment - 1).clamp_(0)

    def of_segments(values: Tensor, where: Tensor | None = None, at: Tensor = segment) -> Tensor:
        """Sums of instructions' values in their segments, of which most have one."""
        values = values.long() if where is None else values * where
        return torch.zeros(len(program), count, dtype=torch.int64).scatter_add_(1, at, values)

    def sizes(out: Tensor, initial: Tensor) -> Tensor:
        """Of each segment, where `out` has those of the segments that change them, else 0."""
        changed = torch.where(out > 0, number, -1).cummax(1).values
        return torch.where(changed < 0, initial[:, None], out.gather(1, changed.clamp(0)))

    end = of_segments(op != Op.NONE).cumsum(1)
    warp = op == Op.WARP
    out = torch.where(box, argument(Op.BOX, "out_height"), argument(Op.WARP, "out_height"))
    out_height = of_segments(out, box | warp) + of_segments(out, box & split, before)
    out = torch.where(box, argument(Op.BOX, "out_width"), argument(Op.WARP, "out_width"))
    out_width = of_segments(out, box | warp)
    offset, image_height, image_width = images.unbind(1)
    height, width = sizes(out_height, image_height), sizes(out_width, image_width)
    rows = of_segments(rows, ~split) + of_segments(rows, split, before)
    columns = of_segments(columns)
    index = torch.arange(op.shape[1]).expand_as(op)

    # What each leaves for the next.
    is_last, live = number == last, number <= last
    saves, joins = of_segments(op == Op.SAVE), of_segments(op == Op.JOIN)
    saved = 2 + saves.cumsum(1) % 2  # the slot of what was saved last
    sink_slot = torch.where(saves > 0, saved, number % 2)
    source_slot = torch.where(joins > 0, saved, sink_slot).roll(1, 1)
    source_slot = torch.where(of_segments(op == Op.MIX) > 0, SUMS, source_slot)
    needs = of_segments(op, statistic)
    gives = torch.cat((needs[:, 1:], torch.zeros_like(needs[:, :1])), 1)
    words = torch.where(gives == Op.EQUALIZE, 256 * channels, 0)
    words += torch.where(gives == Op.AUTOCONTRAST, 2 * channels, 0) + 2 * (gives == Op.CONTRAST)
    words_end = words.flatten().cumsum(0).view_as(words)

    # Where it is in scratch: each sample's slots side by side.
    slots = SLOTS if bool(saves.any()) else min(count - 1, 2)
    pixels = height * width
    slot_size = (channels * pixels * (live & ~is_last)).amax(1, keepdim=True)
    base = (slot_size.cumsum(0) - slot_size) * slots
    source = base + slot_size * source_slot
    source[:, 0] = offset
    kind = of_segments(op.where(among(Op.WARP, Op.SHARPNESS), Op.BOX), geometric)
    kind += of_segments(torch.full_like(op, Op.BOX), split, before)
    row_taps = live * (kind == Op.BOX) * rows.clamp(min=1) * height
    taps = row_taps + live * (kind == Op.BOX) * columns.clamp(min=1) * width
    taps_at = taps.flatten().cumsum(0).view_as(taps) - taps

    fields = dict(
        sample=torch.arange(len(program))[:, None].expand_as(end),
        begin=torch.cat((torch.zeros_like(end[:, :1]), end[:, :-1]), 1),
        end=end,
        kind=kind,
        geometry=of_segments(index, geometric) + of_segments(index, split, before),
        finish=of_segments(geometric),
        source=source,
        source_height=torch.cat((image_height[:, None], height[:, :-1]), 1),
        source_width=torch.cat((image_width[:, None], width[:, :-1]), 1),
        height=height,
        width=width,
        rows=rows,
        rows_taps=taps_at,
        columns=columns,
        columns_taps=taps_at + row_taps,
        sink=torch.where(is_last, 0, 1) + (saves * (Op.SAVE - 1) + joins * (Op.JOIN - 1)),
        sink_at=torch.where(
            is_last, torch.arange(len(program))[:, None] * steps, base + slot_size * sink_slot
        ),
        sums_at=(base + slot_size * SUMS).expand_as(end),
        statistic=gives,
        statistic_at=words_end - words,
        known_at=(words_end - words).roll(1, 1),
    )
    order = live.T.nonzero().unbind(1)[::-1]  # those of a launch side by side
    counts, most = live.sum(0).tolist(), (pixels * live).amax(0).tolist()
    firsts = live.sum(0).cumsum(0).tolist()
    return Plan(
        fields=torch.stack([fields[name] for name in FIELDS])[:, *order],
        program=program,
        launches=[
            Launch(first - n, n, size) for first, n, size in zip(firsts, counts, most, strict=True)
        ],
        scratch=int(slot_size.sum()) * slots,
        taps=int(taps.sum()),
        statistics=int(words.sum()),
        longest=int((torch.maximum(height, width) * (taps > 0)).max()),
        largest=channels * max(int(images[:, 1:].prod(1).max()), *most),
    )


def _compacted(program: Tensor) -> Tensor:
    """The same programs with NONE at the end of each alone, and at least one there."""
    nothing = program[..., 0] == Op.NONE
    longest = int((~nothing).sum(1).max()) if program.numel() else 0
    order = nothing.byte().sort(dim=1, stable=True).indices[:, :longest, None]
    program = program.gather(1, order.expand(-1, -1, WIDTH))
    return torch.nn.functional.pad(program, (0, 0, 0, 1))


def _taps(box: Tensor, blur: Tensor, argument: Any) -> tuple[Tensor, Tensor]:
    """How many taps each instruction has at most in a column and in a row, as int64; 0 where it
    sums along none."""
    kind = argument(Op.BOX, "filter")
    half = torch.where(kind == Filter.BICUBIC_ANTIALIAS, 2.0, 1.0)
    taps = 1 + (kind == Filter.BILINEAR) + 3 * (kind == Filter.BICUBIC)
    span = 2 * argument(Op.BLUR, "radius") + 1
    counts = []
    for side, not_axis in (("height", Axes.HORIZONTAL), ("width", Axes.VERTICAL)):
        length, out = argument(Op.BOX, side), argument(Op.BOX, f"out_{side}")
        reach = half * (length / out.clamp(1)).clamp(1.0)
        wide = torch.minimum((2 * reach).long() + 2, length)
        wide = torch.where(kind > Filter.BICUBIC, wide, taps)
        wide = torch.where(length == out, 1, wide)
        smooth = span * (argument(Op.BLUR, "axes") != not_axis)
        counts.append(wide * box + smooth * blur)
    return counts[0], counts[1]
