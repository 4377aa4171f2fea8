"""Distillation's Triton kernels: values and gradients in every tiling, and edges."""

import math

import pytest
import torch

from reg_kernels import functional as F
from reg_kernels.reference import distillation as reference

from support import DEVICE, DTYPE_IDS, DTYPES

triton = pytest.importorskip("triton")

from reg_kernels.triton import distillation as kernels  # noqa: E402

from losses import (  # noqa: E402
    MEAN,
    NONE,
    QUIET,
    SUM,
    assert_close,
    in_double,
    in_either_tiling,
    logits,
    target_of,
)

pytestmark = [*QUIET, pytest.mark.usefixtures("poisoned_memory")]
FLOAT = torch.float32
SHAPES = [(5, 1), (20, 2), (7, 5), (3, 33), (2, 300), (2, 3, 7), (2, 5, 3, 3), (3, 33, 4)]
KINDS = ["labels", "pair", "one lam"]
T, ALPHA = 2.5, 0.7


def check(x, teacher, *options, temperature=T, alpha=ALPHA):
    """The op's results, held to the reference's in float64, as the backward's are."""
    last = (temperature, alpha, None)
    ours = kernels.distillation(x, teacher, *options, *last, True)
    truth = reference.distillation(*in_double((x, teacher, *options)), *last, True)
    assert ours[0].dtype == ours[1].dtype == torch.promote_types(x.dtype, FLOAT)
    size = 20.0 * (x.numel() / x.shape[1] if options[-2] == SUM else 1.0)
    assert_close(ours[0], truth[0], x.dtype, size)
    assert_close(ours[1], truth[1], x.dtype, float(truth[1].abs().max()))
    gradient_is(ours[2], truth[2], x)
    g = torch.randn_like(ours[0])
    arguments = (g, x, ours[1], teacher, *options)
    truth = reference.distillation_backward(*in_double(arguments), *last)
    gradient_is(kernels.distillation_backward(*arguments, *last), truth, x)
    return ours


def gradient_is(ours, truth, x):
    assert ours.dtype == x.dtype
    assert ours.stride() == x.stride()
    assert_close(ours, truth, x.dtype, max(0.1, float(truth.abs().max())))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, channels_last, tiling):
    x, teacher = (logits(shape, FLOAT, channels_last) for _ in range(2))
    number = SHAPES.index(shape) + channels_last
    options = target_of(x, KINDS[number % 3], number % 4 < 2, 0.1 * (number % 2), number % 3)
    check(x, teacher, *options)


@pytest.mark.parametrize(
    ("tiling", "kind", "weighted", "label_smoothing", "reduction"),
    in_either_tiling(KINDS, [False, True], [0.0, 0.1], [NONE, MEAN, SUM]),
    indirect=["tiling"],
)
def test_options(tiling, kind, weighted, label_smoothing, reduction):
    shape = ((2, 5, 3), (3, 37))[(weighted + reduction) % 2]
    x, teacher = (logits(shape, FLOAT) for _ in range(2))
    check(x, teacher, *target_of(x, kind, weighted, label_smoothing, reduction))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_temperatures(alpha, temperature, tiling):
    x, teacher = (logits((3, 37), FLOAT) for _ in range(2))
    check(x, teacher, *target_of(x, "pair"), temperature=temperature, alpha=alpha)


