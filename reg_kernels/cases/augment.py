"""Augmentation's inputs: small images of several sizes in one buffer, and programs of every
instruction at its edges, alone and in rows.

All implementations are held to the bits of the reference, which is the oracle here; the tests of
the op hold that to formulas of their own, and to torchvision.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._augment_program import (
    WIDTH,
    Axes,
    EraseMode,
    Filter,
    Op,
    Pad,
    WarpFilter,
    instruction,
    key_arguments,
)
from ..ops.augment import run
from ..reference import augment as reference
from . import Case

Program = list[list[float]]
Make = Callable[[tuple[int, int], int], Program]  # of a sample's size and number
Sizes = Sequence[tuple[int, int]]

BYTES = torch.uint8
SIZES = ((5, 7), (1, 1), (6, 4))
KEY = key_arguments(0xFEDC_BA98_7654_3210)


def packed(programs: Sequence[Program]) -> Tensor:
    """(N, S, 16): the shorter ones end with NONE."""
    steps = max((len(program) for program in programs), default=0)
    table = torch.zeros(len(programs), steps, WIDTH)
    for rows, program in zip(table, programs, strict=True):
        if program:
            rows[: len(program)] = torch.tensor(program)
    return table


def placed(sizes: Sizes, channels: int) -> tuple[Tensor, int]:
    """Where images lie in a buffer: the last one first, with gaps, the second one twice where there
    are more than three. Also the buffer's size."""
    offsets, end = [0] * len(sizes), 3
    for place in reversed(range(len(sizes))):
        offsets[place] = end
        end += channels * sizes[place][0] * sizes[place][1] + place % 3
    if len(sizes) > 3 and sizes[1] == sizes[3]:
        offsets[3] = offsets[1]
    rows = [(at, *size) for at, size in zip(offsets, sizes, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3), end


def resized(height: int, width: int, size: tuple[int, int], **named: float) -> list[float]:
    """BOX of a whole image."""
    return instruction(Op.BOX, 0, 0, height, width, *size, **named)


def ends(program: Program, before: tuple[int, int], size: tuple[int, int]) -> Program:
    """The program, brought to a size where it does not end with that."""
    height, width = before
    for row in program:
        if row[0] == Op.BOX:
            height, width = int(row[5]), int(row[6])
        elif row[0] == Op.WARP:
            height, width = int(row[10]), int(row[11])
    if (height, width) == size:
        return program
    return [*program, resized(height, width, size, filter=Filter.BILINEAR)]


def _case(
    name: str,
    programs: Make,
    sizes: Sizes = SIZES,
    size: tuple[int, int] = (4, 5),
    *,
    channels: int = 3,
    source: torch.dtype | None = None,
    result: torch.dtype | None = None,
    channels_last: bool = False,
    result_channels_last: bool = False,
    exact: bool = False,
    smooth: bool = True,
) -> Case:
    """`programs` makes one for each sample; `smooth`: whether all have gradients."""
    images, count = placed(sizes, channels)
    program = packed([ends(programs(own, n), own, size) for n, own in enumerate(sizes)])
    layout = (channels, channels_last, *size)
    words = [name, f"{channels} channels" if channels != 3 else ""]
    words += [f"{word} {kind}" for word, kind in (("from", source), ("to", result)) if kind]
    words += [
        "channels last" if channels_last else "",
        "to channels last"[: 16 * result_channels_last],
    ]
    words += ["exact" if exact else ""]

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(count)
        x = torch.rand(count, generator=generator, dtype=torch.float64)
        return (
            ((255 * x).round().to(dtype) if source == BYTES else x.to(dtype))
            .to(device)
            .split(count)
        )

    def by(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
        last = (result or x.dtype, result_channels_last, exact)
        pixels = x.to(source) if source else x
        return function(pixels, images, program, *layout, *last, **options).to(x.dtype)

    return Case(
        op="augment",
        name=" ".join(word for word in words if word).replace("torch.", ""),
        inputs=inputs,
        function=functools.partial(by, run),
        oracle=functools.partial(by, reference.augment),
        small=count <= 2200,
        differentiable=smooth and not (source or result),
        draws=True,
    )


def _backward(case: Case) -> Case:
    """The gradient of a case by its pixels, by the incoming one."""

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(grad_output: Tensor, **options: Any) -> Tensor:
            (x,) = case.inputs(grad_output.device, grad_output.dtype)
            with torch.enable_grad():
                y = function(x.requires_grad_(), **options)
            return torch.autograd.grad(y, x, grad_output.detach())[0]

        return call

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        y = case.oracle(*case.inputs(device, dtype))
        values = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device)
        return (torch.empty_like(y).copy_(values.view(y.shape)),)

    return Case(
        op="augment_backward",
        name=case.name,
        inputs=inputs,
        function=gradient(case.function),
        oracle=gradient(case.oracle),
        small=case.small,
        differentiable=False,
    )


# One instruction, with other arguments for each sample

do = instruction


def _boxes(size: tuple[int, int], n: int) -> Program:
    """By every filter: regions shrunk, stretched, mirrored, and beside the image."""
    h, w = size
    filter = list(Filter)[n % 6]
    fill = {f"fill{c}": 0.2 * c + 0.1 for c in range(4)}
    boxes = (
        do(Op.BOX, 0, 0, h, w, 4, 5, 1, filter),
        do(Op.BOX, -1, 0, h + 3, w, 4, 5, 2, filter, Pad.CONSTANT, **fill),
        do(Op.BOX, h // 3, w // 2, h - h // 3, w - w // 2, 4, 5, 3, filter),
        do(Op.BOX, -2, -3, h + 5, w + 4, 4, 5, 0, filter, Pad.EDGE),
        do(Op.BOX, -9, 1, h + 3, w + 9, 4, 5, 1, filter, Pad.REFLECT),
        do(Op.BOX, 2, -7, 4, w + 20, 4, 5, 0, filter, Pad.SYMMETRIC),
        do(Op.BOX, 40, 40, 3, 3, 4, 5, 0, filter, Pad.CONSTANT, **fill),
    )
    return [boxes[n % 7]]


def _warps(size: tuple[int, int], n: int) -> Program:
    """By every filter, affine and not."""
    last = (4, 5, list(WarpFilter)[n % 4], 0.9, 0.2, 0.6)
    warps = (
        do(Op.WARP, 0.9, -0.2, 0.4, 0.3, 1.1, -0.3, 0, 0, 1, *last),
        do(Op.WARP, 1, 0, 0.5, 0, 1, -0.5, 0, 0, 1, *last),
        do(Op.WARP, 1.2, 0.1, -0.7, -0.2, 0.8, 0.9, 0.02, -0.03, 1, *last),
        do(Op.WARP, 1e9, 0, 0, 0, -1e30, 2, 0, 0, 1, *last),
        do(Op.WARP, 1, 0, 0, 0, 1, 0, 1, 0, -2.5, *last),  # a pole in the result's middle
    )
    return [warps[n % 5]]


def _kinds(bound: float) -> dict[str, list[list[float]]]:
    """Instructions that leave the size, with what they are called together."""
    b = bound
    return {
        "colours": [
            *(do(Op.BRIGHTNESS, f) for f in (0.3, 1.9, 0.0)),
            *(do(Op.SATURATION, f, 1 - f) for f in (1.7, 0.0, 0.4)),
            *(do(Op.HUE, h) for h in (0.13, -0.5, 0.5)),
            *(do(Op.SOLARIZE, t * b) for t in (0.5, 0.0, 1.0)),
            *(do(Op.POSTERIZE, bits) for bits in (2, 0, 5, 8)),
            do(Op.SOLARIZE_ADD, 0.5 * b, 0.4 * b),
            do(Op.SOLARIZE_ADD, b, -0.3 * b),
            do(Op.GRAYSCALE),
            do(Op.INVERT),
            do(Op.PERMUTE, 2, 0, 1),
            do(Op.PERMUTE, 1, 1, 0),
            do(Op.NORMALIZE, 2.1, 4.3, 0.7, 1.0, -0.3, 0.1, -1.7, 0.2),
        ],
        "statistics": [
            *(do(Op.CONTRAST, f, 1 - f) for f in (0.3, 1.9, 0.0)),
            *(do(Op.AUTOCONTRAST), do(Op.EQUALIZE)) * 3,
        ],
        "drawn": [
            do(Op.NOISE, 0.02 * b, 0.3 * b, 1, *KEY),
            do(Op.NOISE, 0.0, 0.1 * b, 0, *key_arguments(5)),
            do(Op.SALT_AND_PEPPER, 0.4, 0.3, *KEY),
            do(Op.SALT_AND_PEPPER, 1.0, 0.5, *key_arguments(7)),
        ],
    }


def _each(bound: float, kind: str) -> tuple[Make, Sizes]:
    rows = _kinds(bound)[kind]
    return lambda size, n: [rows[n]], [SIZES[n % 3] for n in range(len(rows))]


def _neighbours(size: tuple[int, int], n: int) -> Program:
    h, w = size
    rows = (
        do(Op.SHARPNESS, 1.8, 1 - 1.8),
        do(Op.SHARPNESS, 0.0, 1.0),
        do(Op.BLUR, Axes.BOTH, min(2, h - 1, w - 1), 0.4, 0.2, 0.1),
        do(Op.BLUR, Axes.HORIZONTAL, min(12, w - 1), *(0.3 / (k + 1) for k in range(13))),
        do(Op.BLUR, Axes.VERTICAL, min(3, h - 1), 0.1, 0.2, 0.05, 0.3),
    )
    return [rows[n % 5]]


def _erased(bound: float) -> Make:
    def program(size: tuple[int, int], n: int) -> Program:
        h, w = size
        colour = (0.1 * bound, bound, 0, 0.5 * bound)
        return [
            do(Op.ERASE, h // 2, 0, h - h // 2, w, EraseMode.CONSTANT, *colour),
            do(Op.ERASE, 0, w // 2, h, w // 3, EraseMode.NORMAL, *colour, *KEY),
            do(Op.ERASE),
        ]

    return program


def _mixed(size: tuple[int, int], n: int) -> Program:
    return [
        do(Op.SAVE, 0.3),
        do(Op.INVERT),
        do(Op.JOIN, 0.5),
        do(Op.WARP, 1, 0.2, 0, 0, 1, 0, 0, 0, 1, *size, WarpFilter.BILINEAR, 0.5, 0.5, 0.5),
        do(Op.JOIN, 0.2),
        do(Op.MIX),
    ]


# Rows of instructions


def _drawn(bound: float, seed: int, exact: bool, smooth: bool, channels: int) -> Make:
    """Random ones: geometry, and two to five that change colours."""

    def program(size: tuple[int, int], n: int) -> Program:
        r = random.Random(1000 * seed + n)
        f, level = r.uniform(0.1, 1.9), r.uniform(0, bound)
        rows = r.choice((_boxes, _warps))(size, r.randrange(42))
        out = (4, 5)
        colours = [
            do(Op.BRIGHTNESS, f),
            do(Op.INVERT),
            do(Op.SHARPNESS, f, 1 - f),
            do(Op.BLUR, r.randrange(3), r.randrange(4), 0.3, 0.2, 0.1, 0.05),
            do(Op.NOISE, 0.1 * bound, 0.2 * bound, 0, *key_arguments(r.getrandbits(64))),
            do(Op.ERASE, 1, 2, 2, r.randrange(4), 0, level, level, 0, level),
            do(Op.SALT_AND_PEPPER, 0.2, r.random(), *key_arguments(r.getrandbits(64))),
            resized(*out, (3, 6), filter=Filter.BICUBIC_ANTIALIAS),
        ]
        if channels in (1, 3):
            colours.append(do(Op.CONTRAST, f, 1 - f))
        if channels == 3:
            colours += [
                do(Op.SATURATION, f, 1 - f),
                do(Op.GRAYSCALE),
                do(Op.PERMUTE, *r.sample(range(3), 3)),
            ]
        if not smooth:
            colours += [
                do(Op.SOLARIZE, level),
                do(Op.SOLARIZE_ADD, level, 0.3 * bound),
                do(Op.POSTERIZE, r.randrange(9)),
                do(Op.AUTOCONTRAST),
                do(Op.EQUALIZE),
                *([do(Op.HUE, r.uniform(-0.5, 0.5))] if channels == 3 else []),
            ]
        for row in r.sample(colours, r.randrange(2, 6)):
            rows.append(row)
            if row[0] == Op.BOX:
                rows.append(resized(3, 6, out, filter=r.choice(list(Filter))))
        if not exact and r.random() < 0.5:
            rows.append(do(Op.NORMALIZE, *(4 / bound,) * 4, *(-2.0, -1.5, -1.0, 0.5)))
        return rows

    return program


_MANY = (*SIZES, (1, 1), (3, 9), (2, 2), (8, 3)) * 3
_FEW = (*SIZES, (1, 1), (8, 3))
_LARGE = ((40, 33), (17, 64), (65, 9), (1, 50), (33, 33))


def _rows(seed: int, sizes: Sizes = _FEW, **named: Any) -> Case:
    exact, smooth = named.get("exact", False), named.setdefault("smooth", False)
    bound = 255.0 if named.get("source") == BYTES else 1.0
    programs = _drawn(bound, seed, exact, smooth, named.get("channels", 3))
    return _case(f"rows {seed} of {len(sizes)}", programs, sizes, **named)


_LAST = {"channels_last": True, "result_channels_last": True}
_EXACT: dict[str, Any] = {"source": BYTES, "result": BYTES, "exact": True}

_CASES = [
    _case("nothing", lambda size, n: [], ((4, 5),) * 3),
    _case("nothing", lambda size, n: [], ((4, 5),) * 2, channels=1, **_LAST),
    _case("of no samples", lambda size, n: [], ()),
    _case("one small image", _boxes, ((3, 4),), channels_last=True),
    _case("boxes", _boxes, _MANY * 2),
    _case("boxes", _boxes, _MANY * 2, channels_last=True, **_EXACT),
    _case("warps", _warps, _MANY),
    _case("warps", _warps, _MANY, **_LAST, **_EXACT),
    *(_case(kind, *_each(1.0, kind)) for kind in _kinds(1.0)),
    *(_case(kind, *_each(255.0, kind), **_EXACT) for kind in _kinds(1.0)),
    *(_case("neighbours", _neighbours, _MANY[:7], **named) for named in ({}, _EXACT)),
    _case("erased", _erased(1.0)),
    _case("erased", _erased(255.0), **_EXACT),
    *(_case("mixed", _mixed, **named) for named in ({}, _EXACT)),
    _rows(0, smooth=True),
    _rows(1, smooth=True, channels=1, **_LAST),
    *(_rows(seed, **_EXACT, channels_last=seed == 3) for seed in (2, 3)),
    *(_rows(seed, source=BYTES, channels_last=seed == 5) for seed in (4, 5)),
    _rows(6, source=torch.float16, result=torch.bfloat16, result_channels_last=True),
    _rows(7, source=torch.bfloat16, result=BYTES),
    _rows(8, source=torch.float32, result=torch.float16, channels_last=True),
    *(_rows(8 + channels, channels=channels, source=BYTES, **_LAST) for channels in (1, 2, 4)),
    *(_rows(12 + channels, channels=channels) for channels in (1, 2, 4)),
    _rows(17, _LARGE),
    _rows(18, _LARGE, **_LAST, **_EXACT),
    _rows(19, _LARGE * 2, source=BYTES, result=torch.float16, **_LAST),
]
_SMOOTH = [case for case in _CASES if case.small and case.differentiable]
CASES = [*_CASES, *map(_backward, _SMOOTH[1::3])]
