"""What policies choose from: operations of a number and a strength, as instructions."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._augment_program import WIDTH, Axes, Op, WarpFilter
from ._assemble import Assembly, Fill, spread, to_grid
from .colour import blur_weights

# The number of an operation in columns of parameters is its place here. Of a strength v: shears are
# by the angle of tangent v, shifts by v pixels, rotations counter-clockwise by v degrees, enhancers
# have the factor v, Posterize keeps v bits, Solarize has the threshold v and SolarizeAdd adds v
# below half, both in shares of the full range, and a blur has the deviation v.
OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize"),
    *("AutoContrast", "Equalize", "Invert", "SolarizeAdd", "GaussianBlur"),
)
NUMBER = {name: number for number, name in enumerate(OPS)}
BLUR_RADIUS = 7  # 3.5 deviations of the largest blur there is


@functools.cache
def _table(is_gray: bool, bound: float) -> Tensor:
    """Of each operation its opcode, whether it is a warp, and what the first two arguments are of
    another one beside what its strength counts; and what the strength counts for the angle, the
    shears and the shifts of a warp, and for those two arguments: (11, operations)."""
    by_v = dict.fromkeys(("Contrast", "Color", "Sharpness"), (1.0, -1.0))
    by_v |= {"Brightness": (1.0, 0.0), "Posterize": (1.0, 0.0)}
    by_v |= {"Solarize": (bound, 0.0), "SolarizeAdd": (0.0, bound)}
    stands = dict.fromkeys(("Contrast", "Color", "Sharpness"), (0.0, 1.0))
    stands["SolarizeAdd"] = (bound * 128 / 255, 0.0)
    stands["GaussianBlur"] = (float(Axes.BOTH), float(BLUR_RADIUS))
    columns = []
    for name in OPS:
        op = _opcode(name)
        if is_gray and name == "Color":  # gray images have none
            op, name = Op.NONE, "Identity"
        columns.append(
            [
                *(float(op), float(op == Op.WARP), *stands.get(name, (0.0, 0.0))),
                -math.pi / 180 if name == "Rotate" else 0.0,
                *(float(name == warp) for warp in ("ShearX", "ShearY")),
                *(-float(name == warp) for warp in ("TranslateX", "TranslateY")),
                *by_v.get(name, (0.0, 0.0)),
            ]
        )
    return torch.tensor(columns, dtype=torch.float64).T.contiguous()


def _opcode(name: str) -> Op:
    if name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
        return Op.WARP
    others = {"Identity": Op.NONE, "Color": Op.SATURATION, "SolarizeAdd": Op.SOLARIZE_ADD}
    others["GaussianBlur"] = Op.BLUR
    return others[name] if name in others else Op[name.upper()]


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
    parts = table.index_select(1, ops.reshape(-1).long())
    opcode, is_warp = parts[0], parts[1]
    scaled = parts[4:] * strengths.reshape(-1)
    angle, shear_x, shear_y, shift_x, shift_y = scaled[:5]
    cosine, sine = angle.cos(), angle.sin()
    if assembly.sides is None:
        size = assembly.size().unsqueeze(1).expand(-1, count, -1).reshape(2, -1)
        y, x = size / 2
    else:
        size = spread(assembly.sides, len(opcode))
        y, x = spread(tuple(side / 2 for side in assembly.sides), len(opcode))
    if isinstance(filter, WarpFilter):
        filters = spread((float(assembly.warp_filter(filter, fill)),), len(opcode))[0]
    else:
        filters = filter.reshape(-1)
    values = spread((0.0, 0.0, 1.0, *assembly.values("fill", fill)[:3]), len(opcode)).unbind()
    still = values[2] - cosine
    rows = torch.stack(
        (
            *(opcode, cosine, sine + shear_x),
            torch.addcmul(shift_x, still, x).addcmul_(sine, y, value=-1),
            *(shear_y - sine, cosine),
            torch.addcmul(shift_y, still, y).addcmul_(sine, x),
            *(*values[:3], *size, filters, *values[3:]),
        )
    )
    matrices = None
    if is_seen and (assembly.tracks or assembly.mask is not None):
        matrices = _product(rows[1:10], count)
    if assembly.is_exact:
        height_width = (size[0], size[1])
        rows[1:10] = to_grid(rows[1:10], height_width, height_width)
    rows[1:] *= is_warp
    rows[1:3] += scaled[5:]
    rows[1:3] += parts[2:4]
    if blurs:
        is_blur = opcode == Op.BLUR
        sigma = torch.where(is_blur, strengths.reshape(-1), 1.0)
        rows[3 : 4 + BLUR_RADIUS] += blur_weights(sigma, BLUR_RADIUS) * is_blur
    assembly.several(rows.view(WIDTH, count, -1), matrices)


def _product(entries: Tensor, count: int) -> Tensor:
    """Of the matrices' entries (9, K N), the product of the K of each sample, (N, 3, 3)."""
    steps = torch.stack([*entries], 1).view(count, -1, 3, 3)
    product = steps[0]
    for step in steps[1:]:
        product = product @ step
    return product
