"""Mixup's Triton kernels: tiles of every kind, boxes across them, walks of cycles,
and assertions."""

import dataclasses
import itertools
import math

import pytest
import torch

from reg_kernels.reference import mixup as reference

from support import DEVICE, DTYPE_IDS, DTYPES

pytest.importorskip("triton")

import triton
import triton.language as tl

from reg_kernels.triton import mixup as kernels
from reg_kernels.triton._mixup import quotient

INTERPRETED = DEVICE == "cpu"
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
last_in = pytest.mark.parametrize("last_in", [False, True], ids=["from_first", "from_last"])
last_out = pytest.mark.parametrize("last_out", [False, True], ids=["to_first", "to_last"])
SHARES = [0.3, 1.0, 0.7, 0.0]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles a sample, which begin and end anywhere in rows and channels."""
    monkeypatch.setattr(kernels, "TILE", 32)
    monkeypatch.setattr(kernels, "CHANNELS", 2)
    kernels._tiles.cache_clear()
    yield
    kernels._tiles.cache_clear()


def batch(shape, dtype=torch.float32, last=False):
    x = torch.randn(shape, dtype=torch.float64)
    x = (20 * x + 100).clamp(0, 255) if dtype == torch.uint8 else x
    return reference.in_format(x.to(DEVICE, dtype), last)


def numbers(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def shares(samples, dtype=torch.float32):
    return numbers(*(SHARES[n % 4] for n in range(samples)), dtype=dtype)


def integers(*values):
    return numbers(*values, dtype=torch.int64)


def channel_values(channels, dtype=torch.float32):
    """scale and shift."""
    steps = torch.linspace(0.5, 1.5, channels, dtype=dtype, device=DEVICE)
    return steps, steps - 0.8


def check(ours, theirs):
    """To within the last bit of what is computed in, or of the type that it is rounded to."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    strides = zip(ours.stride(), theirs.stride(), ours.shape, strict=True)
    assert ours.numel() == 0 or all(a == b or n == 1 for a, b, n in strides)
    rtol = torch.finfo(ours.dtype).eps * (1 if ours.dtype.itemsize == 2 else 4)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, equal_nan=True)


def check_mixup(x, blend, dtype, last):
    check(kernels.mixup(x, *blend, dtype, last), reference.mixup(x, *blend, dtype, last))


# Values


@pytest.mark.parametrize("normalised", [False, True])
@last_out
@last_in
@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (2, 5, 3, 2, 3), (2, 1, 7, 9), (3, 40, 1, 1)])
def test_layouts(small_tiles, shape, last_in, last_out, normalised):
    x = batch(shape, last=last_in)
    affine = channel_values(shape[1]) if normalised else (None, None)
    check_mixup(x, (shares(shape[0]), 1.0, None, None, *affine), x.dtype, last_out)
    box = integers(1, 1, 3, 2).expand(shape[0], 4).contiguous() if shape[-1] > 2 else None
    check_mixup(x, (None, 0.3, integers(*[0] * shape[0]), box, *affine), x.dtype, last_out)


@dtypes
@pytest.mark.parametrize("source", [*DTYPES, torch.uint8], ids=[*DTYPE_IDS, "uint8"])
def test_types(source, dtype):
    x = batch((3, 2, 3, 4), source)
    compute = torch.float64 if torch.float64 in (source, dtype) else torch.float32
    blend = (None, 0.3, None, None, *channel_values(2, compute))
    check_mixup(x, blend, dtype, False)
    if source != torch.uint8:
        g = batch((3, 2, 3, 4), dtype)
        blend = (None, 0.3, None, None, None, blend[4], source, True)
        check(kernels.mixup_backward(g, *blend), reference.mixup_backward(g, *blend))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_types_of_shares(dtype):
    x = batch((4, 7), torch.float64)
    check_mixup(x, (shares(4, dtype), 1.0, None, None, None, None), x.dtype, False)
    check_mixup(x, (numbers(0.3, dtype=dtype), 1.0, None, None, None, None), x.dtype, False)


