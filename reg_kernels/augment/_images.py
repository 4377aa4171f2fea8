"""A batch as the op takes it: one buffer of pixels, and where each image lies in it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .._augment_program import LARGEST_SIDE, MOST_CHANNELS
from .._dtypes import DTYPES, SUPPORTED, named
from .._memory import empty_bytes
from .._numbers import refuse
from ..ops._modes import unseen, watcher

LAYOUTS = ("NCHW", "NHWC")
_EXPECTED = "(N, C, H, W), (N, H, W, C), or a list of images (C, H, W) or (H, W, C)"


class Batch(NamedTuple):
    pixels: Tensor  # (P,)
    images: Tensor  # int64 (N, 3): offset, height, width
    channels: int
    is_channels_last: bool  # of the images in memory
    keeps_channels_last: bool  # of the result, if nobody asks for another order
    sides: tuple[int, int] | None  # height and width, where those of all are the same


def _refuse(argument: str, must: str, got: Any, kind: type[Exception] = ValueError) -> NoReturn:
    refuse("Pipeline", argument, must, got, kind)


def packed(images: Any, layout: str | None) -> Batch:
    """One tensor is taken as it lies in memory where it is dense; a list is copied."""
    if isinstance(images, Tensor):
        return _of_tensor(images, layout)
    if not isinstance(images, Sequence) or isinstance(images, str):
        _refuse("images", f"a tensor {_EXPECTED}", type(images).__name__, TypeError)
    return _of_list(images, layout)


def _check_kind(image: Tensor) -> None:
    dtype = image.dtype
    if image.layout != torch.strided:
        _refuse("images", "dense", named(image.layout), RuntimeError)
    if dtype != torch.uint8 and dtype not in DTYPES:
        _refuse("images", f"uint8 or one of {SUPPORTED}", named(dtype), RuntimeError)


def _of_tensor(images: Tensor, layout: str | None) -> Batch:
    if images.dim() != 4:
        _refuse("images", _EXPECTED, f"{images.dim()} dimensions")
    _check_kind(images)
    if len(images) == 0:
        _refuse("images", "a batch of one image at least", "an empty one")
    is_last = _is_channels_last([tuple(images.shape[1:])], layout)
    in_order = images if is_last else images.permute(0, 2, 3, 1)
    # (N, C, H, W) in torch.channels_last lies as (N, H, W, C) does, and an (N, H, W, C) that is a
    # view of the other as (N, C, H, W).
    planar = in_order.permute(0, 3, 1, 2)
    lies_last = in_order.is_contiguous() and (is_last or not planar.is_contiguous())
    samples, height, width, channels = in_order.shape
    if not lies_last and not planar.is_contiguous():
        lies_last = is_last
    pixels = (in_order if lies_last else planar).contiguous().view(-1)
    table = _table_of_one_size(samples, height, width, channels)
    return Batch(pixels, table, channels, lies_last, lies_last and not is_last, (height, width))


@unseen
@functools.lru_cache
def _table_of_one_size(samples: int, height: int, width: int, channels: int) -> Tensor:
    table = torch.empty(samples, 3, dtype=torch.int64)
    table[:, 0] = torch.arange(samples) * (channels * height * width)
    table[:, 1] = height
    table[:, 2] = width
    _check_sides(table)
    return table


def _of_list(images: Sequence[Any], layout: str | None) -> Batch:
    if not images:
        _refuse("images", "a batch of one image at least", "an empty list")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor):
            got = f"{type(image).__name__} at {number}"
            _refuse("images", "a list of tensors", got, TypeError)
        if image.dim() != 3:
            must = "a list of images (C, H, W) or (H, W, C)"
            _refuse("images", must, f"{image.dim()} dimensions at {number}")
        _check_kind(image)
        if image.dtype != images[0].dtype or image.device != images[0].device:
            must = f"all {named(images[0].dtype)} on {images[0].device} as the first one is"
            got = f"{named(image.dtype)} on {image.device} at {number}"
            _refuse("images", must, got, RuntimeError)
    shapes = [tuple(image.shape) for image in images]
    is_last = _is_channels_last(shapes, layout)
    channels = {shape[2 if is_last else 0] for shape in shapes}
    if len(channels) > 1:
        _refuse("images", "all of as many channels", ", ".join(map(str, sorted(channels))))
    (count,) = channels
    table = _table_of_sizes([shape[:2] if is_last else shape[1:] for shape in shapes], count)
    flat = [image.reshape(-1) for image in images]
    in_bytes = images[0].dtype == torch.uint8 and images[0].device.type == "cpu"
    total = sum(image.numel() for image in flat)
    pixels = torch.cat(flat, out=empty_bytes(total) if in_bytes else None)
    return Batch(pixels, table, count, is_last, False, None)


@unseen
def _table_of_sizes(sides: Sequence[tuple[int, ...]], channels: int) -> Tensor:
    sizes = torch.tensor(sides)
    ends = (sizes[:, 0] * sizes[:, 1] * channels).cumsum(0)
    table = torch.cat((torch.zeros(len(sides), 1, dtype=torch.int64), sizes), 1)
    table[1:, 0] = ends[:-1]
    _check_sides(table)
    return table


def _is_channels_last(shapes: Sequence[tuple[int, ...]], layout: str | None) -> bool:
    """Which of two layouts images (of three sides) have."""
    may_be_first, may_be_last = (
        all(1 <= shape[axis] <= MOST_CHANNELS for shape in shapes) for axis in (0, 2)
    )
    if layout is None:
        if may_be_first and may_be_last:
            got = f"None for images of {shapes[0]}, which may be either"
            _refuse("layout", "NCHW or NHWC", got)
        is_last = may_be_last
    else:
        is_last = layout == "NHWC"
    if not (may_be_last if is_last else may_be_first):
        firsts, lasts = (
            [shape for shape in shapes if _has_channels(shape, axis, 2 - axis)] for axis in (0, 2)
        )
        if firsts and lasts:
            must = (
                "all (C, H, W) or all (H, W, C), as permute(2, 0, 1) makes the ones of the others"
            )
            _refuse("images", must, f"{firsts[0]} and {lasts[0]}")
        axis = 2 if is_last else 0
        wrong = next(shape for shape in shapes if not 1 <= shape[axis] <= MOST_CHANNELS)
        must = f"images of 1 to {MOST_CHANNELS} channels"
        where = "" if layout is None else f" with layout {layout}"
        _refuse("images", must, f"one of {wrong}{where}")
    return is_last


def _has_channels(shape: tuple[int, ...], axis: int, other: int) -> bool:
    """Whether one axis may be that of the channels, and the other one not."""
    return 1 <= shape[axis] <= MOST_CHANNELS < shape[other]


def _check_sides(table: Tensor) -> None:
    sides = table[:, 1:]
    if int(sides.min()) < 1 or int(sides.max()) > LARGEST_SIDE:
        wrong = int(((sides < 1) | (sides > LARGEST_SIDE)).any(1).nonzero()[0])
        _refuse("images", f"of sides from 1 to {LARGEST_SIDE}", tuple(sides[wrong].tolist()))


def checked_indices(indices: Tensor | Sequence[int] | None, samples: int) -> Tensor:
    """The samples' indices that a call was given, int64 (N,)."""
    try:
        keys = torch.as_tensor(indices)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        must = f"whole numbers from 0 to 2**63 - 1, of shape ({samples},)"
        _refuse("indices", must, f"what torch makes no tensor of ({error})")
    if keys.shape != (samples,) or keys.is_floating_point() or keys.dtype == torch.bool:
        got = f"{named(keys.dtype)} of shape {tuple(keys.shape)}"
        _refuse("indices", f"whole numbers of shape ({samples},)", got)
    is_unsigned = keys.dtype == torch.uint64
    keys = keys.to("cpu", torch.int64)
    if samples and int(keys.min()) < 0:
        if is_unsigned:  # as hashes of names are
            must = "below 2**63; of hashes their remainder by 2**63 will do"
            _refuse("indices", must, int(keys.min()) + 2**64)
        _refuse("indices", "at least 0", int(keys.min()))
    return keys if watcher() is None else unseen(torch.tensor)(keys.tolist())
