"""The language of the op `augment`: its instructions, and what their arguments are called.

A program is float32 (N, S, WIDTH): S instructions for each of N samples, which are executed in
order. Element 0 of an instruction is its opcode, an `Op`; then come the arguments that `ARGUMENTS`
names, and zeros. csrc/include/reg_kernels/augment_math.h is the twin of this file in C++, and the
docstring of ops/augment.py says what each instruction computes.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

WIDTH = 16  # numbers of an instruction, its opcode included
MOST_CHANNELS = 4
LARGEST_SIDE = 65535  # of an image, at any point of a program
LARGEST_RADIUS = 12  # of BLUR
TAG = "augment1"  # xored, as eight letters, into the key of what NOISE and its like draw


class Op(enum.IntEnum):
    """The opcodes."""

    NONE = 0
    BOX = 1
    WARP = 2
    BRIGHTNESS = 3
    CONTRAST = 4
    SATURATION = 5
    HUE = 6
    GRAYSCALE = 7
    INVERT = 8
    SOLARIZE = 9
    SOLARIZE_ADD = 10
    POSTERIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13
    SHARPNESS = 14
    BLUR = 15
    NOISE = 16
    PERMUTE = 17
    ERASE = 18
    NORMALIZE = 19
    SALT_AND_PEPPER = 20
    SAVE = 21
    JOIN = 22
    MIX = 23


class Filter(enum.IntEnum):
    """How BOX resamples."""

    NEAREST = 0
    NEAREST_EXACT = 1
    BILINEAR = 2
    BICUBIC = 3
    BILINEAR_ANTIALIAS = 6
    BICUBIC_ANTIALIAS = 7


class WarpFilter(enum.IntEnum):
    """How WARP resamples."""

    NEAREST = 0
    BILINEAR_FADED = 1  # torchvision's: the fill's weight is squared, which darkens rims
    BILINEAR = 2
    BICUBIC = 3


class Flip(enum.IntFlag):
    """How BOX mirrors what it writes."""

    NEITHER = 0
    LEFT_RIGHT = 1
    UP_DOWN = 2


class Pad(enum.IntEnum):
    """What BOX reads outside of the image."""

    NONE = 0  # nothing: the region lies inside
    CONSTANT = 1
    EDGE = 2
    REFLECT = 3
    SYMMETRIC = 4


class Axes(enum.IntEnum):
    """The directions that BLUR smooths in."""

    BOTH = 0
    HORIZONTAL = 1
    VERTICAL = 2


class EraseMode(enum.IntEnum):
    """What ERASE writes."""

    CONSTANT = 0
    NORMAL = 1


_FILL = ("fill0", "fill1", "fill2")
_KEY = ("key0", "key1", "key2", "key3")  # a Philox key of 64 bits by 16 bits, the lowest first
_REGION = ("top", "left", "height", "width")

# `rest` is 1 - factor, rounded by itself: 1 minus a rounded factor is another number.
ARGUMENTS: dict[Op, tuple[str, ...]] = {
    Op.NONE: (),
    Op.BOX: (*_REGION, "out_height", "out_width", "flips", "filter", "pad", *_FILL, "fill3"),
    Op.WARP: (*(f"m{i}" for i in range(9)), "out_height", "out_width", "filter", *_FILL),
    Op.BRIGHTNESS: ("factor",),
    Op.CONTRAST: ("factor", "rest"),
    Op.SATURATION: ("factor", "rest"),
    Op.HUE: ("shift",),
    Op.GRAYSCALE: (),
    Op.INVERT: (),
    Op.SOLARIZE: ("threshold",),
    Op.SOLARIZE_ADD: ("threshold", "addend"),
    Op.POSTERIZE: ("bits",),
    Op.AUTOCONTRAST: (),
    Op.EQUALIZE: (),
    Op.SHARPNESS: ("factor", "rest"),
    Op.BLUR: ("axes", "radius", *(f"w{k}" for k in range(LARGEST_RADIUS + 1))),
    Op.NOISE: ("mean", "std", "clip", *_KEY),
    Op.PERMUTE: ("p0", "p1", "p2"),
    Op.ERASE: (*_REGION, "mode", "v0", "v1", "v2", "v3", *_KEY),
    Op.NORMALIZE: (*(f"a{c}" for c in range(4)), *(f"b{c}" for c in range(4))),
    Op.SALT_AND_PEPPER: ("p", "salt", *_KEY),
    Op.SAVE: ("weight",),
    Op.JOIN: ("weight",),
    Op.MIX: (),
}

# Those that read more of the image than the pixel they write.
WHOLE = frozenset(
    {
        *(Op.BOX, Op.WARP, Op.CONTRAST, Op.AUTOCONTRAST, Op.EQUALIZE, Op.SHARPNESS, Op.BLUR),
        *(Op.SAVE, Op.JOIN, Op.MIX),
    }
)
# Those of so many channels alone.
CHANNELS: dict[Op, tuple[int, ...]] = {
    Op.CONTRAST: (1, 3),
    Op.SATURATION: (3,),
    Op.HUE: (3,),
    Op.GRAYSCALE: (3,),
    Op.PERMUTE: (3,),
}


class Range(NamedTuple):
    """What an argument may be, beside finite."""

    lowest: float
    highest: float
    whole: bool = True
    but: tuple[float, ...] = ()

    def __str__(self) -> str:
        kind = "whole and " if self.whole else ""
        but = f", not {' or '.join(f'{x:g}' for x in self.but)}" if self.but else ""
        return f"{kind}in [{self.lowest:g}, {self.highest:g}]{but}"


_SIDE = Range(1, LARGEST_SIDE)
_CORNER = Range(-LARGEST_SIDE, LARGEST_SIDE)
_PART = Range(0, LARGEST_SIDE)
_SHARE = Range(0.0, 1.0, whole=False)
_SWITCH = Range(0, 1)

RANGES: dict[tuple[Op, str], Range] = {
    **{(Op.BOX, name): _CORNER for name in ("top", "left")},
    **{(Op.BOX, name): _SIDE for name in ("height", "width", "out_height", "out_width")},
    (Op.BOX, "flips"): Range(0, 3),
    (Op.BOX, "filter"): Range(0, 7, but=(4, 5)),
    (Op.BOX, "pad"): Range(0, 4),
    **{(Op.WARP, name): _SIDE for name in ("out_height", "out_width")},
    (Op.WARP, "filter"): Range(0, 3),
    (Op.HUE, "shift"): Range(-0.5, 0.5, whole=False),
    (Op.POSTERIZE, "bits"): Range(0, 8),
    (Op.BLUR, "axes"): Range(0, 2),
    (Op.BLUR, "radius"): Range(0, LARGEST_RADIUS),
    (Op.NOISE, "std"): Range(0.0, float("inf"), whole=False),
    (Op.NOISE, "clip"): _SWITCH,
    **{(Op.PERMUTE, f"p{c}"): Range(0, 2) for c in range(3)},
    **{(Op.ERASE, name): _PART for name in _REGION},
    (Op.ERASE, "mode"): _SWITCH,
    **{(Op.SALT_AND_PEPPER, name): _SHARE for name in ("p", "salt")},
    **{
        (op, name): Range(0, 65535)
        for op in (Op.NOISE, Op.ERASE, Op.SALT_AND_PEPPER)
        for name in _KEY
    },
}


def column(op: Op, name: str) -> int:
    """The place of an argument in its instruction."""
    return 1 + ARGUMENTS[op].index(name)


def instruction(op: Op, *positional: float, **named: float) -> list[float]:
    """One instruction: its arguments by their places or names; those not given are 0."""
    row = [float(op), *positional] + [0.0] * (WIDTH - 1 - len(positional))
    for name, value in named.items():
        row[column(op, name)] = float(value)
    return row


def key_arguments(key: int) -> tuple[float, float, float, float]:
    """key0 to key3 of a 64-bit key, unsigned or signed."""
    a, b, c, d = (float(key >> shift & 0xFFFF) for shift in (0, 16, 32, 48))
    return a, b, c, d
