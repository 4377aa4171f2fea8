"""The interpreter of augmentations: each instruction against another formula, in float64; values by
hand; programs that are refused."""

import colorsys
import math
import re

import pytest
import torch
from augment_programs import factors, image_of, run_on
from torch.nn import functional as F

import reg_kernels
from reg_kernels import backends
from reg_kernels._augment_program import (
    ARGUMENTS,
    RANGES,
    WIDTH,
    Axes,
    EraseMode,
    Filter,
    Flip,
    Op,
    Pad,
    WarpFilter,
    column,
    instruction,
    key_arguments,
)
from reg_kernels.ops.augment import run
from reg_kernels.reference._philox import half_words, normals, tag

from support import DEVICE

SIZES = ((6, 9), (1, 1), (2, 5), (11, 4))
KEY = 0xFEDC_BA98_7654_3210
FILL = (0.9, 0.2, 0.6)
do = instruction


def parameters():
    """The implementations as parameters; float64 is the reference's."""
    found = []
    for name in backends.NAMES:
        why = backends.why_not_op("augment", name, DEVICE, torch.float32)
        marks = [] if why is None else [pytest.mark.skip(reason=f"{name}: {why}")]
        found.append(pytest.param(name, marks=marks))
    return found


on_each = pytest.mark.parametrize("backend", parameters())


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


def inputs(height, width, bound):
    x = image_of(height, width, seed=4).double()
    # Away from where functions jump.
    return (x + 0.3) / 256 if bound == 1.0 else x


def sizes_of(name):
    least = KINDS[name][2]
    if least == 9:
        return [(6, 9)]
    return [size for size in SIZES if min(size) >= least]


@pytest.mark.parametrize("name", KINDS)
def test_each_instruction_in_float64(name):
    """The reference alone computes in it: the formula to its last bits."""
    program, formula, _ = KINDS[name]
    for height, width in sizes_of(name):
        for channels_last in (False, True):
            image = inputs(height, width, 1.0)
            rows = as_floats(program(1.0))
            expected = formula(image, 1.0)
            y = run_on(image, *rows, size=expected.shape[1:], channels_last=channels_last)
            # An instruction's numbers are of float32.
            torch.testing.assert_close(y, expected.double(), rtol=1e-6, atol=3e-7)


def as_floats(rows):
    return torch.tensor(rows).tolist()


@on_each
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bound", [1.0, 255.0])
def test_each_instruction(name, bound, backend):
    program, formula, _ = KINDS[name]
    for height, width in sizes_of(name):
        image = inputs(height, width, bound)
        expected = formula(image, bound).to(DEVICE)
        pixels = image.to(torch.float32 if bound == 1.0 else torch.uint8).to(DEVICE)
        y = run_on(
            pixels,
            *program(bound),
            size=expected.shape[1:],
            dtype=torch.float32,
            backend=backend,
        )
        wrong = (y - expected).abs() > 2e-5 * bound
        # A value may lie on either side of a step: of a table, a level, half a pixel.
        assert wrong.double().mean() <= (0.05 if "POSTERIZE" in name else 0.0), (height, width)


# Values by hand


def one(values, *rows, exact=True, dtype=None, **options):
    """Of one row of gray pixels."""
    image = torch.tensor(values, device=DEVICE)
    image = image.to(torch.uint8) if image.dtype == torch.int64 else image
    size = options.pop("size", (1, len(values)))
    return (
        run_on(image.view(1, 1, -1), *rows, exact=exact, size=size, dtype=dtype, **options)
        .flatten()
        .tolist()
    )