def test_batches_of_numbers_and_of_rows():
    for shape in ((1,), (5,), (1, 1), (3, 1), (2, 33)):
        affine = channel_values(shape[1]) if len(shape) > 1 else (None, None)
        check_mixup(batch(shape), (None, 0.3, None, None, *affine), torch.float32, False)
    for shape in ((0,), (0, 3), (2, 0, 4)):
        assert kernels.mixup(
            batch(shape), None, 0.3, None, None, None, None, torch.float16, False
        ).shape == torch.Size(shape)


@pytest.mark.parametrize("normalised", [False, True])
@last_in
def test_a_sample_past_32_bits(small_tiles, monkeypatch, last_in, normalised):
    tiles = kernels._tiles

    def wide(*arguments):
        chosen = tiles(*arguments)
        return chosen._replace(form=chosen.form._replace(WIDE=True))

    wide.cache_clear = tiles.cache_clear
    monkeypatch.setattr(kernels, "_tiles", wide)
    affine = channel_values(3) if normalised else (None, None)
    x = batch((2, 3, 5, 4), last=last_in)
    check_mixup(x, (None, 0.3, None, integers(0, 1, 3, 4)[None], *affine), x.dtype, last_in)


@last_out
@last_in
def test_a_weight_of_nothing_leaves_out_what_is_not_finite(last_in, last_out):
    x = batch((4, 2, 2, 3), last=last_in)
    x[0], x[3] = math.nan, math.inf
    for lam in ((1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 1.0, 0.5)):
        check_mixup(x, (numbers(*lam), 1.0, None, None, None, None), x.dtype, last_out)
    box = integers(1, 0, 3, 1)[None]
    check_mixup(x, (None, 1.0, None, box, None, None), x.dtype, last_out)
    blend = (None, 1.0, None, None, box, None, x.dtype, last_out)
    check(kernels.mixup_backward(x, *blend), reference.mixup_backward(x, *blend))


# Boxes


@last_out
@last_in
def test_every_box_of_an_image(small_tiles, last_in, last_out):
    height, width = 4, 3
    edges = [itertools.combinations_with_replacement(range(n + 1), 2) for n in (width, height)]
    boxes = [(x1, y1, x2, y2) for (x1, x2), (y1, y2) in itertools.product(*edges)]
    boxes = integers(*boxes[:: 1 if last_in == last_out else 3])
    x = batch((len(boxes), 5, height, width), last=last_in)
    check_mixup(x, (None, 1.0, None, boxes, None, None), x.dtype, last_out)


@last_in
def test_boxes_of_tiles_that_begin_in_one_channel_and_end_in_the_next(small_tiles, last_in):
    rows = itertools.combinations(range(8), 2)
    boxes = integers(*[(y1 % 3, y1, 6 - y2 % 2, y2) for y1, y2 in rows])
    x = batch((len(boxes), 2, 2, 7, 6), last=last_in)
    check_mixup(x, (None, 1.0, None, boxes, None, None), x.dtype, last_in)


