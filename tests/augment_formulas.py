"""What each instruction of the op `augment` computes, in another way than its reference: in
float64, pixel by pixel or by torch's own functions of images."""

import colorsys

import torch
from torch.nn import functional as F

from reg_kernels._augment_program import (
    Axes,
    EraseMode,
    Filter,
    Flip,
    Op,
    Pad,
    WarpFilter,
    instruction,
    key_arguments,
)
from reg_kernels.reference._philox import half_words, normals, tag

from augment_programs import factors

KEY = 0xFEDC_BA98_7654_3210
FILL = (0.9, 0.2, 0.6)
do = instruction


# Formulas. Each takes an image (C, H, W) of float64 and its largest value.


def on_pixels(function):
    """Of a function of a pixel's three numbers in [0, 1]."""

    def formula(image, bound):
        pixels = (image / bound).flatten(1).T.tolist()
        values = torch.tensor([function(*pixel) for pixel in pixels], dtype=torch.float64)
        return bound * values.T.reshape(image.shape)

    return formula


def luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


def cut(x):
    return min(max(x, 0.0), 1.0)


def turned(shift):
    def pixel(r, g, b):
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)

    return on_pixels(pixel)


def each(function):
    return on_pixels(lambda *pixel: [function(v) for v in pixel])


def towards(factor, target):
    """Away from a target image."""

    def formula(image, bound):
        other = target(image, bound)
        return (other + factor * (image - other)).clamp(0, bound)

    return formula


gray = on_pixels(lambda r, g, b: [luma(r, g, b)] * 3)


def mean_gray(image, bound):
    return torch.full_like(image, gray(image, bound)[0].mean().item())


def smoothed(image, bound):
    if min(image.shape[1:]) <= 2:
        return image
    kernel = torch.ones(3, 3, dtype=torch.float64)
    kernel[1, 1] = 5
    result = image.clone()
    inner = F.conv2d(image.unsqueeze(1), kernel.view(1, 1, 3, 3) / 13)
    result[:, 1:-1, 1:-1] = inner.squeeze(1)
    return result


def stretched(image, bound):
    rows = []
    for channel in image:
        low, high = channel.min(), channel.max()
        rows.append(channel if low == high else (channel - low) / (high - low) * bound)
    return torch.stack(rows)


