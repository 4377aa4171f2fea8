"""Cross-entropy's arithmetic: errors beside torch's, extreme logits, large sizes, the same bits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as TF
from loss_inputs import (
    IGNORED,
    LAYOUTS,
    check_same,
    check_twice,
    distance,
    draw,
    is_interpreted,
    labels_of,
)

from reg_kernels import functional as F
from reg_kernels._mixed_target import MixedTarget

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
on_each = pytest.mark.parametrize("backend", implementations())
native = pytest.mark.skipif(not isas(), reason="the native library was not built")
REDUCTIONS = ("none", "mean", "sum")
INF, NAN = math.inf, math.nan


pytestmark = pytest.mark.usefixtures("one_thread")


def results(function, x, target, scale=1.0, **options):
    """The loss of x, and its gradient for a loss that is scaled."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, target, **options)
    g = torch.full_like(y, scale) if y.dim() == 0 else torch.linspace(-1, 1, y.numel()).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaf, g.view(y.shape))]


def truth_of(x, target, **options):
    wide = target.double() if target.is_floating_point() else target
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    return results(TF.cross_entropy, x.double(), wide, **options)


# Errors


SHAPES = [(3, 5), (6, 9, 4)]
LARGE = [(70, 1000), (513, 33), (9, 19, 40, 3), (3, 4099), (2, 1025, 9)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@dtypes
@on_each
def test_error_is_at_most_twice_torchs(dtype, shape, layout, backend):
    if is_interpreted(backend) and (shape in LARGE or dtype == torch.float64):
        pytest.skip("takes Triton's interpreter minutes")
    x = LAYOUTS[layout](3 * draw(*shape)).to(dtype)
    weight = torch.rand(shape[1], dtype=torch.float64, device=DEVICE).to(dtype)
    targets = (labels_of(x, IGNORED), LAYOUTS[layout](draw(*shape).softmax(1)).to(dtype))
    for target, w, smoothing, reduction in itertools.product(
        targets, (None, weight), (0.0, 0.1), REDUCTIONS
    ):
        if is_interpreted(backend) and (w is None) == bool(smoothing):
            continue
        options = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
        ours = results(F.cross_entropy, x, target, **options, backend=backend)
        theirs = results(TF.cross_entropy, x, target, **options)
        truth = truth_of(x, target, **options)
        assert ours[1].stride() == x.stride()
        if dtype == torch.float64:
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        elif is_interpreted(backend) and dtype == torch.bfloat16:
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)  # it truncates
        else:
            check_twice(ours, theirs, truth)


