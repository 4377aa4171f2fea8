"""The interpreter of augmentations: each instruction against another formula, in float64; values by
hand; gradients."""

import functools
import math

import pytest
import torch

import reg_kernels
from reg_kernels._augment_program import (
    Axes,
    Filter,
    Flip,
    Op,
    Pad,
    WarpFilter,
    column,
    instruction,
    key_arguments,
)

from augment_formulas import FILL, KEY, KINDS, M, P, noise
from augment_programs import factors, image_of, on_each, run_on
from support import DEVICE

SIZES = ((6, 9), (1, 1), (2, 5), (11, 4))
do = instruction


def inputs(height, width, bound):
    x = image_of(height, width, seed=4).double()
    # Away from where functions jump.
    return (x + 0.3) / 256 if bound == 1.0 else x


def sizes_of(name):
    least = KINDS[name][2]
    if least == 9:
        return [(6, 9)]
    return [size for size in SIZES if min(size) >= least]


@functools.cache
def expected_of(name, height, width, bound):
    return KINDS[name][1](inputs(height, width, bound), bound).double()


@pytest.mark.parametrize("name", KINDS)
def test_each_instruction_in_float64(name):
    """The reference alone computes in it: the formula to its last bits."""
    rows = torch.tensor(KINDS[name][0](1.0)).tolist()  # an instruction's numbers are of float32
    for height, width in sizes_of(name):
        expected = expected_of(name, height, width, 1.0)
        for channels_last in (False, True):
            image = inputs(height, width, 1.0)
            y = run_on(image, *rows, size=expected.shape[1:], channels_last=channels_last)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=3e-7)


@on_each
@pytest.mark.parametrize("name", KINDS)
def test_each_instruction(name, backend):
    few = backend == "triton" and DEVICE == "cpu"  # its interpreter takes long
    # A value may lie on either side of a step of a table.
    allowed = 0.05 if "POSTERIZE" in name else 0.0
    for bound, dtype in ((1.0, torch.float32), (255.0, torch.uint8)):
        for height, width in sizes_of(name)[: 1 if few else None]:
            expected = expected_of(name, height, width, bound).to(DEVICE)
            y = run_on(
                inputs(height, width, bound).to(DEVICE, dtype),
                *KINDS[name][0](bound),
                size=expected.shape[1:],
                dtype=torch.float32,
                backend=backend,
            )
            wrong = (y - expected).abs() > 2e-5 * bound
            assert wrong.double().mean() <= allowed, (bound, height, width)


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
    # Of the last level, which is not the most frequent one, (1000 - 100) // 255 = 3 make a step.
    levels = [1] * 600 + [2] * 300 + [3] * 100
    assert of(levels, do(Op.EQUALIZE)) == [0] * 600 + [200] * 300 + [255] * 100
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
def test_noise_on_whole_numbers_is_cut(backend):
    image = image_of(5, 6, seed=4).to(DEVICE)
    row = do(Op.NOISE, 3.0, 40.0, 0, *key_arguments(KEY))
    added = (noise(image) * 40 + 3).trunc()
    expected = (image.cpu() + added).clamp(0, 255)
    y = run_on(image, row, exact=True, backend=backend).cpu()
    assert torch.equal(y, expected.to(torch.uint8))


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
    assert torch.autograd.gradgradcheck(function, image, fast_mode=True)


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


def test_float64_is_the_references_alone():
    with pytest.raises(
        reg_kernels.BackendUnavailable, match="augment: backend 'native' cannot run"
    ):
        run_on(image_of(2, 2), dtype=torch.float64, backend="native")
    assert run_on(image_of(2, 2), dtype=torch.float64).dtype == torch.float64