def equalized(image, bound):
    """As Pillow's ImageOps.equalize."""
    rows = []
    for channel in image:
        values = [round(v) for v in (channel * (255 / bound)).flatten().tolist()]
        counts = [values.count(k) for k in range(256)]
        filled = [count for count in counts if count]
        step = (len(values) - filled[-1]) // 255
        if not step:
            rows.append(channel)
            continue
        table, n = [], step // 2
        for count in counts:
            table.append(min(n // step, 255))
            n += count
        rows.append(torch.tensor([table[v] for v in values]).view(channel.shape) * (bound / 255))
    return torch.stack(rows).double()


def posterized(bits):
    def formula(image, bound):
        levels = 2**bits
        if bound == 1.0:
            return (image * levels).floor().clamp(max=levels - 1) / levels
        return image - image % (256 / levels)

    return formula


def bounced(index, side, pad):
    """Where a walk of so many steps from 0 ends, that turns round at the borders."""
    place, way = 0, 1 if index > 0 else -1
    for _ in range(abs(index)):
        if not 0 <= place + way < side:
            way = -way
            if pad == Pad.REFLECT:
                place += way if side > 1 else 0
        else:
            place += way
    return place


def region(image, top, left, height, width, pad):
    """The pixels of a region, one by one."""
    h, w = image.shape[1:]
    result = torch.empty(len(image), height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            row, column = top + y, left + x
            if pad == Pad.EDGE:
                row, column = min(max(row, 0), h - 1), min(max(column, 0), w - 1)
            elif pad in (Pad.REFLECT, Pad.SYMMETRIC):
                row, column = bounced(row, h, pad), bounced(column, w, pad)
            inside = 0 <= row < h and 0 <= column < w
            result[:, y, x] = image[:, row, column] if inside else torch.tensor(FILL)
    return result


MODES = {
    Filter.NEAREST: {"mode": "nearest"},
    Filter.NEAREST_EXACT: {"mode": "nearest-exact"},
    Filter.BILINEAR: {"mode": "bilinear"},
    Filter.BICUBIC: {"mode": "bicubic"},
    Filter.BILINEAR_ANTIALIAS: {"mode": "bilinear", "antialias": True},
    Filter.BICUBIC_ANTIALIAS: {"mode": "bicubic", "antialias": True},
}


def boxed(top, left, height, width, out_height, out_width, flips, filter, pad):
    """As torch resizes, axis by axis: of a side that stays it copies."""

    def formula(image, bound):
        x = region(image, top, left, height, width, pad)[None]
        for size in ((out_height, width), (out_height, out_width)):
            if x.shape[2:] != size:
                x = F.interpolate(x, size, **MODES[filter])
        axes = [d for d, flip in ((2, Flip.UP_DOWN), (3, Flip.LEFT_RIGHT)) if flips & flip]
        x = x.flip(axes)[0]
        return x if bound == 1.0 else x.clamp(0, bound)

    return formula


def warped(matrix, height, width, filter):
    """As grid_sample has it, of the difference to the fill."""

    def formula(image, bound):
        h, w = image.shape[1:]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        points = torch.stack((x, y, torch.ones_like(x)), -1).double()
        u, v, q = (points @ torch.tensor(matrix).double().view(3, 3).T).unbind(-1)
        grid = torch.stack((2 * u / q / w - 1, 2 * v / q / h - 1), -1)[None]
        mode = {0: "nearest", 1: "bilinear", 2: "bilinear", 3: "bicubic"}[int(filter)]
        fill = torch.tensor(FILL, dtype=torch.float64).view(3, 1, 1)

        def sampled(x):
            return F.grid_sample(x[None], grid, mode, align_corners=False)[0]

        if filter == WarpFilter.BILINEAR_FADED:
            share = sampled(torch.ones_like(image))
            return (sampled(image) - fill) * share + fill
        result = sampled(image - fill) + fill
        return result if bound == 1.0 else result.clamp(0, bound)

    return formula


def blurred(weights, axes):
    def formula(image, bound):
        reach = len(weights) - 1
        line = torch.tensor([weights[abs(k)] for k in range(-reach, reach + 1)]).double()
        x = image.unsqueeze(1)
        if axes != Axes.HORIZONTAL:
            x = F.conv2d(F.pad(x, (0, 0, reach, reach), "reflect"), line.view(1, 1, -1, 1))
        if axes != Axes.VERTICAL:
            x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "reflect"), line.view(1, 1, 1, -1))
        return x.squeeze(1) if bound == 1.0 else x.squeeze(1).clamp(0, bound)

    return formula


def state(key):
    return torch.tensor([key - 2**64 if key >= 2**63 else key, 0])


def noise(image):
    return normals(state(KEY), tag("augment1"), 0, image.numel()).view(image.shape).double()


def impulses(image, bound):
    """0.3 of them: a third salt."""
    drawn = half_words(state(KEY), tag("augment1"), 0, image.numel()).view(image.shape)
    result = torch.where(drawn < 0.3 * 65536, 0.0, image)
    return torch.where(drawn < 0.1 * 65536, bound, result)


def erased(image, bound):
    result = image.clone()
    result[:, 1:3, 2:6] = noise(image)[:, 1:3, 2:6]
    return result


def mixed(image, bound):
    inverted = bound - image
    return (0.3 * image + 0.5 * inverted + 0.2 * image.flip(2)).clamp(0, bound)


M = (0.83, -0.21, 0.43, 0.34, 1.13, -0.37, 0.0, 0.0, 1.0)
P = (1.21, 0.13, -0.65, -0.22, 0.81, 0.97, 0.021, -0.033, 1.0)

# name -> (instructions for an image's largest value, formula, least side)
KINDS = {
    "NONE": (lambda b: [do(Op.NONE)], lambda x, b: x, 1),
    "BRIGHTNESS": (lambda b: [do(Op.BRIGHTNESS, 1.3)], each(lambda v: cut(1.3 * v)), 1),
    "CONTRAST": (lambda b: [factors(Op.CONTRAST, 1.7)], towards(1.7, mean_gray), 1),
    "less CONTRAST": (lambda b: [factors(Op.CONTRAST, 0.2)], towards(0.2, mean_gray), 1),
    "SATURATION": (lambda b: [factors(Op.SATURATION, 1.6)], towards(1.6, gray), 1),
    "HUE": (lambda b: [do(Op.HUE, 0.21)], turned(0.21), 1),
    "HUE back": (lambda b: [do(Op.HUE, -0.37)], turned(-0.37), 1),
    "GRAYSCALE": (lambda b: [do(Op.GRAYSCALE)], gray, 1),
    "INVERT": (lambda b: [do(Op.INVERT)], each(lambda v: 1 - v), 1),
    "SOLARIZE": (
        lambda b: [do(Op.SOLARIZE, 0.6 * b)],
        each(lambda v: 1 - v if v >= 0.6 else v),
        1,
    ),
    "SOLARIZE_ADD": (
        lambda b: [do(Op.SOLARIZE_ADD, 0.6 * b, 0.5 * b)],
        each(lambda v: min(v + 0.5, 1) if v < 0.6 else v),
        1,
    ),
    **{
        f"POSTERIZE {bits}": (lambda b, k=bits: [do(Op.POSTERIZE, k)], posterized(bits), 1)
        for bits in (0, 3, 8)
    },
    "AUTOCONTRAST": (lambda b: [do(Op.AUTOCONTRAST)], stretched, 1),
    "EQUALIZE": (lambda b: [do(Op.EQUALIZE)], equalized, 1),
    "SHARPNESS": (lambda b: [factors(Op.SHARPNESS, 1.8)], towards(1.8, smoothed), 1),
    "PERMUTE": (lambda b: [do(Op.PERMUTE, 2, 0, 0)], lambda x, b: x[[2, 0, 0]], 1),
    "NORMALIZE": (
        lambda b: [do(Op.NORMALIZE, 2 / b, 3 / b, 4 / b, 0, -1, 0, 0.5)],
        lambda x, b: (
            x / b * torch.tensor([2.0, 3, 4]).view(3, 1, 1)
            + torch.tensor([-1, 0, 0.5]).view(3, 1, 1)
        ),
        1,
    ),
    "NOISE": (
        lambda b: [do(Op.NOISE, 0.1 * b, 0.25 * b, 0, *key_arguments(KEY))],
        lambda x, b: x + (0.1 + 0.25 * noise(x)) * b,
        1,
    ),
    "clipped NOISE": (
        lambda b: [do(Op.NOISE, 0.1 * b, 0.25 * b, 1, *key_arguments(KEY))],
        lambda x, b: (x + (0.1 + 0.25 * noise(x)) * b).clamp(0, b),
        1,
    ),
    "SALT_AND_PEPPER": (
        lambda b: [do(Op.SALT_AND_PEPPER, 0.3, 1 / 3, *key_arguments(KEY))],
        impulses,
        1,
    ),
    "ERASE": (
        lambda b: [do(Op.ERASE, 1, 2, 2, 4, EraseMode.NORMAL, 0, 0, 0, 0, *key_arguments(KEY))],
        erased,
        6,
    ),
    "SAVE, JOIN and MIX": (
        lambda b: [
            do(Op.SAVE, 0.3),
            do(Op.INVERT),
            do(Op.JOIN, 0.5),
            do(Op.BOX, 0, 0, 6, 9, 6, 9, Flip.LEFT_RIGHT),
            do(Op.JOIN, 0.2),
            do(Op.MIX),
        ],
        mixed,
        6,
    ),
    **{
        f"BLUR {axes.name}": (
            lambda b, axes=axes: [do(Op.BLUR, axes, 2, 0.4, 0.2, 0.1)],
            blurred((0.4, 0.2, 0.1), axes),
            4,
        )
        for axes in Axes
    },
}
BOXES = (
    (0, 0, 6, 9, 4, 5, 0, Pad.NONE),
    (1, 2, 3, 4, 7, 11, 1, Pad.NONE),
    (-2, -1, 5, 7, 3, 7, 2, Pad.CONSTANT),
    (2, 3, 9, 12, 9, 5, 3, Pad.EDGE),
    (-13, -3, 9, 30, 4, 8, 3, Pad.REFLECT),
    (-8, 5, 20, 25, 20, 25, 0, Pad.SYMMETRIC),
)
for f in Filter:
    for number, (*where, pad) in enumerate(BOXES):
        least = 9 if pad == Pad.NONE else 1
        KINDS[f"BOX {f.name} {number}"] = (
            lambda b, where=where, f=f, pad=pad: [do(Op.BOX, *where, f, pad, *FILL)],
            boxed(*where, f, pad),
            least,
        )
for f in WarpFilter:
    for word, matrix in (("affine", M), ("projective", P)):
        KINDS[f"WARP {f.name} {word}"] = (
            lambda b, matrix=matrix, f=f: [do(Op.WARP, *matrix, 5, 7, f, *FILL)],
            warped(matrix, 5, 7, f),
            1,
        )