@on_each
def test_values_by_hand(backend):
    def of(values, *rows, **options):
        return one(values, *rows, backend=backend, **options)

    # torchvision truncates.
    assert of([10, 255, 3], do(Op.BRIGHTNESS, 0.55)) == [5, 140, 1]
    assert of([10, 255, 3], do(Op.BRIGHTNESS, 0.55), exact=False) == [6, 140, 2]
    assert of([0, 100, 200], factors(Op.CONTRAST, 0.5)) == [50, 100, 150]
    assert of([0, 127, 128, 255], do(Op.SOLARIZE, 128)) == [0, 127, 127, 0]
    assert of([0, 127, 128, 255], do(Op.SOLARIZE_ADD, 128, 200)) == [200, 255, 128, 255]
    assert of([0, 127, 128, 255], do(Op.POSTERIZE, 1)) == [0, 0, 128, 128]
    assert of([7, 7, 7], do(Op.AUTOCONTRAST)) == [7, 7, 7]
    assert of([50, 60, 90], do(Op.AUTOCONTRAST)) == [0, 63, 254]  # of 254.99998, as theirs
    assert of([50, 60, 90], do(Op.EQUALIZE)) == [50, 60, 90]  # fewer than 255 pixels
    assert of([1, 2] * 255, do(Op.EQUALIZE)) == [0, 255] * 255
    # Two to one, and to four.
    assert of([10, 20], do(Op.BOX, 0, 0, 1, 2, 1, 1, 0, Filter.BILINEAR), size=(1, 1)) == [15]
    halves = do(Op.BOX, 0, 0, 1, 2, 1, 4, 0, Filter.BILINEAR)
    assert of([10, 50], halves, size=(1, 4)) == [10, 20, 40, 50]
    nearest = do(Op.BOX, 0, 0, 1, 3, 1, 5, Flip.LEFT_RIGHT, Filter.NEAREST)
    assert of([1, 2, 3], nearest, size=(1, 5)) == [3, 2, 2, 1, 1]
    padded = do(Op.BOX, 0, -2, 1, 7, 1, 7, 0, 0, Pad.REFLECT)
    assert of([1, 2, 3], padded, size=(1, 7)) == [3, 2, 1, 2, 3, 2, 1]
    padded[column(Op.BOX, "pad")] = Pad.SYMMETRIC
    assert of([1, 2, 3], padded, size=(1, 7)) == [2, 1, 1, 2, 3, 3, 2]
    blur = do(Op.BLUR, Axes.HORIZONTAL, 1, 0.5, 0.25)
    assert of([0, 100, 200, 0], blur) == [50, 100, 125, 100]
    assert of([9, 9, 9, 9], do(Op.ERASE, 0, 1, 1, 2, 0, 77)) == [9, 77, 77, 9]
    # Halves are rounded to even.
    assert of([1, 3, 5], do(Op.NORMALIZE, 0.5), exact=False) == [0, 2, 2]
    normal = do(Op.NORMALIZE, 2.0, 0, 0, 0, -1.0)
    assert of([0.0, 0.5, 1.0], normal, exact=False) == [-1.0, 0.0, 1.0]
    saved = [do(Op.SAVE, 0.5), do(Op.INVERT), do(Op.JOIN, 0.25), do(Op.MIX)]
    assert of([0, 100], *saved) == [63, 88]


@on_each
def test_hue_by_hand(backend):
    """Red, green, blue, gray and black by a third of a turn."""
    image = torch.tensor(
        [[255, 0, 0, 90, 0], [0, 255, 0, 90, 0], [0, 0, 255, 90, 0]], device=DEVICE
    ).to(torch.uint8)
    y = run_on(image.view(3, 1, 5), do(Op.HUE, 1 / 3), exact=True, backend=backend).view(3, 5)
    assert y.tolist() == [[0, 0, 255, 90, 0], [255, 0, 0, 90, 0], [0, 255, 0, 90, 0]]


@on_each
def test_what_is_no_number_and_what_is_infinite(backend):
    nan, inf = math.nan, math.inf
    image = torch.tensor([nan, 0.25, 0.5, 0.75], device=DEVICE).expand(3, 1, 4)

    def of(*rows, **options):
        return run_on(image, *rows, backend=backend, **options)[0, 0].tolist()

    for row in (do(Op.BRIGHTNESS, 2.0), do(Op.INVERT), do(Op.HUE, 0.3), do(Op.GRAYSCALE)):
        y = of(row)
        assert math.isnan(y[0])
        assert not any(map(math.isnan, y[1:]))
    assert math.isnan(of(do(Op.AUTOCONTRAST))[0])
    assert of(do(Op.AUTOCONTRAST))[1:] == [0.0, 0.5, 1.0]
    mean = (0.25 + 0.5 + 0.75) / 4 * 0.9999
    assert of(do(Op.CONTRAST, 0.0, 1.0))[1:] == pytest.approx([mean] * 3, abs=1e-5)
    assert of(dtype=torch.uint8)[0] == 0
    bytes_ = run_on(
        torch.tensor([[[-inf, inf, 300.4, -3.0]]], device=DEVICE),
        dtype=torch.uint8,
        backend=backend,
    )
    assert bytes_.flatten().tolist() == [0, 255, 255, 0]


@on_each
def test_a_place_that_no_integer_holds_is_the_fill(backend):
    image = torch.rand(3, 3, 3, device=DEVICE)
    for filter in WarpFilter:
        for m in ((1e20, 0, 0), (1e9, 0, 3e9), (3e38, 3e38, 0)):
            row = do(Op.WARP, *m, 0, 1, 0, 0, 0, 1, 3, 3, filter, *FILL)
            y = run_on(image, row, backend=backend).flatten(1)
            assert torch.equal(y, torch.tensor(FILL, device=DEVICE).view(3, 1).expand(3, 9))


