"""Image augmentation: schema, fake and gradient of the op, and what its instructions compute.

The op is an interpreter: each sample brings an image and a program, which is executed on it from
its first pixel to the store of the result. It has no public function of its own: augment.Pipeline
draws what the transforms need, writes the programs, and calls `run`.

Values v of an image lie in [0, B], B = 255 for bytes and 1 for floats. It is computed in float32;
each product, sum, quotient and root is rounded by itself, and sums have the order written here, so
that all implementations have the same bits. clamp(v) is min(max(v, 0), B). A NaN goes on through
what computes with it. After each instruction the image is float32, and rounded once, at the store:
to the nearest even, for bytes brought into [0, 255] with NaN as 0.

With `exact`, of bytes alone, each instruction leaves whole numbers as torchvision's functions of
bytes do: T means cut to a whole number after the clamp, R rounded to nearest even and clamped.
Where torchvision has a fused multiply-add, `fma`, this mode has it as well; else it is a product
and a sum.

BOX: a region of the image, of whole numbers, that may stick out of it where `pad` says what is
    there, resampled to (out_height, out_width), rows first and then columns. An axis whose length
    stays is copied, mirrored by `flips`. Else with s = length / out and i, or out - 1 - i where it
    is mirrored:
    nearest: place int(s i); nearest-exact: int(s (i + 0.5)); at most length - 1.
    bilinear: c = max(s (i + 0.5) - 0.5, 0), places int(c) and the one after it.
    bicubic: c = s (i + 0.5) - 0.5, four places by the cubic convolution of a = -0.75; both within
    the region.
    With antialias, m = max(s, 1), c = s (i + 0.5) and half the filter's width r = m, or 2 m for
    bicubic, the places from max(int(c - r + 0.5), 0) to min(int(c + r + 0.5), length) - 1 weigh
    f((place - c + 0.5) / m), the triangle or the cubic of a = -0.5, over the sum of all.
    A place outside of the image is the fill, or by its pad one at the border, reflected without or
    with the border. Bytes are clamped. R.
WARP: (x + 0.5, y + 0.5) of the result under a matrix, over its third number if it is not affine,
    is a place of the image, less 0.5 an index: nearest (half to even), bilinear or bicubic
    (a = -0.75, within each row first). What is outside of the image is the fill; the filter
    BILINEAR_FADED has torchvision's fill, which counts the share outside twice. Places at 2^30 and
    beyond are the fill. Bytes are clamped. R. With `exact` the matrix takes the result's pixels,
    for an affine one from its centre, to torchvision's grid, in which the image is from -1 to 1:
    index = (g + 1) (side / 2) - 0.5.
BRIGHTNESS: clamp(factor v); T.
CONTRAST, SATURATION: clamp(fma(rest, m, factor v)); T. `rest` is 1 - factor. m is the image's mean
    gray or the pixel's own: fma(0.114, b, fma(0.587, g, 0.2989 r)), floored with `exact`; v itself
    of one channel. The mean is a sum of integers: of multiples of 1/65536 for floats, of 1/256 for
    bytes and of 1 with `exact`; a NaN counts as 0.
HUE: through hue, saturation and value in torchvision's steps. With `exact` floor(255.999 v).
GRAYSCALE: gray. INVERT: B - v. SOLARIZE: B - v from the threshold on.
SOLARIZE_ADD: clamp(v + addend) below the threshold; T.
POSTERIZE: the highest bits of a byte; floor(v 2^bits) 2^-bits at most 1 - 2^-bits of a float.
AUTOCONTRAST: clamp((v - low) / ((high - low) (1/B))) of each channel's extrema, without NaN; T.
EQUALIZE: Pillow's table of each channel's histogram of rint(v 255/B), where NaN counts as 0.
SHARPNESS: clamp(fma(rest, d - v, v)), d = v smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, in `exact`
    rounded; T. The pixels at the border stay, and images of a side of 2 or less.
BLUR: a symmetric filter by distance, down the columns, then along the rows; reflected at the
    border. Bytes are clamped. R.
NOISE: v + (std z + mean), z normal; clamped with `clip`. With `exact` what is added is cut, and the
    sum clamped.
PERMUTE: channel c is the old channel p_c.
ERASE: a region is v_c, or normal numbers.
NORMALIZE: v a_c + b_c.
SALT_AND_PEPPER: a share p of the elements becomes B, of which a share `salt`, or 0. Both shares are
    multiples of 1/65536.
SAVE, JOIN, MIX: x = v and sum = weight v; sum += weight v and v = x; v = clamp(sum), T.

Element e = (c h + y) w + x of an image of h x w draws word e % 4 of group e // 4, or half-word
e % 8 of group e // 8, of the Philox stream of the instruction's key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import augment as reference
from ._augment_checks import check, check_backward
from ._modes import above_autograd, below_autograd, is_batched, is_fake, watcher
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
_TAKES: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(("native", "triton"), (torch.float32,))
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
    """The formula for gradients of a gradient, which no implementation checks; a batch of them,
    which has no memory of its own, comes from a call that was checked."""
    if is_fake():  # the formula looks at values: a compiled gradient has none of its own
        with below_autograd():
            return overload._op(*arguments)
    if _BACKWARD.check is not None and watcher() is None and not is_batched(arguments[0]):
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
