"""Regions of an image and their resizing: crops, pads, flips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._augment_program import Pad as PadMode
from . import _draws
from ._assemble import Assembly, Number
from ._transform import PADS, Transform, Values, resize_filter


class RandomResizedCrop(Transform):
    r"""Cuts out a region of random area and shape, and resizes it.

    Up to ten times an area :math:`a H W` with :math:`a` uniform in `scale` and a ratio :math:`r` of
    width to height, whose logarithm is uniform, are drawn; the region is :math:`\sqrt{a H W r}`
    wide and :math:`\sqrt{a H W / r}` high, rounded. The first that fits lies anywhere with the same
    probability. If none fits it is the largest in the middle whose ratio is in range. The filter
    never sees what lies outside the region. A `Pipeline` in evaluation resizes the shorter side to
    `size / crop_share` and cuts out the middle.

    Args:
        size: (height, width) of the result, or one number for both.
        scale: the range of the area's share, in (0, 1].
        ratio: the range of width over height, positive.
        interpolation: "nearest", "nearest-exact", "bilinear" or "bicubic".
        antialias: whether bilinear and bicubic widen their filters where they shrink an image.

    Shape: images (N, C, H, W) become (N, C, height, width).

    Raises:
        ValueError: an argument is out of its range, or a range is not two numbers in order.
        TypeError: an argument is of another type.

    Columns: top, left, height, width, in pixels.

    Source: C. Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6;
    `torchvision.transforms.v2.RandomResizedCrop`.
    """

    words = _draws.RECTANGLE_WORDS
    columns = ("top", "left", "height", "width")

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3.0 / 4.0, 4.0 / 3.0),
        interpolation: str = "bilinear",
        antialias: bool | None = True,
    ) -> None:
        self.size = self._size("size", size)
        self.scale = self._range("scale", scale, 0.0, 1.0)
        self.ratio = self._range("ratio", ratio, 1e-6, 1e6)
        self.interpolation = interpolation
        self.antialias = antialias
        self.filter = resize_filter(self, interpolation, antialias)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        size = assembly.size()
        drawn, found = _draws.rectangle(u, size, self.scale, self.ratio, is_crop=True)
        if found < assembly.samples:
            drawn = torch.where(drawn[2] > 0, drawn, self._middle(size))
        return drawn.unbind()

    def _middle(self, size: Tensor) -> Tensor:
        """The largest regions in the middle whose ratio is in range."""
        H, W = size
        least, most = self.ratio
        narrow, wide = least > W / H, most < W / H
        height = torch.where(narrow, (W / least).round_().clamp_(min=1), H)
        width = torch.where(wide, (H * most).round_().clamp_(min=1), W)
        sides = torch.stack((height, width))
        return torch.cat((((size - sides) / 2).floor_(), sides))

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        top, left, height, width = (values[name] for name in self.columns)
        assembly.box(top, left, height, width, out=self.size, filter=self.filter)

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        if self.size[0] == self.size[1]:
            whole = (round(self.size[0] / share),)
        else:
            whole = tuple(round(side / share) for side in self.size)  # type: ignore[assignment]
        return Resize(whole, self.interpolation, antialias=self.antialias), CenterCrop(self.size)


def _check_padding(transform: Transform, padding: Any) -> tuple[int, int, int, int]:
    """(left, top, right, bottom)."""
    if not isinstance(padding, Sequence):
        padding = (padding,)
    if isinstance(padding, str) or len(padding) not in (1, 2, 4):
        transform._refuse("padding", "one, two or four whole numbers", padding)
    padding = tuple(transform._integer("padding", side, 0) for side in padding)
    left, top, right, bottom = padding * (4 // len(padding))
    return left, top, right, bottom


def _check_reflection(assembly: Assembly, mode: PadMode, *pads: tuple[Number, Tensor]) -> None:
    """Refuses pads that reach beyond one reflection of the image; each beside the image's side."""
    if mode not in (PadMode.REFLECT, PadMode.SYMMETRIC):
        return
    most = 1 if mode == PadMode.REFLECT else 0
    for pad, side in pads:
        wrong = pad > side - most
        if wrong.any():
            limit = "less than" if most else "at most"
            where = f"{limit} an image's side with padding_mode {mode.name.lower()!r}"
            least = int(side[wrong].min())
            assembly.refuse("padding", where, f"{_most(pad)} for a side of {least}")


