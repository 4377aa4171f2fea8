"""Rotations, affine and perspective transformations.

Their matrices map a point of the result to the point of the image that is seen there, both from the
upper left corner of the image, the centre of a pixel lying halfway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _draws
from ._assemble import Assembly, Number, radians
from ._transform import Transform, Values, warp_filter


def affine_matrix(
    angle: Tensor,
    shear_x: Number,
    shear_y: Number,
    scale: Number,
    shift_x: Number,
    shift_y: Number,
    centre_x: Number,
    centre_y: Number,
) -> Tensor:
    r"""The inverse of T C R S C^-1, (N, 3, 3): T shifts, C brings the centre to where it is, R
    rotates clockwise, scales and shears.

    With angles a, s = shear_x and t = shear_y in radians, R S is the scale times (A, B; C, D),
    A = cos(a - t) / cos t, B = -A tan s - sin a, C = sin(a - t) / cos t, D = cos a - C tan s, whose
    determinant is 1.
    """
    zero = torch.zeros_like(angle)
    s, t = zero + shear_x, zero + shear_y
    a = (angle - t).cos() / t.cos()
    c = (angle - t).sin() / t.cos()
    b = -a * s.tan() - angle.sin()
    d = angle.cos() - c * s.tan()
    m0, m1, m3, m4 = d / scale, -b / scale, -c / scale, a / scale
    x, y = centre_x + shift_x, centre_y + shift_y
    m2 = centre_x - m0 * x - m1 * y
    m5 = centre_y - m3 * x - m4 * y
    return matrix_of(m0, m1, m2, m3, m4, m5)


def matrix_of(*rows: Tensor) -> Tensor:
    """Two rows as a matrix of homogeneous coordinates, (N, 3, 3)."""
    matrix = torch.zeros(len(rows[0]), 9, dtype=torch.float64)
    torch.stack(rows, 1, out=matrix[:, :6])
    matrix[:, 8] = 1
    return matrix.view(-1, 3, 3)


class _Warping(Transform):
    """What takes `interpolation`, `fill` and `center`."""

    def _set_warp(self, interpolation: Any, fill: Any, center: Any = None) -> None:
        self.interpolation = interpolation
        self.filter = warp_filter(self, interpolation)
        self.fill = self._fill(fill)
        if center is not None:
            center = tuple(self._number("center", x) for x in self._pair("center", center))
        self.center = center

    def _centre(self, assembly: Assembly) -> tuple[Number, Number]:
        return self.center or (assembly.width / 2, assembly.height / 2)


class RandomRotation(_Warping):
    """Rotates the image counter-clockwise by an angle that is uniform in a range.

    Args:
        degrees: (low, high), or a number d for (-d, d).
        interpolation: "nearest", "bilinear" or "bicubic". In between is what lies outside blended
            in, by the weight that falls on it.
        expand: True makes the result as large as the rotated image, which differs from sample to
            sample; a transform that sets the size has to follow.
        center: (x, y) in pixels from the upper left corner; None is the image's centre.
        fill: what is seen outside of the image, a number or one for each channel, in the values of
            the pixels; None is 0.
        p: the probability that it applies.

    Shape: images (N, C, H, W) keep theirs; with `expand` the rotated image's sides take H's and W's
    place.

    Raises:
        ValueError: an argument is out of its range, or a range is not two numbers in order.
        TypeError: an argument is of another type.

    Columns: angle, in degrees.

    Source: `torchvision.transforms.v2.RandomRotation`.
    """

    words = 1
    columns = ("angle",)

    def __init__(
        self,
        degrees: float | Sequence[float],
        interpolation: str = "nearest",
        expand: bool = False,
        center: Sequence[float] | None = None,
        fill: float | Sequence[float] | None = 0,
        *,
        p: float = 1.0,
    ) -> None:
        self.degrees = self._spread("degrees", degrees)
        self._set_warp(interpolation, fill, center)
        self.expand = bool(expand)
        self.always = "expand" if self.expand else None
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        return (_draws.between(u[0], self.degrees),)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        angle = radians(-values["angle"])
        matrix = affine_matrix(angle, 0.0, 0.0, 1.0, 0.0, 0.0, *self._centre(assembly))
        out = None
        if self.expand:
            out = self._expanded(matrix, assembly)
        assembly.warp(matrix, on, self.filter, self.fill, out)

    def _expanded(self, matrix: Tensor, assembly: Assembly) -> tuple[Number, Number]:
        """The result's size; moves its corner to that of what is seen."""
        seen = torch.linalg.inv(matrix) @ _corners(assembly)
        # A ten thousandth of a pixel is the rounding of a side that fits.
        low = (seen[:, :2].amin(2) + 1e-4).floor_()
        high = (seen[:, :2].amax(2) - 1e-4).ceil_()
        matrix[:, :2, 2] += (matrix[:, :2, :2] @ low.unsqueeze(2)).squeeze(2)
        width, height = (high - low).unbind(1)
        return height, width


