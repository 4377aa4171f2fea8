"""What the op `augment` is to be handed.

All values are looked at, since kernels take from them what they read and where they write; they lie
on the CPU for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    Range,
    column,
)
from .._dtypes import DTYPES, SUPPORTED, named
from ._checks import Entry

_BYTES_OR = (torch.uint8, *DTYPES)


def check(op: str, a: Any) -> None:
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


def _table(of: Callable[[Range], float]) -> Tensor:
    """One number of each argument's range, (opcodes, 16)."""
    free = Range(-math.inf, math.inf, whole=False)
    rows = [[RANGES.get((op, name), free) for name in ARGUMENTS[op]] for op in Op]
    padded = [[free, *row] + [free] * (WIDTH - 1 - len(row)) for row in rows]
    return torch.tensor([[of(allowed) for allowed in row] for row in padded])


_LOWEST = _table(lambda allowed: allowed.lowest)
_HIGHEST = _table(lambda allowed: allowed.highest)
_WHOLE = _table(lambda allowed: allowed.whole)


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
        index = self.codes.to(torch.int64)
        counts = torch.bincount(index, minlength=len(Op)).tolist()
        present = {op for op, count in zip(Op, counts, strict=True) if count}
        for op in sorted(present & CHANNELS.keys()):
            if self.channels not in CHANNELS[op]:
                taken = " or ".join(map(str, CHANNELS[op]))
                must = f"{op.name} only for {taken} channels, not {self.channels}"
                self.refuse(self._of(op), must)
        self._check_arguments(index)
        self._check_sizes(sizes, present)

    def _of(self, op: Op) -> Tensor:
        return self.codes == int(op)

    def _get(self, op: Op, name: str) -> Tensor:
        return self.rows[:, column(op, name)]

    def _check_arguments(self, index: Tensor) -> None:
        """All at once, by tables of what each may be."""
        fits = (self.rows >= _LOWEST[index]) & (self.rows <= _HIGHEST[index])
        fits &= (self.rows == self.rows.floor()) | ~_WHOLE[index]
        for (op, name), allowed in RANGES.items():
            for value in allowed.but:
                place = column(op, name)
                fits[:, place] &= (self.rows[:, place] != value) | (self.codes != int(op))
        if not bool(fits.all()):
            row, place = (int(x) for x in (~fits).nonzero()[0])
            op = Op(int(index[row]))
            name = ARGUMENTS[op][place - 1]
            self.refuse(~fits.all(1), f"{name} {RANGES[op, name]}", name)

    def _check_sizes(self, sizes: Tensor, present: set[Op]) -> None:
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
        if {Op.SAVE, Op.JOIN, Op.MIX} & present:
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


def check_backward(op: str, a: Any) -> None:
    check(op, a)
    entry, grad = Entry(op, a.pixels), a.grad_output
    if a.pixels.dtype == torch.uint8 or a.dtype == torch.uint8:
        entry.refuse("pixels and dtype", "of floats", named(torch.uint8))
    shape = (len(a.images), a.channels, a.height, a.width)
    if grad.dtype != a.dtype or grad.shape != shape:
        entry.refuse("grad_output", f"{named(a.dtype)} of shape {shape}", grad)
    entry.check_memory(grad, "grad_output")
