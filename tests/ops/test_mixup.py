"""Mixup and CutMix: values, layouts, bits, gradients."""

import itertools
import math

import pytest
import torch
from mixup_inputs import (
    BYTES,
    FORMATS,
    LAYOUTS,
    blended,
    boxes_of,
    by_torch,
    check,
    draw,
    indices,
    integers,
    is_interpreted,
    lambdas,
)

from reg_kernels import functional as F

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas

IMPLEMENTATIONS = implementations()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
native = pytest.mark.skipif(not isas(), reason="the native library was not built")
MEAN, STD = (0.5, 0.45, -0.4, 0.1), (0.2, 0.25, 2.0, 0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


# Values


SHAPES = [(1,), (7,), (5, 4), (3, 4, 9), (5, 3, 6, 7), (1, 2, 3, 3), (2, 3, 2, 3, 5)]
LARGE = [(6, 1031), (3, 4, 17, 61), (7, 19, 15, 15), (2, 2, 3, 30, 33), (33, 3, 32, 32)]


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, BYTES], ids=[*DTYPE_IDS, "uint8"])
@on_each
def test_mixup_of_each_shape_and_dtype(shape, dtype, backend):
    if is_interpreted(backend) and (shape in LARGE or dtype in DTYPES[2:]):
        pytest.skip("takes Triton's interpreter minutes")
    x = draw(*shape, dtype=dtype)
    n = shape[0]
    chosen = itertools.product(lambdas(n).values(), indices(n).values())
    if is_interpreted(backend):
        chosen = zip(lambdas(n).values(), list(indices(n).values())[:4], strict=True)
    for lam, index in chosen:
        y = F.mixup(x, lam, index, backend=backend)
        assert y.dtype == (torch.float32 if dtype == BYTES else dtype)
        assert y.is_contiguous()
        check(y, *blended(x, lam, index), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3, 6, 7), (3, 4, 2, 3, 5), (3, 5, 33, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, BYTES], ids=str)
@on_each
def test_cutmix_normalised_and_cast_in_each_layout(layout, shape, dtype, backend):
    if is_interpreted(backend) and (shape[-1] > 20 or dtype != BYTES):
        pytest.skip("too large for Triton's interpreter")
    n, channels, *_, height, width = shape
    x = LAYOUTS[layout](draw(*shape, dtype=dtype))
    boxes, index = boxes_of(n, height, width), indices(n)["repeated"]
    mean, std = MEAN[:channels] + (0.0,) * (channels - 4), STD[:channels] + (1.0,) * (channels - 4)
    expected = blended(x, 1.0, index, boxes, mean, std)
    kept = layout == "channels_last" or (layout == "transposed" and x.is_contiguous())
    combinations = list(itertools.product(FORMATS[len(shape)], DTYPES))
    start = list(LAYOUTS).index(layout)
    for memory_format, out in combinations[start::7] if is_interpreted(backend) else combinations:
        y = F.cutmix(
            *(x, boxes, index),
            mean=mean,
            std=std,
            dtype=out,
            memory_format=memory_format,
            backend=backend,
        )
        assert (y.dtype, y.shape) == (out, x.shape)
        if memory_format in (None, torch.preserve_format):
            memory_format = torch.contiguous_format if not kept else {
                4: torch.channels_last, 5: torch.channels_last_3d
            }[len(shape)]  # fmt: skip
        assert y.is_contiguous(memory_format=memory_format)
        check(y, *expected, backend)


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BYTES], ids=str)
def test_cutmix_of_gray_images_and_one_box(dtype, backend):
    x = draw(5, 6, 7, dtype=dtype)
    for boxes in (boxes_of(5, 6, 7), integers(1, 2, 5, 4), integers(1, 2, 5, 4).int()):
        for index in (None, indices(5)["permuted"]):
            y = F.cutmix(x, boxes, index, backend=backend)
            assert y.shape == x.shape
            check(y, *blended(x, 1.0, index, boxes), backend)
            y = F.cutmix(x, boxes, index, mean=0.5, std=0.25, backend=backend)
            truth, sizes = blended(x.unsqueeze(1), 1.0, index, boxes, 0.5, 0.25)
            check(y, truth.squeeze(1), sizes.squeeze(1), backend)


