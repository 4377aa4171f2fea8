"""Augmentation's Triton kernels: what its cases do not come to by themselves. Tiles that end in a
row, programs of many segments, statistics of several tiles, and how the host cuts programs."""

import random

import pytest
import torch

from reg_kernels._augment_program import (
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
from reg_kernels.reference import augment as reference

from support import DEVICE

pytest.importorskip("triton")

from reg_kernels.triton import _augment_plan as plans
from reg_kernels.triton import augment as kernels

SIZES = ((5, 7), (9, 3), (1, 1))
do = instruction


def packed(programs):
    steps = max(map(len, programs))
    empty = do(Op.NONE)
    rows = [[*program, *[empty] * (steps - len(program))] for program in programs]
    return torch.tensor(rows).view(len(programs), steps, WIDTH)


def placed(sizes, channels):
    """(images, how many pixels there are): side by side, with a pixel between."""
    images, end = [], 1
    for height, width in sizes:
        images.append((end, height, width))
        end += channels * height * width + 1
    return torch.tensor(images), end


def check(
    programs,
    sizes=SIZES,
    size=(4, 5),
    *,
    channels=3,
    source=torch.uint8,
    dtype=torch.float32,
    last_in=False,
    last_out=False,
    exact=False,
):
    """The same bits as the reference's, NaN for NaN."""
    images, count = placed(sizes, channels)
    x = torch.rand(count)
    x = ((255 * x).round() if source == torch.uint8 else x).to(DEVICE, source)
    arguments = (images, packed(programs), channels, last_in, *size, dtype, last_out, exact)
    y, expected = kernels.augment(x, *arguments), reference.augment(x, *arguments)
    assert y.dtype == expected.dtype and y.stride() == expected.stride()
    different = ~(y == expected) & ~((y != y) & (expected != expected))
    assert not different.any(), different.nonzero().tolist()


def whole(size, out, filter=Filter.BILINEAR):
    return do(Op.BOX, 0, 0, *size, *out, 0, filter)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of which some images have two, that end within a row."""
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(kernels, "TAPS_BLOCK", 4)


# Values


def drawn(r, size, channels, bound, exact):
    """A program of every kind of instruction, which ends with an image of (4, 5)."""
    f, level, key = r.uniform(0, 2), r.uniform(0, bound), key_arguments(r.getrandbits(64))
    fill = [r.uniform(0, bound) for _ in range(4)]

    def box(size, out):
        h, w = size
        region = (r.randint(-4, 3), r.randint(-4, 3), r.randint(1, h + 5), r.randint(1, w + 5))
        pad = r.choice(list(Pad)[1:])
        filter = r.choice(list(Filter))
        return do(Op.BOX, *region, *out, r.randrange(4), filter, pad, *fill)

    def warp(size, out):
        matrix = [r.uniform(-1.5, 1.5) for _ in range(6)]
        if exact:
            matrix = [m / (size[1 - k // 3] / 2) for k, m in enumerate(matrix)]
        last = [0, 0, 1] if r.random() < 0.5 else [r.uniform(-0.2, 0.2), r.uniform(-0.2, 0.2), 1]
        return do(Op.WARP, *matrix, *last, *out, r.choice(list(WarpFilter)), *fill[:3])

    def change(h, w):
        reach = min(h, w, 4) - 1
        kinds = [
            do(Op.NONE),
            do(Op.BRIGHTNESS, f),
            do(Op.SOLARIZE, level),
            do(Op.AUTOCONTRAST),
            do(Op.EQUALIZE),
            do(Op.SHARPNESS, f, 1 - f),
            do(Op.BLUR, r.randrange(3), r.randint(0, reach), *fill, *[0.1] * 9),
            do(Op.NOISE, 0.1 * bound, 0.2 * bound, r.randrange(2), *key),
            do(Op.SALT_AND_PEPPER, f / 2, level / bound, *key),
            do(Op.ERASE, 0, w // 2, h, w - w // 2, r.randrange(2), *fill, *key),
        ]
        if channels in (1, 3):
            kinds += [do(Op.CONTRAST, f, 1 - f)] * 2
        if channels == 3:
            kinds += [do(Op.SATURATION, f, 1 - f), do(Op.HUE, f / 2 - 0.5), do(Op.PERMUTE, 2, 0, 1)]
        return r.choice(kinds)

    rows = []
    for _ in range(r.randrange(4)):
        what = r.random()
        if what < 0.4:
            out = (r.randint(1, 7), r.randint(1, 7))
            rows.append((box if what < 0.2 else warp)(size, out))
            size = out
        elif what < 0.6:
            chain = []
            for _ in range(r.randrange(3)):
                chain += [warp(size, size)] * r.randrange(2) + [change(*size)] * r.randrange(2)
                chain.append(do(Op.JOIN, f / 4))
            rows += [do(Op.SAVE, f / 2), *chain, change(*size), do(Op.MIX)]
        else:
            rows.append(change(*size))
    rows.append((box if r.random() < 0.5 else warp)(size, (4, 5)))
    return [*rows, *(change(4, 5) for _ in range(r.randrange(3)))]


@pytest.mark.parametrize("seed", range(6))
def test_random_programs(seed, small_tiles):
    r = random.Random(seed)
    channels, exact = (3, 1, 3, 4, 3, 2)[seed], seed in (0, 1)
    source = torch.float32 if seed in (2, 3) else torch.uint8
    bound = 1.0 if seed in (2, 3) else 255.0
    check(
        [drawn(r, size, channels, bound, exact) for size in SIZES],
        channels=channels,
        source=source,
        last_in=seed % 2 == 0,
        last_out=seed % 3 == 0,
        exact=exact,
    )


def test_a_box_in_two_segments_has_the_same_bits(small_tiles, monkeypatch):
    sizes = ((7, 6), (4, 9), (9, 5))
    boxes = [
        [do(Op.BOX, -3, -2, h + 4, w + 5, 4, 5, n, filter, pad, 9.3, 99.7, 199.9)]
        for n, ((h, w), pad, filter) in enumerate(
            zip(
                sizes,
                (Pad.CONSTANT, Pad.REFLECT, Pad.CONSTANT),
                (Filter.BILINEAR_ANTIALIAS, Filter.BICUBIC_ANTIALIAS, Filter.BICUBIC),
                strict=True,
            )
        )
    ]
    check(boxes, sizes)
    monkeypatch.setattr(plans, "MOST_TAPS", 4)
    check(boxes, sizes)
    assert len(plans.plan_for(placed(sizes, 3)[0], packed(boxes), 3, 60).launches) == 2


def test_what_is_not_finite_weighs_only_where_it_is(small_tiles):
    """A tap that others have and this place has not, is none: not one of weight 0."""
    x = torch.full((35,), 0.5)
    x[12], x[30] = torch.inf, torch.nan
    images = torch.tensor([[0, 5, 7]] * 4)
    programs = packed(
        [
            [whole((5, 7), (3, 4), Filter.BICUBIC_ANTIALIAS)],
            [whole((5, 7), (3, 4), Filter.BILINEAR_ANTIALIAS)],
            [do(Op.AUTOCONTRAST), do(Op.BOX, 1, 2, 3, 4, 3, 4)],
            [do(Op.CONTRAST, 0.5, 0.5), do(Op.BOX, 1, 2, 3, 4, 3, 4)],
        ]
    )
    arguments = (images, programs, 1, False, 3, 4, torch.float32, False, False)
    y = kernels.augment(x.to(DEVICE), *arguments)
    torch.testing.assert_close(
        y, reference.augment(x.to(DEVICE), *arguments), rtol=0, atol=0, equal_nan=True
    )


def test_images_past_32_bits(small_tiles, monkeypatch):
    """Counted in int64, as one of 2^31 elements is."""
    form = kernels.AugmentForm
    monkeypatch.setattr(kernels, "AugmentForm", lambda **k: form(**k)._replace(WIDE=True))
    key = key_arguments(3)
    rows = [
        do(Op.NOISE, 0, 9, 1, *key),
        do(Op.EQUALIZE),
        do(Op.ERASE, 1, 1, 2, 3, 1, *[0] * 4, *key),
    ]
    check(
        [[whole(size, (5, 7)), *rows] for size in SIZES], size=(5, 7), last_in=True, last_out=True
    )


@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
def test_statistics_of_several_tiles(source):
    """Equalising changes nothing of fewer than 255 pixels."""
    size = (19, 31)
    programs = [[do(op)] for op in (Op.EQUALIZE, Op.AUTOCONTRAST)]
    check([*programs, [GRAY]], [size] * 3, size, source=source, channels=1)


def test_what_is_saved_anew_is_read_meanwhile(small_tiles):
    size = (5, 7)
    move = do(Op.WARP, 1, 0, 0, 0, 1, -2, 0, 0, 1, *size, WarpFilter.NEAREST)
    again = [do(Op.SAVE, 0.5), do(Op.JOIN, 0.25), move]
    check(
        [[*again, *again, do(Op.SAVE, 0.5), do(Op.MIX)]],
        [size],
        size,
    )


# Plans


def plan_of(*rows, size=(6, 8)):
    images = torch.tensor([[0, *size]])
    return plans.plan_for(images, packed([list(rows)]), 3, 0)


CROP = do(Op.BOX, 1, 1, 4, 4, 4, 4)
SHEAR = do(Op.WARP, 1, 0.1, 0, 0, 1, 0, 0, 0, 1, 4, 4, WarpFilter.BILINEAR)
GRAY = do(Op.CONTRAST, 0.5, 0.5)


def test_pixels_are_read_once_and_the_result_written_once():
    single = [
        do(Op.BRIGHTNESS, 0.5),
        do(Op.HUE, 0.1),
        do(Op.NOISE, 0, 1),
        do(Op.NORMALIZE, 1, 1, 1),
    ]
    erase = do(Op.ERASE, 0, 0, 2, 2, EraseMode.NORMAL)
    for rows in ([], [CROP], single, [CROP, *single, erase], [do(Op.NONE), do(Op.NONE), SHEAR]):
        plan = plan_of(*rows)
        assert [launch.count for launch in plan.launches] == [1]
        assert plan.scratch == plan.statistics == 0


@pytest.mark.parametrize(
    "rows, launches, images_kept",
    [
        ([whole((6, 8), (4, 4), Filter.BICUBIC_ANTIALIAS)], 1, 0),
        ([whole((6, 8), (1, 1), Filter.BICUBIC_ANTIALIAS)], 1, 0),
        ([CROP, GRAY], 2, 1),
        ([GRAY, CROP], 3, 2),
        ([CROP, SHEAR], 2, 1),
        ([CROP, do(Op.BLUR, Axes.VERTICAL, 1, 1, 0)], 2, 1),
        ([CROP, do(Op.BLUR, Axes.BOTH, 1, 1, 0)], 3, 2),
        ([do(Op.BLUR, Axes.BOTH, 1, 1, 0)], 2, 1),
        ([CROP, do(Op.NONE), GRAY, do(Op.NONE), SHEAR, do(Op.INVERT)], 3, 2),
        ([CROP, do(Op.SAVE, 1), SHEAR, do(Op.JOIN, 1), do(Op.MIX)], 3, plans.SLOTS),
        ([CROP, do(Op.SAVE, 1)], 2, plans.SLOTS),
    ],
)
def test_a_segment_ends_where_the_whole_image_is_needed(rows, launches, images_kept):
    plan = plan_of(*rows)
    assert len(plan.launches) == launches
    most = 4 * 4 if rows[0] is CROP else 6 * 8
    assert plan.scratch == 3 * most * images_kept


def test_a_launch_has_only_the_samples_that_come_so_far():
    images = torch.tensor([[0, 6, 8], [0, 4, 4], [0, 9, 9]])
    programs = packed([[CROP, GRAY], [], [CROP, SHEAR, GRAY]])
    plan = plans.plan_for(images, programs, 3, 48)
    assert [launch.count for launch in plan.launches] == [3, 2, 1]
    assert [launch.first for launch in plan.launches] == [0, 3, 5]
    assert plan.fields[0].tolist() == [0, 1, 2, 0, 2, 2]