def _corners(assembly: Assembly) -> Tensor:
    """The four corners of each image, as columns of (N, 3, 4)."""
    right, bottom = assembly.width, assembly.height
    zero, one = torch.zeros_like(right), torch.ones_like(right)
    x = torch.stack((zero, right, right, zero), 1)
    y = torch.stack((zero, zero, bottom, bottom), 1)
    return torch.stack((x, y, one.unsqueeze(1).expand(-1, 4)), 1)


class RandomAffine(_Warping):
    r"""Rotates, shifts, scales and shears the image about a centre.

    Args:
        degrees: the range of angles, clockwise: (low, high), or a number d for (-d, d); 0 for none.
        translate: (a, b): the image is shifted by whole pixels, uniform in :math:`\pm a W` and
            :math:`\pm b H`; each in [0, 1].
        scale: the range of the scale, positive; a larger one shows the image larger.
        shear: the range of the angle along x, in degrees: a number d for (-d, d), two numbers, or
            four for x and y.
        interpolation: as in `RandomRotation`.
        fill: as in `RandomRotation`.
        center: as in `RandomRotation`.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range, or a range is not two numbers in order.
        TypeError: an argument is of another type.

    Columns: angle, translate_x, translate_y (pixels), scale, shear_x, shear_y (degrees).

    Source: `torchvision.transforms.v2.RandomAffine`.
    """

    words = 6
    columns = ("angle", "translate_x", "translate_y", "scale", "shear_x", "shear_y")

    def __init__(
        self,
        degrees: float | Sequence[float],
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: float | Sequence[float] | None = None,
        interpolation: str = "nearest",
        fill: float | Sequence[float] | None = 0,
        center: Sequence[float] | None = None,
        *,
        p: float = 1.0,
    ) -> None:
        self.degrees = self._spread("degrees", degrees)
        if translate is not None:
            pair = self._pair("translate", translate)
            translate = tuple(self._number("translate", x, 0.0, 1.0) for x in pair)
        self.translate = translate
        self.scale = None if scale is None else self._range("scale", scale, 1e-6, 1e6)
        self.shear: tuple[float, ...] | None = None
        if isinstance(shear, Sequence) and len(shear) == 4:
            self.shear = (
                *self._range("shear", shear[:2], -89.0, 89.0),
                *self._range("shear", shear[2:], -89.0, 89.0),
            )
        elif shear is not None:
            self.shear = self._spread("shear", shear, 0.0, -89.0, 89.0)
        self._set_warp(interpolation, fill, center)
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor | float]:
        angle = _draws.between(u[0], self.degrees)
        shift_x: Number = 0.0
        shift_y: Number = 0.0
        if self.translate is not None:
            shift_x = (assembly.width * (2 * u[1] - 1) * self.translate[0]).round_()
            shift_y = (assembly.height * (2 * u[2] - 1) * self.translate[1]).round_()
        scale = 1.0 if self.scale is None else _draws.between(u[3], self.scale)
        shear = self.shear or (0.0, 0.0)
        shear_x = _draws.between(u[4], shear[:2])
        shear_y = _draws.between(u[5], shear[2:]) if len(shear) == 4 else 0.0
        return angle, shift_x, shift_y, scale, shear_x, shear_y

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        matrix = affine_matrix(
            radians(values["angle"]),
            radians(values["shear_x"]),
            radians(values["shear_y"]),
            values["scale"],
            *(values["translate_x"], values["translate_y"]),
            *self._centre(assembly),
        )
        assembly.warp(matrix, on, self.filter, self.fill)