def _most(number: Number) -> int:
    return int(number.max() if isinstance(number, Tensor) else number)


class RandomCrop(Transform):
    """Cuts out a region of a fixed size, anywhere with the same probability.

    Args:
        size: (height, width) of the region, or one number for both.
        padding: what is first put around the image: a number for all sides, two for left and right
            and for top and bottom, or four for left, top, right, bottom.
        pad_if_needed: True pads, on both sides of it, an axis that is shorter than the region by
            what is missing.
        fill: what a constant padding is filled with, a number or one for each channel, in the
            values of the pixels.
        padding_mode: "constant", "edge" (the border is repeated), "reflect" (mirrored about the
            border's centre) or "symmetric" (mirrored about its edge).

    Shape: images (N, C, H, W) become (N, C, height, width).

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: top, left: the region's corner, from that of the image without its padding.

    Source: `torchvision.transforms.v2.RandomCrop`.
    """

    words = 2
    columns = ("top", "left")

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        pad_if_needed: bool = False,
        fill: float | Sequence[float] | None = 0,
        padding_mode: str = "constant",
    ) -> None:
        self.size = self._size("size", size)
        self.padding = None if padding is None else _check_padding(self, padding)
        self.pad_if_needed = pad_if_needed
        self.fill = self._fill(fill)
        self.padding_mode = padding_mode
        self.mode = self._choice("padding_mode", padding_mode, PADS)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        left, top, right, bottom = self.padding or (0, 0, 0, 0)
        places = []
        pads: list[tuple[Number, Tensor]] = []
        axes = ((assembly.height, top, bottom), (assembly.width, left, right))
        for word, length, (side, before, after) in zip(u, self.size, axes, strict=True):
            padded = side + (before + after)
            first: Number = -float(before)
            if self.pad_if_needed:
                missing = (length - padded).clamp_(min=0)
                padded, first = padded + 2 * missing, first - missing
                pads += [(missing + before, side), (missing + after, side)]
            else:
                pads += [(float(before), side), (float(after), side)]
                if (padded < length).any():
                    got = f"{self.size} for a side of {int(padded.min())}"
                    assembly.refuse("size", "no larger than the padded image", got)
            places.append(_draws.integers(word, padded - (length - 1)) + first)
        _check_reflection(assembly, self.mode, *pads)
        return places

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        pads = self.pad_if_needed or any(self.padding or ())
        pad = self.mode if pads else PadMode.NONE
        assembly.box(values["top"], values["left"], *self.size, pad=pad, fill=self.fill)

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        return (CenterCrop(self.size),)