@pytest.mark.parametrize("teacher_dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_dtypes(dtype, teacher_dtype, tiling):
    shape, channels_last = [((2, 5, 3, 3), False), ((2, 8, 3, 1), True), ((3, 40), False)][
        (DTYPES.index(dtype) + DTYPES.index(teacher_dtype)) % 3
    ]
    x = logits(shape, dtype, channels_last)
    teacher = logits(shape, teacher_dtype, channels_last)
    check(x, teacher, *target_of(x, "pair", True, 0.1))


def test_more_classes_than_a_tile_holds():
    x, teacher = (logits((2, 8_201), FLOAT) for _ in range(2))
    check(x, teacher, *target_of(x, "pair"))


def test_a_pair_of_one_label():
    x, teacher = (logits((4, 6), FLOAT) for _ in range(2))
    target, _, *rest = target_of(x, "pair", True, 0.1)
    check(x, teacher, target, target, *rest)


def test_a_teacher_that_is_the_student(tiling):
    # No divergence, but for roundings; the labels' part is at 1 - alpha.
    x = logits((3, 37), FLOAT)
    loss = check(x, x.clone(), *target_of(x, "labels", reduction=NONE), alpha=1.0)[0]
    assert float(loss.abs().max()) < 1e-5


def rising(tiles, step):
    """Logits whose maximum rises by `step` from each ten classes to the next."""
    return torch.randn(1, 10 * tiles, device=DEVICE) + step * (
        torch.arange(10 * tiles, device=DEVICE) // 10
    )


@pytest.mark.parametrize(
    "steps", [(50, 0), (0, 50), (100, -100), (1e4, 1e4), (-1e4, -1e4)], ids=str
)
def test_large_logits(steps, tiling):
    x, teacher = (rising(4, step) for step in steps)
    target = target_of(x, "labels", reduction=NONE)
    target[0].fill_(39)
    check(x, teacher, *target, temperature=1.0)


def test_smoothing_over_large_logits(tiling):
    x, teacher = (logits((2, 40), FLOAT) + 1e4 for _ in range(2))
    options = target_of(x, "labels", label_smoothing=1.0, reduction=NONE)
    options[0].fill_(3)
    check(x, teacher, *options, alpha=0.0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infinite_logits(label_smoothing, tiling):
    inf = math.inf
    x, teacher = (torch.randn(7, 40, device=DEVICE) for _ in range(2))
    teacher[0, 3:30] = -inf  # classes that the teacher excludes
    teacher[1, :20] = -inf  # the first tiles, where there are several
    x[2, 5] = -inf  # that the student excludes
    x[3, :20] = -inf
    x[4, 5] = teacher[4, 5] = -inf  # that both do
    x[5] = -inf
    teacher[6] = -inf
    target = torch.full((7,), 25, device=DEVICE)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    results = []
    for backend, values in (("triton", x), ("reference", x.double())):
        values = values.detach().requires_grad_()
        loss = F.distillation_loss(
            values, teacher.to(values.dtype), target, **options, backend=backend
        )
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), values)[0]))
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, FLOAT, 10.0)
    loss, gradient = results[0]
    assert loss[:2].isfinite().all()
    assert gradient[:2].isfinite().all()
    assert (loss[2:4] == inf).all()
    assert loss[4:].isnan().all()


@pytest.mark.parametrize("kind", ["labels", "pair"])
def test_an_ignored_positions_divergence_counts(kind, tiling):
    x, teacher = (logits((3, 20), FLOAT) for _ in range(2))
    options = target_of(x, kind, True, 0.1, NONE)
    for labels in options[:2]:
        if labels is not None:
            labels.fill_(-100)
    loss, _, gradient = check(x, teacher, *options)
    assert (loss > 0).all()
    assert gradient.any(1).all()


def test_a_mean_of_labels_that_are_all_ignored():
    x, teacher = (logits((3, 4), FLOAT) for _ in range(2))
    target, *rest = target_of(x, "labels")
    target.fill_(-100)
    loss, _, gradient = kernels.distillation(x, teacher, target, *rest, T, ALPHA, None, True)
    assert loss.isnan()
    q, p = (values.double().div(T).softmax(1) for values in (x, teacher))
    assert_close(gradient, ALPHA * T * (q - p) / 3, FLOAT)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_autograd(dtype, reduction):
    x = logits((4, 6, 3), dtype).requires_grad_()
    teacher = logits((4, 6, 3), dtype)
    target = torch.randint(0, 6, (4, 3), device=DEVICE)
    y = x.detach().double().requires_grad_()
    options = {"temperature": T, "alpha": ALPHA, "reduction": reduction}
    loss = F.distillation_loss(x, teacher, target, **options, backend="triton")
    truth = F.distillation_loss(y, teacher.double(), target, **options, backend="reference")
    assert loss.dtype == dtype
    assert_close(loss.detach(), truth.detach(), dtype, 20.0)
    g = torch.randn_like(loss)
    first, second = (torch.autograd.grad(loss, x, g, retain_graph=True)[0] for _ in range(2))
    (truth,) = torch.autograd.grad(truth, y, g.double())
    # The gradient that was kept is rounded before it is multiplied.
    for gradient in (first, second):
        torch.testing.assert_close(
            gradient.double(),
            truth,
            rtol=3 * torch.finfo(dtype).eps,
            atol=3 * torch.finfo(dtype).eps,
        )


def test_two_runs_give_the_same_bits():
    x, teacher = (logits((50, 7, 9), FLOAT) for _ in range(2))
    options = target_of(x, "pair", True, 0.1)
    first, second = (
        kernels.distillation(x, teacher, *options, T, ALPHA, None, True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
