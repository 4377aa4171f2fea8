"""Programs of the op `augment` for one image, and images that are the same everywhere."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from reg_kernels import backends
from reg_kernels._augment_program import WIDTH, Op, instruction
from reg_kernels.ops.augment import run

from support import DEVICE


def parameters() -> list[Any]:
    """The implementations of the op as parameters; float64 is the reference's alone."""
    found = []
    for name in backends.NAMES:
        why = backends.why_not_op("augment", name, DEVICE, torch.float32)
        marks = [] if why is None else [pytest.mark.skip(reason=f"{name}: {why}")]
        found.append(pytest.param(name, marks=marks))
    return found


on_each = pytest.mark.parametrize("backend", parameters())


def image_of(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Bytes (C, H, W). Of seeds 1 to 3 they have few colours, little contrast, or one colour."""
    drawn = random.Random(f"{seed} {height} {width}")
    count = channels * height * width
    if seed == 1:
        values = [drawn.choice((0, 1, 127, 128, 254, 255)) for _ in range(count)]
    elif seed == 2:
        values = [drawn.randrange(100, 120) for _ in range(count)]
    elif seed == 3:
        values = [c * 60 + 7 for c in range(channels) for _ in range(height * width)]
    else:
        values = [drawn.randrange(256) for _ in range(count)]
    return torch.tensor(values, dtype=torch.uint8).view(channels, height, width)


def run_on(
    image: Tensor,
    *instructions: list[float],
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    exact: bool = False,
    channels_last: bool = False,
    **options: Any,
) -> Tensor:
    """What a program makes of an image (C, H, W), by default of its size and dtype."""
    channels, height, width = image.shape
    pixels = (image.permute(1, 2, 0) if channels_last else image).reshape(-1).contiguous()
    program = torch.tensor(instructions).view(1, len(instructions), WIDTH)
    images = torch.tensor([[0, height, width]])
    last = (*(size or (height, width)), dtype or image.dtype, channels_last, exact)
    return run(pixels, images, program, channels, channels_last, *last, **options)[0]


def factors(op: Op, factor: float) -> list[float]:
    """CONTRAST, SATURATION or SHARPNESS: both of its shares."""
    return instruction(op, factor, 1.0 - factor)


def affine_matrix(
    angle: float, translate: tuple[float, float], scale: float, shear: tuple[float, float]
) -> list[float]:
    """The inverse of a rotation, shears, a scale and a shift about the centre: from a pixel of the
    result to one of the image, both counted from their centres."""
    rotation, sx, sy = (math.radians(value) for value in (angle, *shear))
    a = math.cos(rotation - sy) / math.cos(sy)
    b = -(a * math.tan(sx) + math.sin(rotation))
    c = math.sin(rotation - sy) / math.cos(sy)
    d = math.cos(rotation) - c * math.tan(sx)
    m0, m1, m3, m4 = d / scale, -b / scale, -c / scale, a / scale
    x, y = translate
    return [m0, m1, 0.0 - m0 * x - m1 * y, m3, m4, 0.0 - m3 * x - m4 * y]


def grid_warp(
    matrix: list[float], image: Tensor, size: tuple[int, int], filter: int, *fill: float
) -> list[float]:
    """WARP as `exact` has it: by six or eight coefficients that are divided to torchvision's grid,
    float by float."""
    height, width = image.shape[1:]
    half = torch.tensor((0.5 * width, 0.5 * height)).view(2, 1)
    rows = (torch.tensor(matrix[:6]).view(2, 3) / half).view(-1).tolist()
    last = [0.0, 0.0, 1.0] if len(matrix) == 6 else [*matrix[6:], 1.0]
    return instruction(Op.WARP, *rows, *last, *size, filter, *fill)
