"""The instructions of `augment` that move pixels or mix those that lie side by side.

Each is a function (image, values, *arguments) -> image, and its result is a weighted sum of taps:
pixels of the image, or what stands for those outside of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._augment_values import Values, per_channel

NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC, ANTIALIAS = 0, 1, 2, 3, 4
FADED = 1  # of WARP
CONSTANT, EDGE, REFLECT, SYMMETRIC = 1, 2, 3, 4


class Tap(NamedTuple):
    """One term of the sum along an axis, for each of `out` places."""

    place: Tensor  # (out,), of the image's row or column; -1 where that is the fill
    weight: Tensor | None = None  # (out,); None for 1
    used: Tensor | None = None  # (out,), whether there is such a term; None where there always is


# Boxes


def box(
    image: Tensor,
    values: Values,
    top: float,
    left: float,
    height: float,
    width: float,
    out_height: float,
    out_width: float,
    flips: float,
    filter: float,
    pad: float,
    *fill: float,
) -> Tensor:
    """A region of the image, resampled: rows first, then columns."""
    colour = per_channel(fill, image)
    kind, padding, mirrored = int(filter), int(pad), int(flips)
    axes = (
        (1, int(top), int(height), int(out_height), mirrored & 2),
        (2, int(left), int(width), int(out_width), mirrored & 1),
    )
    for dim, start, length, out, flipped in axes:
        places = torch.arange(out)
        places = out - 1 - places if flipped else places
        taps = [
            tap._replace(place=_reached(start + tap.place, image.shape[dim], padding))
            for tap in _taps(places, length, out, kind, image.dtype)
        ]
        image = _along(image, taps, dim, colour)
    return values.rounded(image)


def _along(image: Tensor, taps: list[Tap], dim: int, fill: Tensor) -> Tensor:
    """The sum of the taps along a dimension, in their order."""
    shape = [1, 1, 1]
    shape[dim] = -1

    def here(x: Tensor) -> Tensor:
        return x.to(image.device).view(shape)

    total = image
    for number, (index, weight, used) in enumerate(taps):
        term = image.index_select(dim, index.clamp(min=0).to(image.device))
        if bool((index < 0).any()):
            term = torch.where(here(index < 0), fill, term)
        if weight is not None:
            term = term * here(weight)
        if number == 0:
            total = term
        else:
            total = total + term if used is None else torch.where(here(used), total + term, total)
    return total


def _taps(places: Tensor, length: int, out: int, kind: int, dtype: torch.dtype) -> list[Tap]:
    """Of a region of `length` for `places` of a result of `out`; indices count from its start."""
    if length == out:
        return [Tap(places)]
    scale = torch.tensor(length, dtype=dtype) / torch.tensor(out, dtype=dtype)
    x = places.to(dtype)
    if kind in (NEAREST, NEAREST_EXACT):
        source = scale * x if kind == NEAREST else scale * (x + 0.5)
        return [Tap(source.to(torch.int64).clamp(max=length - 1))]
    if kind >= ANTIALIAS:
        return _wide_taps(scale * (x + 0.5), scale.clamp(min=1.0), length, kind - ANTIALIAS)
    centre = scale * (x + 0.5) - 0.5
    if kind == BILINEAR:
        centre = centre.clamp(min=0.0)
        first = centre.floor()
        second_weight = centre - first
        weights = [1.0 - second_weight, second_weight]
        start = first.to(torch.int64)
    else:
        first = centre.floor()
        weights = _cubic_weights(centre - first)
        start = first.to(torch.int64) - 1
    return [Tap((start + j).clamp(0, length - 1), weight) for j, weight in enumerate(weights)]


def _wide_taps(centre: Tensor, stretch: Tensor, length: int, kind: int) -> list[Tap]:
    """Of a filter as wide as what a place of the result stands for."""
    radius = (1.0 if kind == BILINEAR else 2.0) * stretch
    low = (centre - radius + 0.5).to(torch.int64).clamp(min=0)
    count = (centre + radius + 0.5).to(torch.int64).clamp(max=length) - low
    weights = []
    total = torch.zeros_like(centre)
    for j in range(int(count.max())):
        x = (((low + j).to(centre.dtype) - centre + 0.5) / stretch).abs()
        if kind == BILINEAR:
            weight = (1.0 - x).clamp(min=0.0)
        else:
            far = torch.where(x < 2.0, _cubic_far(x, -0.5), 0.0)
            weight = torch.where(x < 1.0, _cubic_near(x, -0.5), far)
        weights.append(weight)
        total = torch.where(j < count, total + weight, total)
    return [
        Tap((low + j).clamp(max=length - 1), weight / total, j < count)
        for j, weight in enumerate(weights)
    ]


def _cubic_near(x: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel at 0 <= x <= 1."""
    return ((x * (a + 2.0) - (a + 3.0)) * x) * x + 1.0


