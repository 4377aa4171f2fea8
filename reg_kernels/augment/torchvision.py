"""Transforms of torchvision, by their classes' names and their attributes; it is not imported."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .._numbers import refuse
from . import colour, crop, geometry, noise, policies
from ._transform import Transform
from .mixup import CutMix, MixUp, Mixup, RandomChoice

_TAKEN: dict[str, type[Transform]] = {
    kind.__name__: kind
    for kind in (
        *(crop.RandomResizedCrop, crop.RandomCrop, crop.CenterCrop, crop.Resize, crop.Pad),
        *(crop.RandomHorizontalFlip, crop.RandomVerticalFlip),
        *(geometry.RandomRotation, geometry.RandomAffine, geometry.RandomPerspective),
        *(colour.Grayscale, colour.RandomGrayscale, colour.ColorJitter),
        *(colour.RandomPhotometricDistort, colour.RandomChannelPermutation, colour.RandomInvert),
        *(colour.RandomAutocontrast, colour.RandomEqualize, colour.RandomSolarize),
        *(colour.RandomPosterize, colour.RandomAdjustSharpness, colour.GaussianBlur),
        *(noise.GaussianNoise, noise.RandomErasing, noise.Normalize),
        *(policies.RandAugment, policies.TrivialAugmentWide, policies.AutoAugment),
        policies.AugMix,
    )
}
_MIXES: dict[str, type[CutMix] | type[MixUp]] = {"MixUp": MixUp, "CutMix": CutMix}
# What says how a picture becomes a tensor.
_NOTHING = ("ToImage", "PILToTensor", "ToPureTensor", "Identity")


def transforms_of(compose: Any) -> list[Transform | Mixup]:
    taken: list[Transform | Mixup] = []
    refused: list[str] = []
    _add(compose, taken, refused)
    if refused:
        must = "made of transforms that have a counterpart here"
        refuse("Pipeline.from_torchvision", "compose", must, ", ".join(refused), ValueError)
    return taken


def _add(transform: Any, taken: list[Transform | Mixup], refused: list[str]) -> None:
    name = type(transform).__name__
    if name == "Compose":
        for part in transform.transforms:
            _add(part, taken, refused)
    elif name == "RandomApply":
        _add_random(transform, taken, refused)
    elif name in _TAKEN:
        try:
            taken.append(_TAKEN[name](**_arguments(transform, _TAKEN[name])))
        except (TypeError, ValueError, AttributeError) as error:
            refused.append(f"{name} ({error})")
    elif name in _MIXES:
        taken.append(_MIXES[name](alpha=transform.alpha, num_classes=transform.num_classes))
    elif name == "RandomChoice":
        _add_choice(transform, taken, refused)
    elif name in ("ToDtype", "ConvertImageDtype", "ToTensor"):
        _add_dtype(transform, name, taken, refused)
    elif name not in _NOTHING:
        refused.append(name)


def _arguments(transform: Any, kind: type[Transform]) -> dict[str, Any]:
    arguments = {}
    for name in inspect.signature(kind).parameters:
        if not hasattr(transform, name):  # our own, as p
            continue
        value = getattr(transform, name)
        arguments[name] = value.tolist() if isinstance(value, torch.Tensor) else value
    if kind is noise.RandomErasing and arguments["value"] is None:
        arguments["value"] = "random"
    if kind is crop.RandomCrop and arguments["padding"] is not None:
        left, right, top, bottom = arguments["padding"]  # torchvision keeps torch's order
        arguments["padding"] = (left, top, right, bottom)
    return arguments


def _add_dtype(
    transform: Any, name: str, taken: list[Transform | Mixup], refused: list[str]
) -> None:
    dtype = getattr(transform, "dtype", torch.float32)
    scales = name != "ToDtype" or transform.scale
    if dtype == torch.uint8:  # of bytes it is nothing
        return
    if not scales or not isinstance(dtype, torch.dtype):
        refused.append(f"{name} without scale=True to one dtype")
    else:
        taken.append(noise.ToDtype(dtype))


def _add_choice(transform: Any, taken: list[Transform | Mixup], refused: list[str]) -> None:
    """RandomChoice of a CutMix and a MixUp."""
    if {type(part).__name__ for part in transform.transforms} != set(_MIXES):
        refused.append("RandomChoice of other than a CutMix and a MixUp")
        return
    parts: list[Any] = []
    for part in transform.transforms:
        _add(part, parts, refused)
    try:
        taken.append(RandomChoice(parts, transform.p))
    except ValueError as error:
        refused.append(f"RandomChoice ({error})")


def _add_random(transform: Any, taken: list[Transform | Mixup], refused: list[str]) -> None:
    """RandomApply of one transform that has a p of its own."""
    inner: list[Transform | Mixup] = []
    parts = list(transform.transforms)
    if len(parts) == 1:
        _add(parts[0], inner, refused)
    first = inner[0] if len(inner) == 1 else None
    if isinstance(first, Transform) and "p" in inspect.signature(type(first)).parameters:
        try:
            first._set_p(first.p * transform.p)
            taken.append(first)
        except ValueError as error:
            refused.append(f"RandomApply ({error})")
    elif len(parts) != 1 or inner:
        refused.append("RandomApply of other than one transform with a p")