@on_each
def test_normalisation_by_numbers_tensors_and_sequences(backend):
    x = draw(3, 2, 2, 3, dtype=torch.float32)
    for mean, std in (
        (0.5, None),
        (None, 2.0),
        (0.5, (0.1, 0.2)),
        ([0.5, 1], torch.tensor([0.1, 0.2], device=DEVICE)),
        (torch.tensor([0.5], device=DEVICE), torch.tensor(0.1, dtype=torch.float64, device=DEVICE)),
    ):
        y = F.mixup(x, 0.25, mean=mean, std=std, backend=backend)
        check(y, *blended(x, 0.25, None, None, mean, std), backend)
    # One mean alone, which is not 0: v - mean.
    bytes_ = draw(3, 2, 2, 3, dtype=BYTES)
    y = F.mixup(bytes_, 1.0, mean=(0.25, 0.5), backend=backend)
    check(y, *blended(bytes_, 1.0, None, None, (0.25, 0.5)), backend)


@on_each
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 0, 4, 4), (3, 2, 0, 4), (0,), (0, 5)], ids=str)
def test_empty_batches(shape, backend):
    for dtype in (torch.float32, torch.bfloat16, BYTES):
        x = draw(*shape, dtype=dtype)
        y = F.mixup(x, 0.5, indices(shape[0])["identity"], backend=backend)
        assert y.shape == shape
        if len(shape) == 4:
            boxes = torch.zeros(shape[0], 4, dtype=torch.int64, device=DEVICE)
            assert F.cutmix(x, boxes, backend=backend).shape == shape
        if dtype != BYTES:
            assert F.mixup(x, 0.5, inplace=True, backend=backend) is x
            leaf = x.clone().requires_grad_()
            y = F.mixup(leaf, torch.rand(shape[0], device=DEVICE), backend=backend)
            assert torch.autograd.grad(y.sum(), leaf)[0].shape == shape


@on_each
@dtypes
def test_a_weight_of_0_or_1_keeps_the_other_sample_out(dtype, backend):
    special = [math.inf, -math.inf, math.nan, -0.0]
    x = torch.tensor([[1.0, -0.0, 3, 4], special, [5, 6, 7, 8]], dtype=dtype, device=DEVICE)
    index = integers(1, 2, 1)
    lam = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    y = F.mixup(x, lam, index, backend=backend)
    expected = torch.stack([x[0], x[2], x[2]])
    assert torch.equal(y, expected)
    assert torch.equal(y.signbit(), expected.signbit())
    for one, expected in ((1.0, x), (0.0, x[index])):
        y = F.mixup(x, one, index, backend=backend)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    images = x.view(3, 1, 2, 2)
    y = F.cutmix(images, integers([0, 0, 0, 0], [0, 0, 2, 2], [0, 0, 0, 0]), index, backend=backend)
    assert torch.equal(y.view(3, 4), torch.stack([x[0], x[2], x[2]]))
    # Likewise the gradient: an infinite one stays with whom it belongs to.
    leaf = torch.ones(3, 4, dtype=dtype, device=DEVICE, requires_grad=True)
    y = F.mixup(leaf, lam, index, backend=backend)
    g = torch.tensor([[1.0], [math.inf], [math.nan]], dtype=dtype, device=DEVICE).expand(3, 4)
    (gradient,) = torch.autograd.grad(y, leaf, g)
    assert torch.equal(
        gradient[:2], torch.tensor([[1.0], [0]], device=DEVICE).expand(2, 4).to(dtype)
    )
    assert gradient[2].isnan().all()  # NaN of its own and the infinite one of whose partner it is


@on_each
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=DTYPE_IDS[:2])
def test_bits_of_the_formula_in_eager(dtype, backend):
    shapes = [(5, 3, 4, 5)] if is_interpreted(backend) else [(7, 3, 31, 33), (9, 1001), (5,)]
    for shape in shapes:
        x = draw(*shape, dtype=dtype)
        index = indices(len(x))["repeated"]
        lam = torch.rand(len(x), dtype=dtype, device=DEVICE)
        each = lam.view(-1, *[1] * (x.dim() - 1))
        y = F.mixup(x, lam, index, backend=backend)
        assert torch.equal(y, each * x + (1 - each) * x[index])
        for one in (0.1, 0.3, 1 / 3, 0.7, 1e-3, 0.2998765):  # 1 - lambda is rounded once
            y = F.mixup(x, one, index, backend=backend)
            assert torch.equal(y, one * x + (1 - one) * x[index])
        assert torch.equal(F.mixup(x, one, backend=backend), one * x + (1 - one) * x.flip(0))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