@pytest.mark.parametrize("block", [1, 32, 2048])
def test_quotients(block):
    @triton.jit
    def kernel(q_ptr, first, D, BLOCK: tl.constexpr):
        i = first + tl.arange(0, BLOCK)
        tl.store(q_ptr + tl.arange(0, BLOCK), quotient(i, D, BLOCK))

    q = torch.empty(block, dtype=torch.int32, device=DEVICE)
    for divisor in (1, 2, 3, 7, 31, 32, 224, 2047, 2048, 2049, 150_528, 2**31 - 2**16):
        for first in {0, divisor // 2, divisor - 1}:
            kernel[(1,)](q, first, divisor, BLOCK=block)
            expected = torch.arange(first, first + block, dtype=torch.int64) // divisor
            assert torch.equal(q.cpu().long(), expected), (divisor, first)


# In place

PERMUTATIONS = [None, (0, 1, 2, 3, 4, 5, 6), (6, 0, 1, 2, 3, 4, 5), (2, 4, 0, 3, 6, 5, 1)]


@pytest.mark.parametrize("index", PERMUTATIONS, ids=["reversed", "identity", "cycle", "cycles"])
@pytest.mark.parametrize("normalised", [False, True])
@last_in
def test_in_place(small_tiles, last_in, normalised, index):
    x = batch((7, 3, 4, 5), last=last_in)
    boxes = integers(*[(n % 3, 0, 4, n % 5) for n in range(7)])
    affine = channel_values(3) if normalised else (None, None)
    blend = (shares(7), 1.0, None if index is None else integers(*index), boxes, *affine)
    expected = reference.mixup(x, *blend, x.dtype, last_in)
    assert kernels.mixup_(x, *blend) is None
    check(x, expected)


@dtypes
@pytest.mark.parametrize("samples", [0, 1, 2, 5])
def test_in_place_of_every_type_and_size(samples, dtype):
    memory = torch.full((samples * 9 + 2,), 7.0, device=DEVICE, dtype=dtype)
    x = memory[1:-1].view(samples, 9)
    x.copy_(batch((samples, 9), dtype))
    blend = (None, 0.3, None, None, None, None)
    expected = reference.mixup(x, *blend, dtype, False)
    kernels.mixup_(x, *blend)
    check(x, expected)
    assert memory[0] == memory[-1] == 7


# The gradient


@pytest.mark.parametrize("normalised", [False, True])
@last_out
@last_in
@pytest.mark.parametrize("index", [None, (1, 1, 4, 1, 0), (2, 2, 2, 2, 2), (4, 3, 2, 1, 0)])
def test_gradients(small_tiles, index, last_in, last_out, normalised):
    g = batch((5, 3, 3, 4), last=last_in)
    receivers = starts = None
    if index is not None:
        partners, receivers = integers(*index).sort(stable=True)
        starts = torch.searchsorted(partners, torch.arange(6, device=DEVICE))
    scale = channel_values(3)[0] if normalised else None
    for lam, boxes in (
        (shares(5), None),
        (shares(5), integers(*[(0, n % 3, n % 4, 3) for n in range(5)])),
        (numbers(1.0), integers(1, 1, 4, 3)[None]),
    ):
        blend = (lam, 1.0, receivers, starts, boxes, scale, g.dtype, last_out)
        check(kernels.mixup_backward(g, *blend), reference.mixup_backward(g, *blend))


# Assertions

asserting = pytest.mark.skipif(not INTERPRETED, reason="what fails on a device ends its use")
HALF = (None, 0.5, None, None, None, None)


@pytest.fixture
def asserted(monkeypatch):
    """The interpreter asserts where its options say so, whatever a launch asks for."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))


def box(*edges):
    return (None, 1.0, None, integers(*edges), None, None)


@asserting
@pytest.mark.parametrize(
    "blend, said",
    [
        ((numbers(0.5, 1.5, 0.5), *HALF[1:]), "lam"),
        ((numbers(0.5, math.nan, 0.5), *HALF[1:]), "lam"),
        ((numbers(-0.1), *HALF[1:]), "lam"),
        ((None, 2.0, *HALF[2:]), "lam"),
        ((None, 0.3, integers(0, 3, 1), *HALF[3:]), "index"),
        ((None, 0.3, integers(0, -1, 1), *HALF[3:]), "index"),
        (box((-1, 0, 2, 2)), "box"),
        (box((0, -1, 2, 2)), "box"),
        (box((3, 0, 2, 2)), "box"),
        (box((0, 2, 2, 1)), "box"),
        (box((0, 0, 5, 2)), "box"),
        (box((0, 0, 4, 3), (0, 0, 4, 4), (0, 0, 0, 0)), "box"),
    ],
)
@last_in
def test_values_are_asserted(asserted, last_in, blend, said):
    x = batch((3, 2, 3, 4), last=last_in)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=said):
        kernels.mixup(x, *blend, x.dtype, not last_in)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=said):
        kernels.mixup_(x, *blend)


@asserting
@pytest.mark.parametrize("index", [(1, 2, 2), (0, 0, 1), (1, 0, 0), (0, 0, 0)])
def test_what_is_no_permutation_is_asserted(asserted, index):
    blend = (None, 0.3, integers(*index), None, None, None)
    x = batch((3, 5))
    kernels.mixup(x, *blend, x.dtype, False)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="permutation"):
        kernels.mixup_(x, *blend)


@asserting
def test_what_is_right_is_not(asserted):
    x = batch((3, 2, 3, 4))
    for blend in (HALF, box((0, 0, 4, 3), (4, 3, 4, 3), (0, 0, 0, 0))):
        check_mixup(x, blend, x.dtype, False)
        kernels.mixup_(x.clone(), *blend)
