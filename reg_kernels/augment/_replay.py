"""What lies on the images: masks as a batch that the op takes, boxes and points where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import DTYPES, named
from ._assemble import Assembly
from ._images import Batch, _refuse, packed


def packed_masks(masks: Any) -> tuple[bool, Batch, torch.dtype]:
    """Whether masks have no channels, and they as a batch: of floats, where they are other numbers
    than an image's; and their dtype."""
    is_tensor = isinstance(masks, Tensor)
    if not is_tensor and not (
        isinstance(masks, Sequence) and all(isinstance(mask, Tensor) for mask in masks)
    ):
        _refuse("masks", "a tensor, or a list of tensors", type(masks).__name__, TypeError)
    dims = {masks.dim() - 1} if is_tensor else {mask.dim() for mask in masks}
    if dims not in ({2}, {3}):
        got = f"those of {', '.join(map(str, sorted(dims)))} dimensions"
        _refuse("masks", "(H, W) or (C, H, W) of each sample", got if dims else "none")
    is_flat = dims == {2}
    each = [masks] if is_tensor else [*masks]
    dtype = each[0].dtype
    if dtype.is_complex:
        _refuse("masks", "of real numbers", named(dtype), TypeError)
    if is_flat:
        each = [mask.unsqueeze(-3) for mask in each]
    if dtype != torch.uint8 and dtype not in DTYPES:
        each = [mask.float() for mask in each]
    return is_flat, packed(each[0] if is_tensor else each, "NCHW"), dtype


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
