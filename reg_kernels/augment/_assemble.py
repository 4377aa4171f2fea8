"""Instructions of the op `augment`, written for a whole batch at once.

Geometry is held back until what follows is known. Crops, pads and flips in a row, and a resize at
their end, are one BOX: that copies pixels where the single steps would, so it changes nothing. With
`fuse`, a warp that follows a warp is one warp by the product of the matrices, and so are flips
beside it and crops after it: pixels are interpolated once.

A matrix maps a point (x, y, 1) of a step's result to the point of its input that is seen there.
Points count from the upper left corner of the image: pixel (0, 0) has its centre at (0.5, 0.5).
"""

from __future__ import annotations

import array
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .._augment_program import WIDTH, Filter, Op, Pad, WarpFilter
from .._numbers import refuse
from ..ops._modes import unseen

Number = Tensor | float  # one of each sample, (N,) float64, or one for all
Fill = tuple[float, ...] | None  # as a user gives it
Colour = tuple[float, ...]  # four values of pixels

_SAME_FILTER = {
    Filter.NEAREST_EXACT: WarpFilter.NEAREST,
    Filter.BILINEAR: WarpFilter.BILINEAR,
    Filter.BICUBIC: WarpFilter.BICUBIC,
}


@dataclass
class _Box:
    """A region that is resampled, then flipped."""

    top: Number
    left: Number
    height: Number
    width: Number
    out_height: Number
    out_width: Number
    filter: Filter = Filter.NEAREST
    pad: Pad = Pad.NONE
    fill: Colour = (0.0,) * 4
    copies: bool = False  # the result has the region's size
    is_whole: bool = False  # the region is the image, and the result has its size
    left_right: Tensor | None = None
    up_down: Tensor | None = None

    def within(self, outer: _Box) -> _Box:
        """This box of the result of `outer`, which copies, as a box of its image."""
        top = _mirrored(self.top, self.height, outer.height, outer.up_down)
        left = _mirrored(self.left, self.width, outer.width, outer.left_right)
        return _Box(
            *(outer.top + top, outer.left + left, self.height, self.width),
            *(self.out_height, self.out_width, self.filter),
            *((self.pad, self.fill) if self.pad else (outer.pad, outer.fill)),
            copies=self.copies,
            left_right=_either(outer.left_right, self.left_right),
            up_down=_either(outer.up_down, self.up_down),
        )

    def flips(self) -> Number:
        """As the instruction has it."""
        flips: Number = 0.0 if self.left_right is None else self.left_right.double()
        return flips if self.up_down is None else flips + 2.0 * self.up_down

    def on(self) -> Tensor | None:
        """Which samples it changes, if not all."""
        flips = self.flips()
        return flips > 0 if self.is_whole and isinstance(flips, Tensor) else None

    def matrix(self, samples: int) -> Tensor:
        matrix = torch.zeros(samples, 3, 3, dtype=torch.float64)
        matrix[:, 2, 2] = 1
        for row, start, side, out, flipped in (
            (0, self.left, self.width, self.out_width, self.left_right),
            (1, self.top, self.height, self.out_height, self.up_down),
        ):
            scale = side / out
            matrix[:, row, row] = scale
            matrix[:, row, 2] = start
            if flipped is not None:
                sign = 1 - 2 * flipped.double()
                matrix[:, row, row] *= sign
                matrix[:, row, 2] += flipped * side
        return matrix


@dataclass
class _Warp:
    matrix: Tensor  # (N, 3, 3)
    filter: WarpFilter
    fill: Colour
    height: Tensor  # of the image
    width: Tensor
    out_height: Number
    out_width: Number
    on: Tensor | None

    def entries(self, is_exact: bool) -> Tensor:
        """The matrix as an instruction has it, (9, N)."""
        entries = self.matrix.reshape(-1, 9).T
        if not is_exact:
            return entries
        return to_grid(entries, (self.height, self.width), (self.out_height, self.out_width))