def test_outputs_larger_than_the_caches(dtype, layout):
    # Of 100 MB, and an odd number of them: the bits are those of the parts.
    itemsize = torch.empty(0, dtype=dtype).element_size()
    n, edge = 13, int((100e6 / itemsize / 13 / 3) ** 0.5) | 1
    x = LAYOUTS[layout](torch.randn(1, 3, edge, edge).to(dtype).expand(n, -1, -1, -1).contiguous())
    x[:, 0, 0, 0] = torch.arange(n)
    lam = torch.linspace(0, 1, n)
    boxes = integers(5, 7, edge - 2, edge // 2).cpu()
    index = torch.arange(n).roll(3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        mixed, cut = F.mixup(x, lam, index), F.cutmix(x, boxes, index, mean=0.5, std=2.0)
    finally:
        torch.set_num_threads(threads)
    swapped = integers(1, 0).cpu()
    for i in (0, 4, n - 1):
        pair = torch.stack([x[i], x[index[i]]])
        one = F.mixup(pair, lam[i].item(), swapped)
        assert torch.equal(mixed[i], one[0])
        one = F.cutmix(pair, boxes, swapped, mean=0.5, std=2.0)
        assert torch.equal(cut[i], one[0])
    x.mul_(1)  # no streamed store may have gone past an output
    assert torch.equal(x[:, 0, 0, 0], torch.arange(n).to(dtype))


# Gradients


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 4), (5, 3, 6, 7), (3, 4, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["reversed", "permuted", "repeated", "all one"])
@on_each
def test_gradient(shape, kind, backend):
    if is_interpreted(backend) and kind in ("reversed", "all one"):
        pytest.skip("takes Triton's interpreter minutes")
    x = draw(*shape).requires_grad_()
    index = indices(shape[0])[kind]
    std = 0.25 if len(shape) > 1 else None
    calls = [(F.mixup, lam, (lam, index)) for lam in (0.3, lambdas(shape[0])["each"])]
    if len(shape) > 3:
        boxes = boxes_of(shape[0], *shape[-2:])
        calls += [(F.cutmix, b, (1.0, index, b)) for b in (boxes, boxes[1])]
    for function, argument, formula in calls:
        y = function(x, argument, index, std=std, backend=backend)
        z = by_torch(x, *formula, std=std)
        dense = draw(*shape)
        incoming = [dense, LAYOUTS["strided"](dense), dense[:1].expand(shape)]
        if len(shape) > 3:
            incoming.append(LAYOUTS["channels_last"](dense))
        for g in incoming[-1:] if is_interpreted(backend) else incoming:
            ours, theirs = (torch.autograd.grad(t, x, g, retain_graph=True)[0] for t in (y, z))
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
            assert ours.is_contiguous()


@on_each
@dtypes
def test_gradient_of_a_cast_and_of_another_layout(dtype, backend):
    x = draw(4, 3, 5, 6, dtype=dtype)
    for layout, out in itertools.product(("contiguous", "channels_last"), DTYPES):
        leaf = LAYOUTS[layout](x).detach().requires_grad_()
        to = torch.contiguous_format if layout == "channels_last" else torch.channels_last
        options = {"std": 0.25, "dtype": out, "memory_format": to, "backend": backend}
        y = F.mixup(leaf, 0.3, integers(1, 1, 0, 3), **options)
        g = torch.empty_like(y).copy_(draw(4, 3, 5, 6))
        (gradient,) = torch.autograd.grad(y, leaf, g)
        assert (gradient.dtype, gradient.stride()) == (dtype, leaf.stride())
        wide = x.double().requires_grad_()
        z = by_torch(wide, 0.3, integers(1, 1, 0, 3), std=0.25)
        (expected,) = torch.autograd.grad(z, wide, g.double())
        check(gradient, expected, 4 * expected.abs() + 4 * g.double().abs().amax(), backend)
