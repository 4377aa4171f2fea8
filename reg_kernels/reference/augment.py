"""Image augmentation in plain PyTorch: an interpreter of programs, one instruction after another.

Shapes: pixels (P,), the elements of all images; images int64 (N, 3), of each the offset of its
first element, its height and its width; program float32 (N, S, 16), the opcode first. An image is
(C, H, W) in memory, or (H, W, C) with `channels_last`. The result is (N, C, height, width).

It computes in float32, and in float64 where pixels or result are of it. ops/augment.py says what
the instructions do, and _augment_program.py what their arguments are called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._augment_program import ARGUMENTS, TAG, Op
from . import _augment_colour as colour
from . import _augment_resample as resample
from ._augment_values import Values, per_channel
from ._philox import half_words, normals, tag


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
    """The batch that the programs make of the images."""
    compute = torch.float64 if torch.float64 in (pixels.dtype, dtype) else torch.float32
    values = Values(255.0 if pixels.dtype == torch.uint8 else 1.0, exact)
    results = []
    for (offset, h, w), instructions in zip(images.tolist(), program.tolist(), strict=True):
        image = pixels[offset : offset + channels * h * w]
        if channels_last:
            image = image.view(h, w, channels).permute(2, 0, 1)
        else:
            image = image.view(channels, h, w)
        results.append(_stored(_run(image.to(compute), values, instructions), dtype))
    nothing = pixels[:0].to(dtype).view(0, channels, height, width)
    batch = torch.stack(results) if results else nothing
    # A copy in either order: autograd lets nobody write to a view that an op made.
    order = torch.channels_last if result_channels_last else torch.contiguous_format
    return batch.clone(memory_format=order)


def augment_backward(
    grad_output: Tensor, pixels: Tensor, images: Tensor, program: Tensor, *rest: object
) -> Tensor:
    """The gradient by the pixels, of the result's: the instructions once more, recorded."""
    if torch.is_grad_enabled() and (pixels.requires_grad or grad_output.requires_grad):
        return _gradient(grad_output, pixels, images, program, rest, create_graph=True)
    # One image after the other, so that the record of one is in memory at a time.
    gradient = torch.zeros_like(pixels)
    for own, row, instructions in zip(grad_output, images.tolist(), program, strict=True):
        offset, height, width = row
        part = slice(offset, offset + int(rest[0]) * height * width)  # type: ignore[call-overload]
        image = torch.tensor([[0, height, width]])
        arguments = (own.unsqueeze(0), pixels[part], image, instructions.unsqueeze(0), rest)
        gradient[part] += _gradient(*arguments, create_graph=False)
    return gradient


def _gradient(
    grad_output: Tensor,
    pixels: Tensor,
    images: Tensor,
    program: Tensor,
    rest: tuple[object, ...],
    create_graph: bool,
) -> Tensor:
    with torch.enable_grad():
        x = pixels if create_graph and pixels.requires_grad else pixels.detach().requires_grad_()
        y = augment(x, images, program, *rest)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(
            y, x, grad_output, create_graph=create_graph, allow_unused=True
        )
    return torch.zeros_like(pixels) if gradient is None else gradient


def _stored(image: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.uint8:
        return image.to(dtype)
    return image.nan_to_num(0.0).round().clamp(0.0, 255.0).to(dtype)


def _run(image: Tensor, values: Values, instructions: list[list[float]]) -> Tensor:
    saved = total = image
    for code, *numbers in instructions:
        op = Op(int(code))
        arguments = numbers[: len(ARGUMENTS[op])]
        if op == Op.SAVE:
            saved, total = image, image * arguments[0]
        elif op == Op.JOIN:
            image, total = saved, total + image * arguments[0]
        elif op == Op.MIX:
            image = values.truncated(total)
        elif op != Op.NONE:
            image = _FUNCTIONS[op](image, values, *arguments)
    return image


def _key(parts: tuple[float, ...], device: torch.device) -> Tensor:
    """Four numbers of 16 bits as the state that draws start from."""
    key = sum(int(part) << (16 * place) for place, part in enumerate(parts))
    return torch.tensor([key - 2**64 if key >= 2**63 else key, 0], device=device)


def _normals(image: Tensor, key: tuple[float, ...]) -> Tensor:
    drawn = normals(_key(key, image.device), tag(TAG), 0, image.numel())
    return drawn.view(image.shape).to(image.dtype)


def _noise(
    image: Tensor, values: Values, mean: float, std: float, clip: float, *key: float
) -> Tensor:
    noise = _normals(image, key) * std + mean
    if values.exact:
        return values.clamp(image + noise.trunc())
    noisy = image + noise
    return values.clamp(noisy) if clip else noisy


def _permute(image: Tensor, values: Values, *order: float) -> Tensor:
    return torch.stack([image[int(channel)] for channel in order])


def _erase(
    image: Tensor,
    values: Values,
    top: float,
    left: float,
    height: float,
    width: float,
    mode: float,
    v0: float,
    v1: float,
    v2: float,
    v3: float,
    *key: float,
) -> Tensor:
    inside = torch.zeros(image.shape[1:], dtype=torch.bool, device=image.device)
    inside[int(top) : int(top + height), int(left) : int(left + width)] = True
    return torch.where(
        inside, _normals(image, key) if mode else per_channel((v0, v1, v2, v3), image), image
    )


def _normalize(image: Tensor, values: Values, *numbers: float) -> Tensor:
    return image * per_channel(numbers[:4], image) + per_channel(numbers[4:], image)


def _salt_and_pepper(image: Tensor, values: Values, p: float, salt: float, *key: float) -> Tensor:
    drawn = half_words(_key(key, image.device), tag(TAG), 0, image.numel()).view(image.shape)
    impulse = torch.where(drawn < round(p * salt * 65536), values.bound, 0.0).to(image.dtype)
    return torch.where(drawn < round(p * 65536), impulse, image)


_FUNCTIONS: dict[Op, Callable[..., Tensor]] = {
    Op.BOX: resample.box,
    Op.WARP: resample.warp,
    Op.BRIGHTNESS: colour.brightness,
    Op.CONTRAST: colour.contrast,
    Op.SATURATION: colour.saturation,
    Op.HUE: colour.hue,
    Op.GRAYSCALE: colour.grayscale,
    Op.INVERT: colour.invert,
    Op.SOLARIZE: colour.solarize,
    Op.SOLARIZE_ADD: colour.solarize_add,
    Op.POSTERIZE: colour.posterize,
    Op.AUTOCONTRAST: colour.autocontrast,
    Op.EQUALIZE: colour.equalize,
    Op.SHARPNESS: colour.sharpness,
    Op.BLUR: resample.blur,
    Op.NOISE: _noise,
    Op.PERMUTE: _permute,
    Op.ERASE: _erase,
    Op.NORMALIZE: _normalize,
    Op.SALT_AND_PEPPER: _salt_and_pepper,
}
