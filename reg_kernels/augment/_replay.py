"""What lies on the images: masks as a batch that the op takes, boxes and points where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import DTYPES, named
from ._assemble import Assembly
from ._draws import sent
from ._images import Batch, _refuse, packed

# Whole numbers of which float32 has not all, by the signed ones that torch computes with.
_SIGNED = {torch.int32: torch.int32, torch.uint32: torch.int32}
_SIGNED |= {torch.int64: torch.int64, torch.uint64: torch.int64}
_EXACT = 2**24  # as far as float32 has every whole number


class Masks:
    """Masks as the op takes them: those of bytes and of floats as they are, whole numbers as
    floats. Where float32 may not have them the op moves coordinates, by which they are looked up:
    that is some ten passes over them.

    Attributes:
        batch: what the op takes.
        fill: what the op has to fill with.
    """

    def __init__(self, masks: Any, fill: float) -> None:
        is_tensor = isinstance(masks, Tensor)
        if not is_tensor and not (
            isinstance(masks, Sequence) and all(isinstance(mask, Tensor) for mask in masks)
        ):
            _refuse("masks", "a tensor, or a list of tensors", type(masks).__name__, TypeError)
        dims = {masks.dim() - 1} if is_tensor else {mask.dim() for mask in masks}
        if dims not in ({2}, {3}):
            got = f"those of {', '.join(map(str, sorted(dims)))} dimensions"
            _refuse("masks", "(H, W) or (C, H, W) of each sample", got if dims else "none")
        each = [masks] if is_tensor else [*masks]
        self._is_flat = dims == {2}
        self._dtype = dtype = each[0].dtype
        if dtype.is_complex:
            _refuse("masks", "of real numbers", named(dtype), TypeError)
        if any(mask.dtype != dtype for mask in each):
            kinds = ", ".join(sorted({named(mask.dtype) for mask in each}))
            _refuse("masks", "of one dtype", kinds, RuntimeError)
        self._check_fill(fill)
        if self._is_flat:
            each = [mask.unsqueeze(-3) for mask in each]
        signed = _SIGNED.get(dtype)
        is_wide = signed is not None and not _all_small(each, fill)
        if is_wide:  # of another name while they are moved and not computed with
            name = torch.float32 if dtype.itemsize == 4 else torch.float64
            each = [mask.view(name) for mask in each]
        elif signed is not None:
            each = [mask.view(signed).float() for mask in each]
        elif dtype != torch.uint8 and dtype not in DTYPES:
            each = [mask.float() for mask in each]
        self.batch = packed(each[0] if is_tensor else each, "NCHW")
        self.fill = fill
        self._wide: tuple[Batch, int] | None = None
        if is_wide:
            self._wide = (self.batch, int(fill))
            self.batch, self.fill = _coordinates(self.batch), -1.0

    def _check_fill(self, fill: float) -> None:
        dtype = self._dtype
        if dtype.is_floating_point:
            return
        least, most = 0, 1
        if dtype != torch.bool:
            least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        if not (least <= fill <= most and fill == int(fill)):
            _refuse("fill", f"a value of {named(dtype)}, the masks' dtype", fill)

    def of(self, result: Tensor) -> Tensor:
        """The masks, of the op's result."""
        if self._wide is not None:
            result = self._looked_up(result, *self._wide)
        result = result[:, 0] if self._is_flat else result
        return result.to(_SIGNED.get(self._dtype, self._dtype)).view(self._dtype)

    def _looked_up(self, places: Tensor, masks: Batch, fill: int) -> Tensor:
        device = places.device
        y, x = places.long().unsqueeze(2).unbind(1)  # (N, 1, h, w)
        begin, height, width = sent(masks.images, device).view(-1, 3, 1, 1, 1).unbind(1)
        channel = torch.arange(masks.channels, device=device).view(-1, 1, 1)
        if masks.is_channels_last:
            index = begin + (y * width + x) * masks.channels + channel
        else:
            index = begin + (channel * height + y) * width + x
        found = masks.pixels.view(_SIGNED[self._dtype]).take(index.clamp_(min=0))
        filled = torch.tensor(fill, dtype=self._dtype).view(found.dtype)
        return torch.where(y < 0, filled.item(), found)