@on_each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
def test_one_rounding_at_the_store(dtype, backend):
    image = image_of(7, 9, seed=5).to(DEVICE)
    rows = [do(Op.BRIGHTNESS, 0.7), factors(Op.SATURATION, 1.4)]
    exact = run_on(image, *rows, dtype=torch.float32, backend=backend)
    y = run_on(image, *rows, dtype=dtype, backend=backend)
    assert torch.equal(y, exact.round().to(dtype) if dtype == torch.uint8 else exact.to(dtype))


# Gradients


@pytest.mark.parametrize(
    "rows",
    [
        [do(Op.BOX, 0, 0, 3, 4, 2, 3, 1, Filter.BICUBIC_ANTIALIAS)],
        [do(Op.BOX, -1, 0, 4, 4, 2, 3, 0, Filter.BILINEAR, Pad.REFLECT)],
        [do(Op.WARP, *M, 2, 3, WarpFilter.BILINEAR, *FILL)],
        [do(Op.WARP, *P, 2, 3, WarpFilter.BICUBIC, *FILL)],
        [
            do(Op.BRIGHTNESS, 0.9),
            factors(Op.CONTRAST, 0.7),
            factors(Op.SATURATION, 0.8),
            do(Op.HUE, 0.1),
            factors(Op.SHARPNESS, 1.1),
            do(Op.BLUR, 0, 1, 0.6, 0.2),
            do(Op.NORMALIZE, 1.5, 2.0, 2.5),
            do(Op.BOX, 0, 0, 3, 4, 2, 3, 0, Filter.BILINEAR_ANTIALIAS),
        ],
    ],
    ids=["box", "padded", "warp", "projective", "colours"],
)
def test_gradcheck_of_both_orders(rows):
    image = (0.2 + 0.6 * torch.rand(3, 3, 4, dtype=torch.float64)).requires_grad_()

    def function(image):
        return run_on(image, *rows, size=(2, 3))

    assert torch.autograd.gradcheck(function, image)
    assert torch.autograd.gradgradcheck(function, image)


@on_each
def test_the_gradient_of_halves_is_that_of_the_reference(backend):
    x = torch.rand(3, 6, 5, device=DEVICE).half().requires_grad_()
    rows = [do(Op.BRIGHTNESS, 0.9), factors(Op.CONTRAST, 0.7), do(Op.BLUR, 0, 2, 0.4, 0.2, 0.1)]
    found = []
    for name in (backend, "reference"):
        y = run_on(x, *rows, channels_last=True, backend=name)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert found[0].dtype == torch.float16
    assert torch.equal(*found)


# What is refused

GOOD = do(Op.BOX, 0, 0, 5, 6, 4, 4, 0, Filter.BILINEAR)


def changed(op, **named):
    """A valid instruction of an op with other arguments."""
    valid = {
        Op.BOX: do(Op.BOX, 0, 0, 5, 6, 5, 6),
        Op.WARP: do(Op.WARP, 1, 0, 0, 0, 1, 0, 0, 0, 1, 5, 6),
    }
    row = list(valid.get(op, do(op)))
    for name, value in named.items():
        row[column(op, name)] = value
    return row


def refusals():
    """(row, what is said of it): outside of each range on both sides, and between whole numbers."""
    for (op, name), allowed in RANGES.items():
        values = [allowed.lowest - 1, *allowed.but]
        values += [allowed.highest + 1] if allowed.highest < math.inf else []
        values += [allowed.lowest + 0.5] if allowed.whole else []
        for value in values:
            got = f"{op.name} with {name} {allowed}, got {name} {value:g} in instruction 1 of"
            yield changed(op, **{name: value}), got
    for op in Op:
        for name in ARGUMENTS[op][:1]:
            yield changed(op, **{name: math.nan}), "of finite numbers"
            yield changed(op, **{name: -math.inf}), "of finite numbers"
    for code in (-1.0, 24.0, 2.5, 1e30):
        row = [code] + [0.0] * (WIDTH - 1)
        yield row, f"of opcodes from 0 to 23, got {code:g} in instruction 1 of sample 0"
    for region in ((-1, 0, 5, 6), (0, -1, 5, 6), (0, 0, 6, 6), (0, 0, 5, 7), (5, 0, 1, 1)):
        yield do(Op.BOX, *region, 5, 6), "BOX of a region inside of the image, or a pad, got"
        if min(region) >= 0:
            yield do(Op.ERASE, *region), "ERASE of a region inside of the image, got ERASE in"
    yield do(Op.BLUR, Axes.BOTH, 5), "BLUR with a radius below the image's sides, got BLUR in"
    yield do(Op.BLUR, Axes.VERTICAL, 5), "BLUR with a radius below"
    yield do(Op.BLUR, Axes.HORIZONTAL, 6), "BLUR with a radius below"
    yield do(Op.JOIN, 1), "JOIN and MIX between a SAVE and its MIX alone, got JOIN in"
    yield do(Op.MIX), "JOIN and MIX between a SAVE and its MIX alone, got MIX in"
    yield do(Op.BOX, 0, 0, 5, 6, 5, 7), "such that images of (5, 6) result, got (5, 7) for"