def to_grid(entries: Tensor, size: tuple[Tensor, Tensor], out: tuple[Number, Number]) -> Tensor:
    """A matrix, (9, N), as torchvision has it: to where an image goes from -1 to 1, and an affine
    one from the centre of the result; rounded to float32 where it is there."""
    height, width = size
    is_affine = (entries[6] == 0) & (entries[7] == 0) & (entries[8] == 1)
    y, x = (torch.where(is_affine, side / 2, 0.0) for side in out)
    rows = []
    for first, side in ((0, width), (3, height)):
        a, b, c = entries[first : first + 3]
        c = c + a * x + b * y - torch.where(is_affine, side / 2, 0.0)
        rows.append(torch.stack((a, b, c)).float() / (0.5 * side).float())
    return torch.cat((*rows, entries[6:].float())).double()


def _mirrored(start: Number, length: Number, side: Number, flipped: Tensor | None) -> Number:
    if flipped is None:
        return start
    return start + flipped * (side - length - 2 * start)


def _any(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Which samples one of both changes; None: all."""
    return None if a is None or b is None else a | b


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Whether one of both flips, but not both."""
    if a is None or b is None:
        return b if a is None else a
    return a ^ b


_NOTHING = (0.0,) * WIDTH
_PLAIN = (float, int)


@functools.lru_cache
def spread(numbers: tuple[float, ...], count: int) -> Tensor:
    """Each number `count` times, float64 (K, count), to be read alone."""
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1).repeat(1, count)


@functools.lru_cache
def _places(numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers)


class _Written(NamedTuple):
    op: Op
    on: Tensor | None  # of which samples; None: of all
    arguments: tuple[Number, ...]