def _all_small(masks: Sequence[Tensor], fill: float) -> bool:
    """Whether float32 has all numbers of masks on the CPU; on a GPU looking would wait."""
    if masks[0].device.type != "cpu" or abs(fill) > _EXACT:
        return False
    for mask in masks:
        least, most = mask.view(_SIGNED[mask.dtype]).aminmax()
        if least < -_EXACT or most > _EXACT:
            return False
    return True


def _coordinates(masks: Batch) -> Batch:
    """Images of two channels, the row and the column of each pixel: one for all of a size."""
    sizes = [(height, width) for _, height, width in masks.images.tolist()]
    begins: dict[tuple[int, int], int] = {}
    pieces: list[Tensor] = []
    end = 0
    for height, width in sizes:
        if (height, width) not in begins:
            begins[height, width] = end
            end += 2 * height * width
            sides = (
                torch.arange(side, dtype=torch.float32, device=masks.pixels.device)
                for side in (height, width)
            )
            pieces += [x.reshape(-1) for x in torch.meshgrid(*sides, indexing="ij")]
    table = masks.images.clone()
    table[:, 0] = torch.tensor([begins[size] for size in sizes])
    return Batch(torch.cat(pieces), table, 2, False, False, masks.sides)


def moved_boxes(boxes: Any, assembly: Assembly) -> Any:
    """The upright rectangles around where the corners go, within the result."""
    own, which = _joined(boxes, 4, "boxes", assembly)
    x, y = _moved(own[:, [0, 2, 2, 0]], own[:, [1, 1, 3, 3]], which, assembly)
    for axis, side in ((x, assembly.width), (y, assembly.height)):
        axis.clamp_(min=0).clamp_(max=side[which].unsqueeze(1).to(own.device))
    return _parted(boxes, torch.stack((x.amin(1), y.amin(1), x.amax(1), y.amax(1)), 1))


def moved_points(points: Any, assembly: Assembly) -> Any:
    own, which = _joined(points, 2, "keypoints", assembly)
    x, y = _moved(own[:, :1], own[:, 1:], which, assembly)
    return _parted(points, torch.cat((x, y), 1))


def _joined(given: Any, count: int, argument: str, assembly: Assembly) -> tuple[Tensor, Tensor]:
    """The numbers of all samples, float64 (M, count), and which sample each row is of, (M,)."""
    if not isinstance(given, Tensor | Sequence):
        _refuse(argument, "a tensor, or a list of tensors", type(given).__name__, TypeError)
    if len(given) != assembly.samples:
        _refuse(argument, f"of as many samples as params, {assembly.samples}", len(given))
    for own in given:
        if not isinstance(own, Tensor) or own.dim() != 2 or own.shape[1] != count:
            shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            must = f"(N, K, {count}) or a list of (K, {count})"
            _refuse(argument, must, f"a sample of {shape}")
    rows = torch.tensor([len(own) for own in given])
    which = torch.arange(assembly.samples).repeat_interleave(rows)
    return torch.cat([*given]).double(), which


def _parted(given: Any, moved: Tensor) -> Any:
    """What was joined, float32, as it was given."""
    if isinstance(given, Tensor):
        return moved.view(given.shape).float()
    return [*moved.float().split([len(own) for own in given])]


def _moved(x: Tensor, y: Tensor, which: Tensor, assembly: Assembly) -> tuple[Tensor, Tensor]:
    """Where points go, (M, n), each row by the map of its sample."""
    maps = torch.linalg.inv(assembly.seen)[which].to(x.device)
    a, b, c, d, e, f, g, h, i = maps.reshape(-1, 9, 1).unbind(1)
    q = g * x + h * y + i
    return (a * x + b * y + c) / q, (d * x + e * y + f) / q
