"""How augment's programs are cut into segments, on the host; kernels take a segment each.

A segment is a geometric instruction, or none, and the instructions of single pixels after it. One
ends where the next instruction needs the whole image: launch k runs segment k of all samples that
have so many. BLUR, and BOX of many taps, are two segments: the first one sums along columns alone,
the second one along rows.

All of it is whole numbers in float64, of all samples at once: N samples, S instructions, K
segments. A call to torch takes longer than what it computes here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional
from torch import Tensor

from .._augment_program import WIDTH, Axes, Filter, Op, column
from ._augment_names import FIELDS

MOST_TAPS = 64  # of a pixel, until a BOX is two segments

SLOTS, SUMS = 5, 4  # images of AugMix in scratch: two that take turns, two for SAVE, the sums


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


class _Traits(NamedTuple):
    """What an opcode means for a plan; each 0 or 1 but the last."""

    some: float  # all but NONE
    box: float
    blur: float
    resizes: float
    geometric: float
    begins: float  # a segment
    ends: float  # one
    save: float
    join: float
    mix: float
    kind: float  # of segment that it begins, an opcode
    statistic: float  # that it needs, by the opcode
    words: float  # of it


@functools.cache
def _traits(channels: int) -> Tensor:
    """Those of all opcodes."""
    words = {Op.CONTRAST: 2, Op.AUTOCONTRAST: 2 * channels, Op.EQUALIZE: 256 * channels}
    kinds = {Op.BOX: Op.BOX, Op.BLUR: Op.BOX, Op.WARP: Op.WARP, Op.SHARPNESS: Op.SHARPNESS}
    return torch.tensor(
        [
            _Traits(
                some=op != Op.NONE,
                box=op == Op.BOX,
                blur=op == Op.BLUR,
                resizes=op in (Op.BOX, Op.WARP),
                geometric=op in kinds,
                begins=op in (*kinds, *words, Op.MIX),
                ends=op in (Op.SAVE, Op.JOIN),
                save=op == Op.SAVE,
                join=op == Op.JOIN,
                mix=op == Op.MIX,
                kind=kinds.get(op, 0),
                statistic=op if op in words else 0,
                words=words.get(op, 0),
            )
            for op in Op
        ],
        dtype=torch.float64,
    )


def plan_for(images: Tensor, program: Tensor, channels: int, steps: int) -> Plan:
    """The plan of a batch; `steps` is how many elements one of the result has."""
    program = _compacted(program)
    numbers = program.double()
    traits = _traits(channels)[program[..., 0].long()]
    of = _Traits(*traits.unbind(-1))
    taps = _taps(numbers, of)
    many = taps.prod(-1)
    split = of.box * (many > MOST_TAPS) + of.blur * (many > 0)
    begins = of.begins.clone()
    begins[:, 1:] += of.ends[:, :-1]
    begins[:, 0] = of.statistic[:, 0]
    segment = ((begins > 0) + split).cumsum(1)  # of each instruction; where split, its last
    last = segment[:, -1:]
    count = int(last.max()) + 1
    number = torch.arange(count, dtype=torch.float64)

    # What segments have of their instructions, (N, K) each: a sum, where one alone has some.
    out = _slice(numbers, Op.WARP, "out_height", 2)
    out = torch.where(of.box.bool()[..., None], _slice(numbers, Op.BOX, "out_height", 2), out)
    out = out * of.resizes[..., None]
    index = torch.arange(program.shape[1], dtype=torch.float64).expand_as(split)[..., None]
    rows = taps[..., :1]
    part = split[..., None]
    whole = (traits, index * of.geometric[..., None], out, rows * (1 - part), taps[..., 1:])
    where = segment[:, None] == number[:, None]
    values = where.double() @ torch.cat(whole, -1)
    if bool(split.any()):  # of those that sum along columns before
        where = segment[:, None] - 1 == number[:, None]
        half = torch.zeros_like(torch.cat(whole, -1))
        half[..., _Traits._fields.index("kind")] = Op.BOX
        half[..., len(_Traits._fields) :][..., [0, 1, 3]] = torch.cat(
            (index, out[..., :1] * of.box[..., None], rows), -1
        )
        values += where.double() @ (half * part)
    *summed, geometry, out_height, out_width, rows, columns = values.unbind(-1)
    has = _Traits(*summed)

    heights = _before_and_after(images[:, 1], out_height, number)
    widths = _before_and_after(images[:, 2], out_width, number)
    height, width = heights[:, 1:], widths[:, 1:]
    end = torch.nn.functional.pad(has.some.cumsum(1), (1, 0))
    live, is_last = number <= last, number == last
    pixels = height * width * live

    # Where images and statistics lie: each sample's slots side by side, those that it has.
    mixes = bool(has.save.any())
    slots = SLOTS if mixes else min(count - 1, 2)
    slot_size = (channels * pixels * ~is_last).amax(1, keepdim=True)
    base = (slot_size.cumsum(0) - slot_size) * slots
    sink_slot = source_slot = number % 2
    if mixes:
        saved = 2 + has.save.cumsum(1) % 2
        sink_slot = torch.where(has.save > 0, saved, sink_slot)
        source_slot = torch.where(has.join > 0, saved, sink_slot)
    source = base + slot_size * source_slot.roll(1, -1)
    source = torch.where(has.mix > 0, base + slot_size * SUMS, source)
    source[:, 0] = images[:, 0]
    words_end = has.words.view(-1).cumsum(0).view_as(has.words)
    is_sum = (has.kind == Op.BOX) * live
    row_taps = is_sum * rows.clamp(min=1) * height
    all_taps = row_taps + is_sum * columns.clamp(min=1) * width
    taps_at = all_taps.view(-1).cumsum(0).view_as(all_taps) - all_taps
    sample = torch.arange(len(program), dtype=torch.float64)[:, None]
    kept = base + slot_size * sink_slot
    known_at = words_end - has.words

    fields = dict(
        sample=sample,
        begin=end[:, :-1],
        end=end[:, 1:],
        kind=has.kind,
        geometry=geometry,
        finish=has.geometric,
        source=source,
        source_height=heights[:, :-1],
        source_width=widths[:, :-1],
        height=height,
        width=width,
        rows=rows,
        rows_taps=taps_at,
        columns=columns,
        columns_taps=taps_at + row_taps,
        sink=torch.where(
            has.ends > 0, has.save * Op.SAVE + has.join * Op.JOIN, 1.0 - 1.0 * is_last
        ),
        sink_at=torch.where(is_last, sample * steps, kept),
        sums_at=base + slot_size * SUMS,
        statistic=has.statistic.roll(-1, 1),  # what the next one needs; the first needs none
        statistic_at=known_at.roll(-1, 1),
        known_at=known_at,
    )
    table = torch.stack([fields[name].expand_as(live) for name in FIELDS])
    # Those of a launch side by side.
    order = live.T.reshape(-1).nonzero().view(-1)
    counts, most = live.sum(0).tolist(), pixels.amax(0).long().tolist()
    firsts = [sum(counts[:k]) for k in range(count)]
    return Plan(
        fields=table.transpose(1, 2).flatten(1).index_select(1, order).long(),
        program=program,
        launches=[Launch(*launch) for launch in zip(firsts, counts, most, strict=True)],
        scratch=int(slot_size.sum()) * slots,
        taps=int(all_taps.sum()),
        statistics=int(has.words.sum()),
        longest=int((torch.maximum(height, width) * is_sum).max()),
        largest=channels * max(int(images[:, 1:].prod(1).max()), *most),
    )


def _compacted(program: Tensor) -> Tensor:
    """The same programs with NONE at the end of each alone, and at least one there."""
    nothing = program[..., 0] == Op.NONE
    if bool(nothing.any()):
        longest = int((~nothing).sum(1).max())
        order = nothing.byte().sort(dim=1, stable=True).indices[:, :longest, None]
        program = program.gather(1, order.expand(-1, -1, WIDTH))
    return torch.nn.functional.pad(program, (0, 0, 0, 1))


def _slice(numbers: Tensor, op: Op, name: str, count: int) -> Tensor:
    """So many arguments of an instruction, from one on."""
    first = column(op, name)
    return numbers[..., first : first + count]


def _taps(numbers: Tensor, of: _Traits) -> Tensor:
    """How many taps each instruction has at most in a column and in a row, (N, S, 2); 0 where it
    sums along none."""
    length, out = _slice(numbers, Op.BOX, "height", 2), _slice(numbers, Op.BOX, "out_height", 2)
    kind = _slice(numbers, Op.BOX, "filter", 1)
    reach = 1.0 + (kind == Filter.BICUBIC_ANTIALIAS)
    wide = (2.0 * reach * (length / out).clamp(min=1.0)).floor() + 2.0
    taps = 1.0 + (kind == Filter.BILINEAR) + 3.0 * (kind == Filter.BICUBIC)
    taps = torch.where(kind > Filter.BICUBIC, torch.minimum(wide, length), taps)
    taps = torch.where(of.box[..., None] > 0, torch.where(length == out, 1.0, taps), 0.0)
    if bool(of.blur.any()):
        alone = torch.tensor([Axes.HORIZONTAL, Axes.VERTICAL])
        span = 2.0 * _slice(numbers, Op.BLUR, "radius", 1) + 1.0
        span = span * (_slice(numbers, Op.BLUR, "axes", 1) != alone)
        taps = taps + span * of.blur[..., None]
    return taps


def _before_and_after(first: Tensor, out: Tensor, number: Tensor) -> Tensor:
    """A side of the images before each segment and after the last, (N, K + 1); `out` has it where
    a segment changes it, else 0."""
    sides = torch.cat((first.double()[:, None], out), 1)
    changed = torch.where(out > 0, number + 1, 0.0).cummax(1).values
    return sides.gather(1, torch.nn.functional.pad(changed, (1, 0)).long())
