"""Image augmentation: schema, fake, gradient, and what its arguments have to be.

The op is an interpreter: each sample brings an image and a program, which is executed on it from
its first pixel to the store of the result. It has no public function of its own: augment.Pipeline
draws what the transforms need, writes the programs, and calls `run`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import augment as reference
from ._augment_checks import check, check_backward
from ._modes import above_autograd, below_autograd, watcher
from ._registry import register
from ._route import Route, formula

# Registration


class _Augment(torch.autograd.Function):
    """Its gradient is that of the reference, which is computed once more for it."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], pixels: Tensor) -> Tensor:
        _, overload, rest = call
        with below_autograd():
            output = overload._op(pixels, *rest)
        ctx.save_for_backward(pixels)
        ctx.call = (overload, rest)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        overload, rest = ctx.call
        return None, _BACKWARD.run_like(overload, (grad_output, *ctx.saved_tensors), rest)


def _fake(pixels: Tensor, images: Tensor, program: Tensor, channels: int, *rest: Any) -> Tensor:
    _, height, width, dtype, channels_last, _ = rest
    order = torch.channels_last if channels_last else torch.contiguous_format
    shape = (images.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=order)


_ARGUMENTS = (
    "Tensor pixels, Tensor images, Tensor program, int channels, bool channels_last, int height, "
    "int width, ScalarType dtype, bool result_channels_last, bool exact"
)
# The others take no float64.
_TAKES: dict[str, tuple[torch.dtype, ...]] = {"native": (), "triton": ()}
_AUGMENT = register(
    "augment",
    f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    reference=reference.augment,
    triton="augment:augment",
    route=Route(1, _Augment, by_torch=formula(reference.augment)),
    check=check,
    takes=_TAKES,
)


def _recorded(*arguments: Any) -> Tensor:
    with above_autograd():
        return reference.augment_backward(*arguments)


def _differentiable(overload: Any, *arguments: Any) -> Tensor:
    """The formula for gradients of a gradient, which no implementation checks."""
    if watcher() is None and _BACKWARD.check is not None:
        _BACKWARD.check(*arguments)
    return reference.augment_backward(*arguments)


# One for all implementations.
_BACKWARD = register(
    "augment_backward",
    f"(Tensor grad_output, {_ARGUMENTS}) -> Tensor",
    fake=lambda grad_output, pixels, *rest: torch.empty_like(pixels),
    reference=_recorded,
    triton=_recorded,
    native=_recorded,
    route=Route(2, by_torch=_differentiable),
    check=check_backward,
    takes=_TAKES,
)


def run(
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
    backend: str | None = None,
) -> Tensor:
    """Executes each sample's program on its image.

    Args:
        pixels: (P,), the elements of all images; uint8, or floats whose values lie in [0, 1].
        images: int64 (N, 3) on the CPU: where an image begins in pixels, its height, its width. It
            is (channels, height, width) there, or (height, width, channels) with `channels_last`.
        program: float32 (N, S, 16) on the CPU: S instructions of each sample, an opcode and its
            arguments each, as _augment_program.py has them.
        height, width: of each sample's result, at which its program has to end.
        dtype: of the result. Values are those of the last instruction, bytes' in [0, 255] until a
            NORMALIZE; of uint8 they are rounded to nearest and brought into [0, 255].
        result_channels_last: whether the result, (N, channels, height, width), lies in memory as
            torch.channels_last.
        exact: bytes alone: whether each instruction leaves whole numbers, as torchvision's do.
        backend: "native", "triton" or "reference"; None takes the first that can run here. float64
            is the reference's alone.

    Raises:
        RuntimeError: what is wrong of an argument or an instruction. Nothing was written then.
    """
    looks = watcher()
    compute = torch.float64 if torch.float64 in (pixels.dtype, dtype) else torch.float32
    overload = _AUGMENT.overload(pixels.device, compute, backend, looks)
    rest = (images, program, channels, channels_last, height, width, dtype)
    return _AUGMENT.route.call(looks, overload, (pixels,), (*rest, result_channels_last, exact))