@dataclass
class Assembly:
    """A program in the making. With `mask` it is one for what lies under the images, labels of
    pixels: geometry alone, by the nearest pixel; `mask` is its fill then."""

    height: Tensor  # (N,) float64, what the images are at this point
    width: Tensor
    channels: int  # that a transform sees
    name: str = "Pipeline"  # of the transform that writes
    bound: float = 255.0  # the largest value of a pixel
    is_exact: bool = False  # torchvision's arithmetic
    fuse: bool = True
    unit: float = 1.0  # of the numbers that a user gives, in values of pixels
    sides: tuple[int, int] | None = None  # height and width, where those of all are the same
    mask: float | None = None
    mask_filter: Filter = Filter.NEAREST_EXACT
    tracks: bool = False  # keeps `seen` up
    is_normalized: bool = False
    # Instructions, or K of them as float64 (16 or less, K, N).
    _written: list[_Written | Tensor] = field(default_factory=list)
    _pending: _Box | _Warp | None = None

    def __post_init__(self) -> None:
        self.samples = len(self.height)
        if self.tracks:  # the point of the images that is seen at a point of the result so far
            self.seen = torch.eye(3, dtype=torch.float64).expand(self.samples, 3, 3)

    def size(self) -> Tensor:
        """Heights and widths, (2, N)."""
        if self.sides is not None:
            return spread(self.sides, self.samples)
        return torch.stack((self.height, self.width))

    # Geometry

    def box(
        self,
        top: Number,
        left: Number,
        height: Number,
        width: Number,
        *,
        out: tuple[Number, Number] | None = None,
        filter: Filter = Filter.NEAREST,
        pad: Pad = Pad.NONE,
        fill: Fill = None,
    ) -> None:
        """A region, and the size that it is resampled to, if it is not its own."""
        if self.mask is not None:
            filter = self.mask_filter
        sides = (height, width) if out is None else out
        values = self.values("fill", fill)
        box = _Box(top, left, height, width, *sides, filter, pad, values, copies=out is None)
        self._add_box(box)
        self._set_size(*sides)

    def flip(self, axis: str, on: Tensor | None) -> None:
        """Along "left_right" or "up_down"."""
        if on is None:
            on = torch.ones(self.samples, dtype=torch.bool)
        box = _Box(0.0, 0.0, *(self.height, self.width) * 2, copies=True, is_whole=True)
        setattr(box, axis, on)
        self._add_box(box)

    def warp(
        self,
        matrix: Tensor,
        on: Tensor | None,
        filter: WarpFilter,
        fill: Fill,
        out: tuple[Number, Number] | None = None,
    ) -> None:
        if on is not None:
            eye = torch.eye(3, dtype=torch.float64)
            matrix = torch.where(on.view(-1, 1, 1), matrix, eye)
        filter, values = self.warp_filter(filter, fill), self.values("fill", fill)
        if self.channels == 4 and values[3] != values[2]:  # an instruction has room for three
            self.refuse("fill", "the same for the last two of four channels", fill)
        sides = (self.height, self.width) if out is None else out
        size = (self.height, self.width)
        warp = _Warp(matrix, filter, values, *size, *sides, None if out is not None else on)
        if self.tracks:
            self.seen = self.seen @ matrix
        last = self._pending
        if self.fuse and isinstance(last, _Warp) and (last.filter, last.fill) == (filter, values):
            warp.matrix = last.matrix @ matrix
            warp.height, warp.width = last.height, last.width
            warp.on = _any(last.on, warp.on)
        elif self.fuse and isinstance(last, _Box) and last.is_whole:
            warp.matrix = last.matrix(self.samples) @ matrix
            warp.on = _any(last.on(), warp.on)
        else:
            self._flush()
        self._pending = warp
        if out is not None:
            self._set_size(*sides)

    def _set_size(self, height: Number, width: Number) -> None:
        self.sides = None
        if isinstance(height, int) and isinstance(width, int):
            self.sides = (height, width)
            self.height, self.width = self.size()
        else:
            self.height, self.width = self.of_samples(height), self.of_samples(width)

    def _add_box(self, box: _Box) -> None:
        if self.tracks:
            self.seen = self.seen @ box.matrix(self.samples)
        last = self._pending
        if isinstance(last, _Box) and last.copies and (last.is_whole or not box.pad):
            box, whole = box.within(last), last.is_whole and box.is_whole
            box.is_whole = whole
        elif isinstance(last, _Box) and box.is_whole:  # flips alone
            last.left_right = _either(last.left_right, box.left_right)
            last.up_down = _either(last.up_down, box.up_down)
            box = last
        elif isinstance(last, _Warp) and self.fuse and self._continues(last, box):
            matrix = last.matrix @ box.matrix(self.samples)
            sides = (last.height, last.width, box.out_height, box.out_width)
            on = _any(last.on, box.on())
            self._pending = _Warp(matrix, last.filter, last.fill, *sides, on)
            return
        else:
            self._flush()
        self._pending = box

    def _continues(self, warp: _Warp, box: _Box) -> bool:
        """Whether a box of a warp's result is but a warp: nothing of it lies outside, and no filter
        smooths it."""
        return not box.pad and (box.copies or _SAME_FILTER.get(box.filter) == warp.filter)

    def warp_filter(self, filter: WarpFilter, fill: Fill) -> WarpFilter:
        if self.mask is not None:
            return WarpFilter.NEAREST
        if self.is_exact and filter == WarpFilter.BILINEAR and fill is not None:
            return WarpFilter.BILINEAR_FADED
        return filter

    def _flush(self) -> None:
        last, self._pending = self._pending, None
        if isinstance(last, _Warp):
            sizes = (last.out_height, last.out_width)
            matrix = last.entries(self.is_exact)
            self._add(Op.WARP, last.on, *matrix, *sizes, float(last.filter), *last.fill[:3])
        elif last is not None:
            region = (last.top, last.left, last.height, last.width)
            how = (last.flips(), float(last.filter), float(last.pad), *last.fill)
            self._add(Op.BOX, last.on(), *region, last.out_height, last.out_width, *how)

    # All else

    def colour(self, op: Op, on: Tensor | None, *arguments: Number) -> None:
        """An instruction that is not of geometry."""
        if self.mask is not None:
            return
        self._flush()
        self._add(op, on, *arguments)

    def several(self, rows: Tensor, matrices: Tensor | None = None) -> None:
        """K instructions that are written already, float64 (16 or less, K, N); and, of warps
        among them, the matrices (N, 3, 3) of all together."""
        if self.mask is not None:
            if matrices is None:
                return
            warps = rows[0] == Op.WARP
            rows = rows * warps
            rows[12] = float(WarpFilter.NEAREST)
            rows[13:] = warps * self.mask
        self._flush()
        if self.tracks and matrices is not None:
            self.seen = self.seen @ matrices
        self._written.append(rows)

    @unseen
    def program(self) -> Tensor:
        """float32 (N, S, 16); S is 1 at least.

        It is written here, all instructions at once, since the number of torch's operations is what
        a batch's program costs."""
        self._flush()
        conditions = [x.on for x in self._written if isinstance(x, _Written) and x.on is not None]
        is_used = iter(torch.stack(conditions).any(1).tolist() if conditions else ())
        numbers: list[float] = []  # of all instructions
        drawn: dict[int, Tensor] = {}  # the places among them that differ from sample to sample
        blocks: dict[int, Tensor] = {}  # where those begin that are written already
        for written in self._written:
            if isinstance(written, Tensor):
                blocks[len(numbers) // WIDTH] = written
                numbers += _NOTHING * written.shape[1]
                continue
            op, on, arguments = written
            if on is not None:
                if not next(is_used):
                    continue
                drawn[len(numbers)] = on.double().mul_(
                    float(op)
                )  # 0 does nothing, whatever follows
            numbers.append(op)
            for x in arguments:
                if not isinstance(x, _PLAIN):
                    drawn[len(numbers)] = x
                    x = 0.0
                numbers.append(x)
            numbers += _NOTHING[: -len(numbers) % WIDTH]
        constants = array.array("d", numbers or _NOTHING)
        table = torch.frombuffer(constants, dtype=torch.float64).unsqueeze(1)
        table = table.expand(-1, self.samples).clone(memory_format=torch.contiguous_format)
        if drawn:
            table.index_copy_(0, _places(tuple(drawn)), torch.stack([*drawn.values()]))
        rows = table.view(-1, WIDTH, self.samples)
        for step, block in blocks.items():
            rows[step : step + block.shape[1], : len(block)] = block.transpose(0, 1)
        return table.float().T.contiguous().view(self.samples, -1, WIDTH)

    def values(self, argument: str, fill: Fill) -> Colour:
        """Four values of pixels, of numbers that a user gave; 0 of none."""
        if fill is None or self.mask is not None:
            return (self.mask or 0.0,) * 4
        return tuple(x * self.unit for x in self.of_channels(argument, fill))

    def of_channels(self, argument: str, numbers: Sequence[float]) -> Colour:
        """Four numbers, of one for all channels or of one for each."""
        if self.mask is None and len(numbers) not in (1, self.channels):
            must = f"one number, or one for each of the image's {self.channels} channels"
            self.refuse(argument, must, len(numbers))
        return (*numbers, *[numbers[-1]] * 4)[:4]

    def check_channels(self, *counts: int) -> None:
        if self.mask is None and self.channels not in counts:
            must = f"of {' or '.join(map(str, counts))} channels"
            self.refuse("images", must, self.channels)

    def refuse(self, argument: str, must: str, got: object) -> NoReturn:
        refuse(self.name, argument, must, got, ValueError)

    def of_samples(self, number: Number) -> Tensor:
        if isinstance(number, Tensor):
            return number
        return torch.full((self.samples,), float(number), dtype=torch.float64)

    def _add(self, op: Op, on: Tensor | None, *arguments: Number) -> None:
        self._written.append(_Written(op, on, arguments))


def radians(degrees: Tensor) -> Tensor:
    return degrees * (math.pi / 180)