def refused(message, backend="reference", **changes):
    given = {
        "pixels": torch.rand(2 * 90, device=DEVICE),
        "images": torch.tensor([[0, 5, 6], [90, 5, 6]]),
        "program": torch.zeros(2, 1, WIDTH),
        "channels": 3,
        "channels_last": False,
        "height": 5,
        "width": 6,
        "dtype": torch.float32,
        "result_channels_last": False,
        "exact": False,
    } | changes
    before = given["pixels"].clone() if isinstance(given["pixels"], torch.Tensor) else None
    with pytest.raises(RuntimeError, match=f"^augment: {message}") as caught:
        run(*given.values(), backend=backend)
    assert "\n" not in str(caught.value)
    assert torch.equal(given["pixels"], before)


@on_each
def test_programs_that_are_refused(backend):
    for row, message in refusals():
        program = torch.tensor([[do(Op.NONE), row], [do(Op.NONE), do(Op.NONE)]])
        refused(f"program must be {re.escape(message)}", backend, program=program)


@on_each
def test_sizes_that_change_between_save_and_mix_are_refused(backend):
    rows = [do(Op.SAVE, 1), do(Op.BOX, 0, 0, 5, 6, 4, 6), do(Op.BOX, 0, 0, 4, 6, 5, 6), do(Op.MIX)]
    message = "program must be a size that stays between a SAVE and its MIX, got BOX in instruction"
    refused(f"{message} 1 of sample 1", backend, program=torch.tensor([[do(Op.NONE)] * 4, rows]))


@on_each
@pytest.mark.parametrize(
    ("op", "channels", "counts"),
    [
        (Op.CONTRAST, (2, 4), "1 or 3"),
        *((op, (1, 2, 4), "3") for op in (Op.SATURATION, Op.HUE, Op.GRAYSCALE, Op.PERMUTE)),
    ],
)
def test_other_channels_than_an_instruction_has(op, channels, counts, backend):
    for count in channels:
        refused(
            f"program must be {op.name} only for {counts} channels, not {count}, got {op.name} in",
            backend,
            channels=count,
            pixels=torch.rand(400, device=DEVICE),
            program=torch.tensor([[do(op)], [do(Op.NONE)]]),
        )


@on_each
def test_arguments_that_are_refused(backend):
    def check(message, **changes):
        refused(message, backend, **changes)

    for images in ([-1, 5, 6], [91, 5, 6], [0, 0, 6], [0, 5, 65536], [2**62, 5, 6], [0, 5, -6]):
        message = r"images must be \(offset, height, width\) with sides in \[1, 65535\] of images"
        check(message, images=torch.tensor([[0, 5, 6], images]))
    check("images must be contiguous int64 of shape", images=torch.zeros(2, 3))
    check("images must be contiguous int64 of shape", images=torch.zeros(6, dtype=torch.int64))
    check("program must be contiguous float32 of shape", program=torch.zeros(2, 1, 15))
    check("program must be contiguous float32", program=torch.zeros(2, 1, WIDTH).double())
    check("program must be of as many samples as images, 2, got 3", program=torch.zeros(3, 1, 16))
    check("pixels must be one contiguous dimension", pixels=torch.rand(2, 90, device=DEVICE))
    check("pixels must be one contiguous dimension", pixels=torch.rand(360, device=DEVICE)[::2])
    check("pixels must be one of", pixels=torch.zeros(180, dtype=torch.int16, device=DEVICE))
    check("dtype must be one of", dtype=torch.int8)
    check(r"channels must be in \[1, 4\], got 5", channels=5)
    check(r"height must be in \[1, 65535\], got 0", height=0)
    check(r"width must be in \[1, 65535\], got 65536", width=65536)
    check("exact must be false but for pixels of uint8, got float32", exact=True)
    check(r"program must be such that images of \(4, 6\) result", height=4)
    check(r"program must be such that images of \(4, 6\)", height=4, program=torch.zeros(2, 0, 16))


def test_float64_is_the_references_alone():
    with pytest.raises(
        reg_kernels.BackendUnavailable, match="augment: backend 'native' cannot run"
    ):
        run_on(image_of(2, 2), dtype=torch.float64, backend="native")
    assert run_on(image_of(2, 2), dtype=torch.float64).dtype == torch.float64