@pytest.mark.parametrize("shape", [(2, 262_144), (1, 131_071, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_each
def test_vocabularies_of_256_thousand(shape, dtype, backend):
    if is_interpreted(backend):
        pytest.skip("too large for Triton's interpreter")
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](3 * draw(*shape)).to(dtype)
        labels = labels_of(x)
        labels.view(-1)[-1] = shape[1] - 1
        for smoothing in (0.0, 0.1):
            options = {"label_smoothing": smoothing}
            ours = results(F.cross_entropy, x, labels, **options, backend=backend)
            theirs = results(TF.cross_entropy, x, labels, **options)
            check_twice(ours, theirs, truth_of(x, labels, **options))


@pytest.mark.parametrize("classes", [1000, 50_000])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=DTYPE_IDS[2:])
@on_each
def test_smoothing_over_many_classes_stays_finite_in_half_precision(classes, dtype, backend):
    if is_interpreted(backend) and classes > 1000:
        pytest.skip("too large for Triton's interpreter")
    x = (30 * draw(3, classes)).clamp(-90, 90).to(dtype)
    labels = labels_of(x)
    for target in (labels, MixedTarget(labels, labels.flip(0), 0.3)):
        options = {"label_smoothing": 0.1}
        loss, gradient = results(F.cross_entropy, x, target, **options, backend=backend)
        assert loss.isfinite() and gradient.isfinite().all()
        if target is labels:
            true_loss, true_gradient = truth_of(x, target, **options)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(loss.double(), true_loss, rtol=eps, atol=0)
            tiny = torch.finfo(dtype).smallest_normal * eps
            torch.testing.assert_close(gradient.double(), true_gradient, rtol=eps, atol=2 * tiny)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@on_each
def test_a_loss_scale_keeps_small_gradients_of_float16(reduction, backend):
    # p / N of 1e-3 / 64 and less: below float16's normal numbers, but for the scale.
    classes = 100 if is_interpreted(backend) else 1000
    x = draw(64, classes).half()
    labels = labels_of(x)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    options = {"reduction": reduction}
    with torch.autocast(DEVICE, dtype=torch.float16):  # as with a GradScaler
        y = F.cross_entropy(leaf, labels, **options, backend=backend)
    assert y.dtype == torch.float32
    z = TF.cross_entropy(wide, labels, **options)
    scale = 65536.0 if reduction == "mean" else 4096.0
    (gradient,) = torch.autograd.grad(y.sum() * scale, leaf)
    (expected,) = torch.autograd.grad(z.sum() * scale, wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-10, atol=1e-7)
    assert (gradient != 0).all()


# Dtypes and empty means


@on_each
@pytest.mark.parametrize("of_logits", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("of_targets", DTYPES, ids=DTYPE_IDS)
def test_probabilities_of_another_dtype(of_logits, of_targets, backend):
    x = draw(3, 4, dtype=of_logits).requires_grad_()
    target = draw(3, 4).softmax(1).to(of_targets)
    y, z = F.cross_entropy(x, target, backend=backend), TF.cross_entropy(x, target)
    assert y.dtype == z.dtype
    wide = x.detach().double().requires_grad_()
    truth = TF.cross_entropy(wide, target.double())
    gradients = torch.autograd.grad(y, x)[0], torch.autograd.grad(truth, wide)[0]
    for ours, true in ((y, truth), gradients):
        eps = (
            torch.finfo(ours.dtype).eps
            + 8 * torch.finfo(torch.promote_types(of_logits, torch.float32)).eps
        )
        torch.testing.assert_close(ours.double(), true, rtol=eps, atol=eps / 4)


@on_each
@dtypes
def test_dtypes_of_results_and_under_autocast(dtype, backend):
    x = draw(3, 4, dtype=dtype).requires_grad_()
    for target in (labels_of(x), draw(3, 4, dtype=dtype).softmax(1)):
        y, z = F.cross_entropy(x, target, backend=backend), TF.cross_entropy(x, target)
        assert (y.dtype, y.shape) == (z.dtype, z.shape) == (dtype, ())
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y, z = F.cross_entropy(x, target, backend=backend), TF.cross_entropy(x, target)
            assert y.dtype == z.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
        (gradient,), (expected,) = (torch.autograd.grad(t, x) for t in (y, z))
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)], ids=str)
@on_each
def test_of_nothing(shape, backend):
    x = draw(*shape).requires_grad_()
    targets = [torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=DEVICE), draw(*shape)]
    for target, reduction, smoothing in itertools.product(targets, REDUCTIONS, (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        y = F.cross_entropy(x, target, **options, backend=backend)
        check_same(y, TF.cross_entropy(x, target, **options), [x])
    mixed = MixedTarget(targets[0], targets[0], 0.3)
    assert F.cross_entropy(x, mixed, backend=backend).isnan()
    assert F.cross_entropy(x, mixed, reduction="sum", backend=backend) == 0


@on_each
def test_all_labels_ignored(backend):
    x = draw(3, 4, 2).requires_grad_()
    labels = torch.full((3, 2), IGNORED, device=DEVICE)
    for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        for target in (labels, MixedTarget(labels, labels, 0.5)):
            y = F.cross_entropy(x, target, **options, backend=backend)
            check_same(y, TF.cross_entropy(x, labels, **options), [x])
            assert y.isnan().all() if reduction == "mean" else (y == 0).all()


# Extreme logits

ROWS = {
    "large": [1e4, -1e4, 0, 1, 2],
    "large and close": [1e4, 1e4 - 8, -1e4, 9992, 9984],
    "masked": [-INF, 1, 2, -INF, 3],
    "one class left": [-INF, -INF, 2, -INF, -INF],
    "all masked": [-INF] * 5,
    "infinite": [INF, 1, 2, 3, 4],
    "two infinite": [INF, INF, 2, 3, -INF],
    "NaN": [NAN, 1, 2, 3, 4],
    "NaN last": [0, 1, 2, 3, NAN],
    "equal": [-7.0] * 5,
    "lowest": [-6e4, -6e4, -65504, 0, 65504],
    "plain": [0.1, -0.5, 2, 1, 0.3],
}


@pytest.mark.parametrize("row", ROWS)
@dtypes
@on_each
def test_extreme_logits(row, dtype, backend):
    if is_interpreted(backend) and dtype in DTYPES[2:]:
        pytest.skip("takes Triton's interpreter minutes")
    eps = torch.finfo(dtype).eps
    # In float64 the truth has an error of its own.
    compute = max(torch.finfo(torch.promote_types(dtype, torch.float32)).eps, 1e-14)
    for layout, filling in itertools.product(("contiguous", "channels_last"), (1, 30)):
        if is_interpreted(backend) and (filling > 1 or layout == "channels_last"):
            continue
        # Each label once; the other positions are plain; with more classes vectors are full.
        x = torch.tensor([ROWS["plain"]] * 5, dtype=torch.float64, device=DEVICE)
        x[::2] = torch.tensor(ROWS[row], dtype=torch.float64, device=DEVICE)
        x = torch.cat([x] + [x[:, 1:4]] * (filling - 1), 1)
        x = LAYOUTS[layout](torch.stack([x, x.flip(0)], -1)).to(dtype)
        labels = torch.stack([torch.arange(5, device=DEVICE)] * 2, -1)
        for target, smoothing in itertools.product((labels, x.isnan().to(dtype) + 0.2), (0.0, 0.1)):
            for reduction in REDUCTIONS:
                if is_interpreted(backend) and (reduction == "none") != bool(smoothing):
                    continue
                options = {"label_smoothing": smoothing, "reduction": reduction}
                ours = results(F.cross_entropy, x, target, **options, backend=backend)
                truth = truth_of(x, target, **options)
                # A label's own loss is exact; of several classes' the largest logits cancel.
                one = target is labels and not smoothing
                size = 1.0 if one else float(x[x.isfinite()].abs().max())
                mass = 1.0 if target is labels else float(target.sum(1).max())
                for a, b, scale in zip(ours, truth, (size, mass), strict=True):
                    b = b.to(dtype).double()  # may be past the numbers of float16
                    tolerances = {
                        "rtol": 2 * eps + 16 * compute,
                        "atol": 2 * eps + 32 * compute * scale,
                    }
                    torch.testing.assert_close(a.double(), b, **tolerances, equal_nan=True)


@on_each
@dtypes
def test_one_class_and_two(dtype, backend):
    for classes, positions in ((1, ()), (1, (3,)), (2, ()), (2, (3,))):
        x = (5 * draw(4, classes, *positions)).to(dtype)
        combinations = list(itertools.product((0.0, 0.1, 1.0), REDUCTIONS))
        for smoothing, reduction in combinations[:: 4 if is_interpreted(backend) else 1]:
            options = {"label_smoothing": smoothing, "reduction": reduction}
            labels = labels_of(x)
            ours = results(F.cross_entropy, x, labels, **options, backend=backend)
            truth = truth_of(x, labels, **options)
            eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
            for a, b in zip(ours, truth, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=2 * eps, atol=2 * eps)
            if classes == 1 and not smoothing:
                assert all((r == 0).all() for r in ours)


@on_each
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_an_ignored_position_holds_counts_for_nothing(value, backend):
    x = draw(4, 3, 2)
    clean = x.clone()
    x[1, :, 0], x[2, 1, 1], clean[1, :, 0], clean[2, 1, 1] = value, value, 0, 0
    labels = labels_of(x)
    labels[1, 0] = labels[2, 1] = IGNORED
    each = torch.tensor([0.3, 0.0, 1.0, 0.5], dtype=x.dtype, device=DEVICE)
    for target, smoothing, reduction in itertools.product(
        (labels, MixedTarget(labels, labels, each)), (0.0, 0.1), REDUCTIONS
    ):
        options = {"label_smoothing": smoothing, "reduction": reduction, "backend": backend}
        ours = results(F.cross_entropy, x, target, **options)
        expected = results(F.cross_entropy, clean, target, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@on_each
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
def test_incoming_gradients_that_are_zero_or_not_finite(dtype, backend):
    x = draw(3, 4, dtype=dtype)
    labels = labels_of(x)
    for reduction in ("mean", "sum"):
        zero = results(F.cross_entropy, x, labels, 0.0, reduction=reduction, backend=backend)[1]
        assert (zero == 0).all()
        for scale in (INF, -INF, NAN):
            gradient = results(
                F.cross_entropy, x, labels, scale, reduction=reduction, backend=backend
            )[1]
            assert not gradient.isfinite().any()
    leaf = x.clone().requires_grad_()
    y = F.cross_entropy(leaf, labels, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(y, leaf, torch.tensor([0, INF, NAN]).to(y))
    assert (gradient[0] == 0).all()
    assert not gradient[1:].isfinite().any()
    assert gradient[2].isnan().all()


@on_each
def test_weights_of_zero(backend):
    x = draw(4, 3)
    labels = torch.tensor([0, 1, 2, 0], device=DEVICE)
    for weight in ([0.0, 1, 2], [0.0, 0, 2], [0.0, 0, 0]):
        w = torch.tensor(weight, dtype=x.dtype, device=DEVICE)
        for smoothing, reduction in itertools.product((0.0, 0.1), REDUCTIONS):
            options = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
            ours = results(F.cross_entropy, x, labels, **options, backend=backend)
            truth = results(TF.cross_entropy, x, labels, **options)
            torch.testing.assert_close(ours[0], truth[0], equal_nan=True)
            if sum(weight):
                torch.testing.assert_close(ours[1], truth[1])
            assert reduction != "mean" or sum(weight) or not ours[1].isfinite().any()
    # All that is counted weighs nothing, while smoothing has something to spread.
    options = {"weight": torch.tensor([0.0, 1, 2], device=DEVICE), "label_smoothing": 0.1}
    for result in results(F.cross_entropy, x, labels * 0, **options, backend=backend):
        assert result.isnan().all()


@on_each
def test_a_mean_over_many_positions_loses_nothing(backend):
    # A sum in float32 would be off by 1e-4 of it: most of what is added is below half an ulp.
    n = 2000 if is_interpreted(backend) else 300_000
    x = torch.zeros(n, 2, device=DEVICE)
    x[:, 1] = torch.linspace(0, 9, n)
    x[0, 0] = 3e4
    labels = torch.ones(n, dtype=torch.int64, device=DEVICE)
    for reduction in ("mean", "sum"):
        loss = F.cross_entropy(x, labels, reduction=reduction, backend=backend)
        truth = TF.cross_entropy(x.double(), labels, reduction=reduction)
        if backend == "reference":
            torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        else:
            assert distance([loss], [truth]) <= 2**-22 * float(truth)
