"""What policies choose from: operations of a number and a strength, as instructions."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._augment_program import WIDTH, Axes, Op, WarpFilter
from ._assemble import Assembly, Fill
from .colour import blur_weights
from .geometry import matrix_of

# The number of an operation in columns of parameters is its place here. Beside it stands what a
# strength v is: shears are v = tan of the angle, shifts are by v pixels, rotations counter-clockwise
# by v degrees, enhancers have the factor v, Posterize keeps v bits, Solarize has the threshold v and
# SolarizeAdd adds v below half, both in shares of the full range, and a blur has deviation v.
OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize"),
    *("AutoContrast", "Equalize", "Invert", "SolarizeAdd", "GaussianBlur"),
)
NUMBER = {name: number for number, name in enumerate(OPS)}
BLUR_RADIUS = 7  # 3.5 deviations of the largest blur there is

_OPCODES = {
    "Identity": Op.NONE,
    **dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), Op.WARP),
    "Color": Op.SATURATION,
    "GaussianBlur": Op.BLUR,
}
_GRAY_HAS_NONE = ("Color",)


@functools.cache
def _table(is_gray: bool, bound: float) -> Tensor:
    """Of each operation: its opcode; what v makes of the rotation's angle, the shears and the
    shifts; and of the first two arguments of other instructions, what v counts and what stands."""
    rows = []
    for name in OPS:
        op = _OPCODES.get(name) or (Op.NONE if name == "Identity" else Op[_snake(name)])
        if is_gray and name in _GRAY_HAS_NONE:
            op = Op.NONE
        by_v = {"Solarize": (bound, 0.0), "SolarizeAdd": (0.0, bound), "Posterize": (1.0, 0.0)}
        by_v |= dict.fromkeys(("Contrast", "Color", "Sharpness"), (1.0, -1.0))
        by_v["Brightness"] = (1.0, 0.0)
        stands = {"SolarizeAdd": (bound * 128 / 255, 0.0)}
        stands |= dict.fromkeys(("Contrast", "Color", "Sharpness"), (0.0, 1.0))
        stands["GaussianBlur"] = (float(Axes.BOTH), float(BLUR_RADIUS))
        if op == Op.NONE:
            by_v, stands = {}, {}
        rows.append(
            [
                float(op),
                float(op == Op.WARP),
                -math.pi / 180 if name == "Rotate" else 0.0,
                *(float(name == warp) for warp in ("ShearX", "ShearY")),
                *(-float(name == warp) for warp in ("TranslateX", "TranslateY")),
                *by_v.get(name, (0.0, 0.0)),
                *stands.get(name, (0.0, 0.0)),
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def _snake(name: str) -> str:
    return {"SolarizeAdd": "SOLARIZE_ADD"}.get(name, name.upper())


def add(
    assembly: Assembly,
    ops: Tensor,
    strengths: Tensor,
    filter: WarpFilter | Tensor,
    fill: Fill,
    on: Tensor | None = None,
    blurs: bool = False,
    is_seen: bool = True,
) -> None:
    """Adds K operations one after another: (K, N) numbers of OPS and strengths.

    Each is exact, as if it were alone. `filter` may be one of each, (K, N). `blurs` says whether
    any may be a blur, `is_seen` whether points of the images move with it.
    """
    count = len(ops)
    if on is not None:
        ops = ops * on
    table = _table(assembly.channels == 1, assembly.bound)
    parts = table.index_select(0, ops.reshape(-1).long()).T.contiguous()
    opcode, is_warp, turn, shear_x, shear_y, shift_x, shift_y, *rest = parts
    v = strengths.reshape(-1)
    width, height = assembly.width.repeat(count), assembly.height.repeat(count)
    angle = turn * v
    cosine, sine = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    still = 1 - cosine
    warp = (
        *(cosine, sine + shear_x * v, still * x - sine * y + shift_x * v),
        *(shear_y * v - sine, cosine, sine * x + still * y + shift_y * v),
    )
    rows = torch.zeros(len(v), WIDTH)
    rows[:, 1:7] = torch.stack(warp, 1)
    rows[:, 9] = 1
    rows[:, 10] = height
    rows[:, 11] = width
    if isinstance(filter, WarpFilter):
        rows[:, 12] = float(assembly.warp_filter(filter, fill))
    else:
        rows[:, 12] = filter.reshape(-1)
    values = assembly.values("fill", fill)
    if any(values):
        rows[:, 13:] = torch.tensor(values[:3])
    rows *= is_warp.unsqueeze(1)
    rows[:, 0] = opcode
    rows[:, 1] += rest[0] * v + rest[2]
    rows[:, 2] += rest[1] * v + rest[3]
    if blurs:
        is_blur = (opcode == Op.BLUR).unsqueeze(1)
        weights = blur_weights(torch.where(is_blur[:, 0], v, 1.0), BLUR_RADIUS)
        rows[:, 3 : 4 + BLUR_RADIUS] += weights * is_blur
    shaped = rows.view(count, -1, WIDTH).transpose(0, 1)
    matrices = None
    if is_seen and (assembly.tracks or assembly.mask is not None):
        steps = matrix_of(*(part * is_warp + (k in (0, 4)) * (1 - is_warp)
                            for k, part in enumerate(warp)))  # fmt: skip
        matrices = steps.view(count, -1, 3, 3)[0]
        for step in steps.view(count, -1, 3, 3)[1:]:
            matrices = matrices @ step
    assembly.several(shaped, matrices)
