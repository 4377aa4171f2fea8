"""Image augmentation: schema, fake, gradient, and what its arguments have to be.

The op is an interpreter: each sample brings an image and a program, which is executed on it from
its first pixel to the store of the result. It has no public function of its own: augment.Pipeline
draws what the transforms need, writes the programs, and calls `run`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._augment_program import (
    ARGUMENTS,
    CHANNELS,
    LARGEST_SIDE,
    MOST_CHANNELS,
    RANGES,
    WIDTH,
    Axes,
    Op,
    Pad,
    column,
)
from .._dtypes import DTYPES, SUPPORTED, named
from ..reference import augment as reference
from ._checks import Entry
from ._modes import above_autograd, below_autograd, watcher
from ._registry import register
from ._route import Route, formula

_BYTES_OR = (torch.uint8, *DTYPES)


# Checks. All values are looked at, since kernels take from them what they read and where they
# write; they lie on the CPU for it.


def _check(op: str, a: Any) -> None:
    entry = Entry(op, a.pixels)
    _check_tensors(entry, a)
    sizes = _check_images(entry, a)
    _Program(entry, a).check(sizes)


def _check_tensors(entry: Entry, a: Any) -> None:
    pixels = a.pixels
    if pixels.dtype not in _BYTES_OR:
        entry.refuse("pixels", f"one of {SUPPORTED} or uint8", pixels)
    if pixels.dim() != 1 or not pixels.is_contiguous():
        entry.refuse("pixels", "one contiguous dimension", pixels)
    entry.check_memory(pixels, "pixels")
    host = torch.device("cpu")
    for name, x, dtype, width in (
        ("images", a.images, torch.int64, (3,)),
        ("program", a.program, torch.float32, (WIDTH,)),
    ):
        dims = 2 if name == "images" else 3
        if x.dtype != dtype or x.dim() != dims or x.shape[-1:] != width or not x.is_contiguous():
            shape = "(N, 3)" if name == "images" else f"(N, S, {WIDTH})"
            entry.refuse(name, f"contiguous {named(dtype)} of shape {shape}", x)
        if x.device != host:
            entry.refuse(name, "on the CPU", x.device)
        entry.check_memory(x, name, on_host=True)
    if len(a.images) != len(a.program):
        must = f"of as many samples as images, {len(a.images)}"
        entry.refuse("program", must, len(a.program))
    if not 1 <= a.channels <= MOST_CHANNELS:
        entry.refuse("channels", f"in [1, {MOST_CHANNELS}]", a.channels)
    for name in ("height", "width"):
        if not 1 <= getattr(a, name) <= LARGEST_SIDE:
            entry.refuse(name, f"in [1, {LARGEST_SIDE}]", getattr(a, name))
    if a.dtype not in _BYTES_OR:
        entry.refuse("dtype", f"one of {SUPPORTED} or uint8", named(a.dtype))
    if a.exact and pixels.dtype != torch.uint8:
        entry.refuse("exact", "false but for pixels of uint8", named(pixels.dtype))


def _check_images(entry: Entry, a: Any) -> Tensor:
    """Returns the sizes, (N, 2)."""
    offset, sizes = a.images[:, 0], a.images[:, 1:]
    fits = ((sizes >= 1) & (sizes <= LARGEST_SIDE)).all(1)
    count = sizes.clamp(0, LARGEST_SIDE).prod(1) * a.channels
    fits &= (offset >= 0) & (offset <= a.pixels.numel() - count)
    if not bool(fits.all()):
        sample = int((~fits).nonzero()[0])
        must = (
            f"(offset, height, width) with sides in [1, {LARGEST_SIDE}] of images that lie in the "
            f"{a.pixels.numel()} pixels"
        )
        entry.refuse("images", must, f"{a.images[sample].tolist()} for sample {sample}")
    return sizes


class _Program:
    """The program's instructions, (N S, 16), by their opcodes."""

    def __init__(self, entry: Entry, a: Any) -> None:
        self.entry, self.channels, self.size = entry, a.channels, (a.height, a.width)
        self.samples, self.steps = a.program.shape[:2]
        self.rows = a.program.view(-1, WIDTH)
        self.codes = self.rows[:, 0]

    def refuse(self, wrong: Tensor, must: str, name: str | None = None) -> None:
        """Raises where an instruction is wrong, of all (N S,), and names the first one."""
        if not bool(wrong.any()):
            return
        row = int(wrong.nonzero()[0])
        sample, step = divmod(row, self.steps)
        code = float(self.codes[row])
        op = Op(int(code)) if code in Op._value2member_map_ else None
        where = f"in instruction {step} of sample {sample}"
        if op is None or name is None:
            got = f"{code:g}" if op is None else op.name
        else:
            got = f"{name} {float(self.rows[row, column(op, name)]):g}"
        prefix = "" if op is None or name is None else f"{op.name} with "
        self.entry.refuse("program", f"{prefix}{must}", f"{got} {where}")

    def check(self, sizes: Tensor) -> None:
        self.refuse(~self.rows.isfinite().all(1), "of finite numbers")
        known = (self.codes >= 0) & (self.codes < len(Op)) & (self.codes == self.codes.floor())
        self.refuse(~known, f"of opcodes from 0 to {len(Op) - 1}")
        present = [Op(int(code)) for code in self.codes.unique()]
        for op in present:
            self._check_arguments(op)
        self._check_sizes(sizes, present)

    def _of(self, op: Op) -> Tensor:
        return self.codes == int(op)

    def _get(self, op: Op, name: str) -> Tensor:
        return self.rows[:, column(op, name)]

    def _check_arguments(self, op: Op) -> None:
        here = self._of(op)
        if op in CHANNELS and self.channels not in CHANNELS[op]:
            counts = " or ".join(map(str, CHANNELS[op]))
            self.refuse(here, f"{op.name} only for {counts} channels, not {self.channels}")
        for name in ARGUMENTS[op]:
            if (allowed := RANGES.get((op, name))) is None:
                continue
            x = self._get(op, name)
            fits = (x >= allowed.lowest) & (x <= allowed.highest)
            if allowed.whole:
                fits &= x == x.floor()
            for value in allowed.but:
                fits &= x != value
            self.refuse(here & ~fits, f"{name} {allowed}", name)

    def _check_sizes(self, sizes: Tensor, present: list[Op]) -> None:
        """Follows the images' sizes through the instructions: (N, S, 2) before each."""
        before, after = self._sizes(sizes)
        height, width = (before[..., axis].reshape(-1) for axis in (0, 1))
        for op in (Op.BOX, Op.ERASE):
            if op in present:
                top, left, h, w = (self._get(op, name) for name in ARGUMENTS[op][:4])
                inside = (top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width)
                here = self._of(op)
                if op == Op.BOX:
                    here &= self._get(op, "pad") == Pad.NONE
                what = "a region inside of the image" + (", or a pad" if op == Op.BOX else "")
                self.refuse(here & ~inside, f"{op.name} of {what}")
        if Op.BLUR in present:
            radius, axes = self._get(Op.BLUR, "radius"), self._get(Op.BLUR, "axes")
            fits = (radius < height) | (axes == Axes.HORIZONTAL)
            fits &= (radius < width) | (axes == Axes.VERTICAL)
            must = "BLUR with a radius below the image's sides"
            self.refuse(self._of(Op.BLUR) & ~fits, must)
        if {Op.SAVE, Op.JOIN, Op.MIX} & set(present):
            self._check_mixes(before, after)
        final = after[:, -1] if self.steps else sizes
        wrong = (final != torch.tensor(self.size)).any(1)
        if bool(wrong.any()):
            sample = int(wrong.nonzero()[0])
            got = f"{tuple(final[sample].tolist())} for sample {sample}"
            self.entry.refuse("program", f"such that images of {self.size} result", got)

    def _sizes(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The images' sizes before and after each instruction, (N, S, 2)."""
        rows = self.rows.view(self.samples, self.steps, WIDTH)
        codes = rows[..., 0]
        given = torch.zeros(self.samples, self.steps, 2, dtype=torch.int64)
        for op in (Op.BOX, Op.WARP):
            first = column(op, "out_height")
            out = rows[..., first : first + 2]
            given = torch.where((codes == int(op)).unsqueeze(2), out.to(torch.int64), given)
        steps = []
        for step in range(self.steps):
            steps.append(sizes)
            sizes = torch.where(given[:, step] > 0, given[:, step], sizes)
        steps.append(sizes)
        every = torch.stack(steps, 1)
        return every[:, :-1], every[:, 1:]

    def _check_mixes(self, before: Tensor, after: Tensor) -> None:
        codes = self.codes.view(self.samples, self.steps)
        saved = torch.zeros(self.samples, dtype=torch.bool)
        homeless, resized = torch.zeros_like(codes, dtype=torch.bool), []
        for step in range(self.steps):
            code = codes[:, step]
            saved = saved | (code == int(Op.SAVE))
            homeless[:, step] = ((code == int(Op.JOIN)) | (code == int(Op.MIX))) & ~saved
            resized.append(saved & (before[:, step] != after[:, step]).any(1))
            saved = saved & (code != int(Op.MIX))
        self.refuse(homeless.view(-1), "JOIN and MIX between a SAVE and its MIX alone")
        must = "a size that stays between a SAVE and its MIX"
        self.refuse(torch.stack(resized, 1).view(-1), must)


def _check_backward(op: str, a: Any) -> None:
    _check(op, a)
    entry, grad = Entry(op, a.pixels), a.grad_output
    if a.pixels.dtype == torch.uint8 or a.dtype == torch.uint8:
        entry.refuse("pixels and dtype", "of floats", named(torch.uint8))
    shape = (len(a.images), a.channels, a.height, a.width)
    if grad.dtype != a.dtype or grad.shape != shape:
        entry.refuse("grad_output", f"{named(a.dtype)} of shape {shape}", grad)
    entry.check_memory(grad, "grad_output")


# Registration


class _Augment(torch.autograd.Function):
    """Its gradient is that of the reference, which is computed once more for it."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], pixels: Tensor) -> Tensor:
        _, overload, rest = call
        with below_autograd():
            output = overload._op(pixels, *rest)
        images, program, *others = rest
        ctx.save_for_backward(pixels, images, program)
        ctx.call = (overload, others)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        overload, others = ctx.call
        inputs = (grad_output, *ctx.saved_tensors[:1])
        rest = (*ctx.saved_tensors[1:], *others)
        return None, _BACKWARD.run_like(overload, inputs, rest)


def _fake(pixels: Tensor, images: Tensor, program: Tensor, channels: int, *rest: Any) -> Tensor:
    _, height, width, dtype, channels_last, _ = rest
    order = torch.channels_last if channels_last else torch.contiguous_format
    shape = (images.shape[0], channels, height, width)
    return pixels.new_empty(shape, dtype=dtype).contiguous(memory_format=order)


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
    check=_check,
    takes=_TAKES,
)


def _recorded(*arguments: Any) -> Tensor:
    with above_autograd():
        return reference.augment_backward(*arguments)


# One for all implementations.
_BACKWARD = register(
    "augment_backward",
    f"(Tensor grad_output, {_ARGUMENTS}) -> Tensor",
    fake=lambda grad_output, pixels, *rest: torch.empty_like(pixels),
    reference=_recorded,
    triton=_recorded,
    native=_recorded,
    route=Route(2, by_torch=formula(reference.augment_backward)),
    check=_check_backward,
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