class CenterCrop(Transform):
    """Cuts out the middle. What sticks out of a smaller image is 0.

    Args:
        size: (height, width) of the region, or one number for both.

    Shape: images (N, C, H, W) become (N, C, height, width).

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Source: `torchvision.transforms.v2.CenterCrop`.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = self._size("size", size)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        places = []
        is_inside = True
        for side, length in zip((assembly.height, assembly.width), self.size, strict=True):
            padding = ((length - side).clamp_(min=0) / 2).floor_()
            padded = torch.maximum(side, torch.full_like(side, length))
            places.append(((padded - length) / 2).round_() - padding)
            is_inside = is_inside and not bool((side < length).any())
        pad = PadMode.NONE if is_inside else PadMode.CONSTANT
        top, left = places
        assembly.box(top, left, *self.size, pad=pad)

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        return (self,)


class Resize(Transform):
    """Resizes the image.

    Args:
        size: (height, width) of the result; or one number for the shorter side, which keeps the
            ratio of the sides, the longer one rounded down; or None, with `max_size` alone.
        interpolation: "nearest", "nearest-exact", "bilinear" or "bicubic".
        max_size: the most that the longer side may be, where `size` is one number or None.
        antialias: as in `RandomResizedCrop`.

    Shape: images (N, C, H, W) become (N, C, height, width), by the sides that `size` has or makes.

    Raises:
        ValueError: an argument is out of its range, or `size` and `max_size` do not go together.
        TypeError: an argument is of another type.

    Source: `torchvision.transforms.v2.Resize`.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None,
        interpolation: str = "bilinear",
        max_size: int | None = None,
        antialias: bool | None = True,
    ) -> None:
        if size is None and max_size is None:
            self._refuse("max_size", "given where size is None", None)
        if size is not None and not isinstance(size, Sequence):
            size = (size,)
        if size is not None and len(size) == 1:
            self.size: tuple[int, ...] | None = (self._integer("size", size[0], 1),)
        else:
            self.size = None if size is None else self._size("size", size)
        if max_size is not None:
            max_size = self._integer("max_size", max_size, 1)
            if self.size is not None and (len(self.size) > 1 or max_size <= self.size[0]):
                self._refuse("max_size", f"above a size of one number, {self.size}", max_size)
        self.max_size = max_size
        self.interpolation = interpolation
        self.antialias = antialias
        self.filter = resize_filter(self, interpolation, antialias)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        height, width = assembly.height, assembly.width
        out: tuple[Number, Number]
        if self.size is not None and len(self.size) == 2:
            out = self.size
        else:
            short, long = torch.minimum(height, width), torch.maximum(height, width)
            if self.size is None:
                new_long = torch.full_like(long, self.max_size or 0)
                new_short = (new_long * short / long).floor_()
            else:
                new_short = torch.full_like(short, self.size[0])
                new_long = (new_short * long / short).floor_()
                if self.max_size is not None:
                    too_long = new_long > self.max_size
                    shorter = (self.max_size * new_short / new_long).floor_()
                    new_short = torch.where(too_long, shorter, new_short)
                    new_long = new_long.clamp_(max=self.max_size)
            is_high = height >= width
            out = (
                torch.where(is_high, new_long, new_short).clamp_(min=1),
                torch.where(is_high, new_short, new_long).clamp_(min=1),
            )
        assembly.box(0.0, 0.0, height, width, out=out, filter=self.filter)

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        return (self,)


class Pad(Transform):
    """Puts a border around the image.

    Args:
        padding: as in `RandomCrop`.
        fill: as in `RandomCrop`.
        padding_mode: as in `RandomCrop`.

    Shape: images (N, C, H, W) become (N, C, top + H + bottom, left + W + right).

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Source: `torchvision.transforms.v2.Pad`.
    """

    def __init__(
        self,
        padding: int | Sequence[int],
        fill: float | Sequence[float] | None = 0,
        padding_mode: str = "constant",
    ) -> None:
        self.padding = _check_padding(self, padding)
        self.fill = self._fill(fill)
        self.padding_mode = padding_mode
        self.mode = self._choice("padding_mode", padding_mode, PADS)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        left, top, right, bottom = self.padding
        height, width = assembly.height, assembly.width
        beside = (*((side, height) for side in (top, bottom)), *((s, width) for s in (left, right)))
        _check_reflection(assembly, self.mode, *beside)
        size = (height + (top + bottom), width + (left + right))
        assembly.box(-float(top), -float(left), *size, pad=self.mode, fill=self.fill)

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        return (self,)


class _RandomFlip(Transform):
    axis: str

    def __init__(self, p: float = 0.5) -> None:
        self._set_p(p)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.flip(self.axis, on)


class RandomHorizontalFlip(_RandomFlip):
    """Mirrors left and right, with probability `p`.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Source: `torchvision.transforms.v2.RandomHorizontalFlip`.
    """

    axis = "left_right"


class RandomVerticalFlip(_RandomFlip):
    """Mirrors top and bottom, with probability `p`.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Source: `torchvision.transforms.v2.RandomVerticalFlip`.
    """

    axis = "up_down"