class RandomPerspective(_Warping):
    r"""Moves the four corners of the image inwards, as if it were seen at a slant.

    Each corner moves by whole pixels, uniform from 0 to `distortion_scale` times half a side. The
    matrix is that of the eight numbers, solved for in float64, which map the moved corners to the
    image's: :math:`u = (a x + b y + c) / (g x + h y + 1)`, and v likewise. Where corners coincide,
    as in an image of one pixel, nothing is done.

    Args:
        distortion_scale: in [0, 1].
        p: the probability that it applies.
        interpolation: as in `RandomRotation`.
        fill: as in `RandomRotation`.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: x0, y0 to x3, y3: where the corners go, from the upper left one clockwise.

    Source: `torchvision.transforms.v2.RandomPerspective`.
    """

    words = 8
    columns = tuple(f"{axis}{corner}" for corner in range(4) for axis in "xy")

    def __init__(
        self,
        distortion_scale: float = 0.5,
        p: float = 0.5,
        interpolation: str = "bilinear",
        fill: float | Sequence[float] | None = 0,
    ) -> None:
        self.distortion_scale = self._number("distortion_scale", distortion_scale, 0.0, 1.0)
        self._set_warp(interpolation, fill)
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        places = []
        for word, (is_x, is_far) in zip(u, _CORNERS, strict=True):
            side = assembly.width if is_x else assembly.height
            count = (self.distortion_scale * (side / 2).floor()).floor() + 1
            place = _draws.integers(word, count)
            places.append(side - count + place if is_far else place)
        return places

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        ends = torch.stack([values[name] for name in self.columns], 1).view(-1, 4, 2)
        right, bottom = assembly.width - 1, assembly.height - 1
        zero = torch.zeros_like(right)
        starts = torch.stack((zero, zero, right, zero, right, bottom, zero, bottom), 1)
        assembly.warp(_perspective(ends, starts.view(-1, 4, 2)), on, self.filter, self.fill)


_CORNERS = [(axis == 0, far) for fars in ((0, 0), (1, 0), (1, 1), (0, 1)) for axis, far in
            enumerate(fars)]  # fmt: skip


def _perspective(ends: Tensor, starts: Tensor) -> Tensor:
    """The matrices that map four points to four others, (N, 4, 2) both."""
    samples = len(ends)
    equations = torch.zeros(samples, 4, 2, 8, dtype=torch.float64)
    for axis in range(2):
        equations[:, :, axis, 3 * axis : 3 * axis + 2] = ends
        equations[:, :, axis, 3 * axis + 2] = 1
        equations[:, :, axis, 6:] = -starts[:, :, axis : axis + 1] * ends
    equations = equations.view(samples, 8, 8)
    solved, info = torch.linalg.solve_ex(equations, starts.reshape(samples, 8))
    matrix = torch.cat((solved, torch.ones(samples, 1, dtype=torch.float64)), 1)
    matrix = matrix.view(-1, 3, 3)
    sound = (info == 0) & matrix.isfinite().all(2).all(1)
    sound &= torch.linalg.det(matrix).abs() > 1e-9  # not seen edge on
    eye = torch.eye(3, dtype=torch.float64)
    return torch.where(sound.view(-1, 1, 1), matrix, eye)