def _cubic_far(x: Tensor, a: float) -> Tensor:
    """And at 1 <= x <= 2."""
    return ((x * a - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a


def _cubic_weights(t: Tensor) -> list[Tensor]:
    a, rest = -0.75, 1.0 - t
    return [
        _cubic_far(t + 1.0, a),
        _cubic_near(t, a),
        _cubic_near(rest, a),
        _cubic_far(2.0 - t, a),
    ]


def _reached(index: Tensor, side: int, pad: int) -> Tensor:
    """Where a place beside an image of that side is read; -1 for the fill."""
    outside = (index < 0) | (index >= side)
    if pad == EDGE:
        return index.clamp(0, side - 1)
    if pad == REFLECT:
        j = index.abs() % max(2 * (side - 1), 1)
        return torch.where(j >= side, 2 * (side - 1) - j, j)
    if pad == SYMMETRIC:
        j = index % (2 * side)
        return torch.where(j >= side, 2 * side - 1 - j, j)
    return torch.where(outside, -1, index)


# Matrices


def warp(
    image: Tensor,
    values: Values,
    m0: float,
    m1: float,
    m2: float,
    m3: float,
    m4: float,
    m5: float,
    m6: float,
    m7: float,
    m8: float,
    out_height: float,
    out_width: float,
    filter: float,
    *fill: float,
) -> Tensor:
    """The image under a matrix that takes a pixel of the result to a place of the image."""
    matrix = ((m0, m1, m2), (m3, m4, m5), (m6, m7, m8))
    ux, uy = _sources(image, values.exact, matrix, int(out_height), int(out_width))
    near = (ux.abs() < 2.0**30) & (uy.abs() < 2.0**30)
    ux, uy = (torch.where(near, u, 0.0) for u in (ux, uy))
    kind, colour = int(filter), per_channel(fill, image)
    if kind == NEAREST:
        result = _read(image, ux.round(), uy.round(), colour)
    elif kind == FADED:
        result = _faded(image, ux, uy, colour)
    elif kind == BILINEAR:
        result = _bilinear(image, ux, uy, colour)
    else:
        result = _bicubic(image, ux, uy, colour)
    return values.rounded(torch.where(near, result, colour))


def _sources(
    image: Tensor,
    exact: bool,
    matrix: tuple[tuple[float, ...], ...],
    out_height: int,
    out_width: int,
) -> tuple[Tensor, Tensor]:
    """The place of each pixel of the result in the image, as an index of its column and row.

    With `exact` in torchvision's steps, by a matrix to its grid, where the image is from -1 to 1,
    and for an affine one from the centre of the result.
    """
    height, width = image.shape[1:]
    x = torch.arange(out_width, dtype=image.dtype, device=image.device) + 0.5
    y = (torch.arange(out_height, dtype=image.dtype, device=image.device) + 0.5).unsqueeze(1)
    affine = matrix[2] == (0.0, 0.0, 1.0)
    if exact and affine:
        x, y = x - 0.5 * out_width, y - 0.5 * out_height
    u, v, q = ((x * a + y * b) + c for a, b, c in matrix)
    if not affine:
        u, v = u / q, v / q
    if not exact:
        return u - 0.5, v - 0.5
    if not affine:
        u, v = u - 1.0, v - 1.0
    return (u + 1.0) * (0.5 * width) - 0.5, (v + 1.0) * (0.5 * height) - 0.5


def _inside(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = image.shape[1:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _read(image: Tensor, x: Tensor, y: Tensor, fill: Tensor | float) -> Tensor:
    """Pixels of the image at whole places, the fill outside of it."""
    height, width = image.shape[1:]
    row = y.clamp(0, height - 1).to(torch.int64)
    column = x.clamp(0, width - 1).to(torch.int64)
    found = image.flatten(1).index_select(1, (row * width + column).flatten())
    return torch.where(_inside(image, x, y), found.view(-1, *row.shape), fill)


def _bilinear(image: Tensor, ux: Tensor, uy: Tensor, fill: Tensor) -> Tensor:
    x, y = ux.floor(), uy.floor()
    wx, wy = ux - x, uy - y
    top, bottom = (
        _read(image, x, row, fill) * (1.0 - wx) + _read(image, x + 1, row, fill) * wx
        for row in (y, y + 1)
    )
    return top * (1.0 - wy) + bottom * wy


def _faded(image: Tensor, ux: Tensor, uy: Tensor, fill: Tensor) -> Tensor:
    """torchvision's: the share of what is inside weighs twice, in the sum and on it."""
    x, y = ux.floor(), uy.floor()
    wx, wy = ux - x, uy - y
    total = mask = torch.zeros_like(wx)
    for row, by_row in ((y, 1.0 - wy), (y + 1, wy)):
        for column, by_column in ((x, 1.0 - wx), (x + 1, wx)):
            weight = by_row * by_column
            total = total + _read(image, column, row, 0.0) * weight
            mask = mask + torch.where(_inside(image, column, row), weight, 0.0)
    return (total - fill) * mask + fill


def _bicubic(image: Tensor, ux: Tensor, uy: Tensor, fill: Tensor) -> Tensor:
    x, y = ux.floor(), uy.floor()
    by_column, by_row = _cubic_weights(ux - x), _cubic_weights(uy - y)
    rows = []
    for i in range(-1, 3):
        terms = [_read(image, x + j, y + i, fill) for j in range(-1, 3)]
        rows.append(_in_order(terms, by_column))
    return _in_order(rows, by_row)


def _in_order(terms: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        total = total + term * weight
    return total


# Blurs


def blur(image: Tensor, values: Values, axes: float, radius: float, *weights: float) -> Tensor:
    """Symmetric weights by distance, down the columns and then along the rows."""
    reach = int(radius)
    for dim, alone in ((1, 2), (2, 1)):
        if int(axes) in (0, alone):
            side = image.shape[dim]
            places = torch.arange(side)
            taps = [
                Tap(
                    _reached(places + k, side, REFLECT),
                    torch.full((side,), weights[abs(k)], dtype=image.dtype),
                )
                for k in range(-reach, reach + 1)
            ]
            image = _along(image, taps, dim, per_channel((0.0,), image))
    return values.rounded(image)
