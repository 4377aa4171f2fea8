"""Cross-entropy's Triton kernels: values and gradients in every tiling, and edges."""

import dataclasses
import itertools
import math

import pytest
import torch

from reg_kernels import functional as F
from reg_kernels.augment import MixedTarget
from reg_kernels.reference import cross_entropy as reference

from support import DEVICE, DTYPE_IDS, DTYPES

triton = pytest.importorskip("triton")

from reg_kernels.triton import _loss  # noqa: E402
from reg_kernels.triton import cross_entropy as kernels  # noqa: E402

from losses import (  # noqa: E402
    INTERPRETED,
    KINDS,
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
SHAPES = [
    (5, 1),
    (20, 2),
    (7, 5),
    (3, 33),
    (2, 300),
    (2, 3, 7),
    (2, 5, 3, 3),
    (1, 2, 129),
    (3, 33, 4),
    (4, 1, 5),
    (2, 21, 2, 3, 2),
]
IGNORED = -100


def check(x, *options):
    """The op's results, held to the reference's in float64, as the backward's are."""
    ours = kernels.cross_entropy(x, *options, True)
    truth = reference.cross_entropy(*in_double((x, *options)), True)
    compute = torch.promote_types(x.dtype, FLOAT)
    assert ours[0].dtype == ours[1].dtype == compute
    size = 10.0 * (x.numel() / x.shape[1] if options[-2] == SUM else 1.0)
    assert_close(ours[0], truth[0], x.dtype, size)
    assert_close(ours[1], truth[1], x.dtype, float(truth[1].abs().max()))
    gradient_is(ours[2], truth[2], x)
    g = torch.randn_like(ours[0])
    arguments = (g, x, ours[1], *options)
    truth = reference.cross_entropy_backward(*in_double(arguments))
    gradient_is(kernels.cross_entropy_backward(*arguments), truth, x)
    return ours


def gradient_is(ours, truth, x):
    assert ours.dtype == x.dtype
    assert ours.stride() == x.stride()
    assert_close(ours, truth, x.dtype, max(0.1, float(truth.abs().max())))


VARIETY = list(itertools.product(KINDS, [True, False], [0.1, 0.0], [MEAN, SUM, NONE]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, channels_last, tiling):
    x = logits(shape, FLOAT, channels_last)
    number = SHAPES.index(shape) + channels_last
    for kind in (KINDS[number % 4], KINDS[(number + 2) % 4]):
        _, *rest = VARIETY[number * 7 % len(VARIETY)]
        check(x, *target_of(x, kind, *rest))


@pytest.mark.parametrize(
    ("tiling", "kind", "weighted", "label_smoothing", "reduction"),
    in_either_tiling(KINDS, [False, True], [0.0, 0.1, 1.0], [NONE, MEAN, SUM]),
    indirect=["tiling"],
)
def test_options(tiling, kind, weighted, label_smoothing, reduction):
    x = logits(((2, 5, 3), (3, 37))[(weighted + reduction) % 2], FLOAT)
    check(x, *target_of(x, kind, weighted, label_smoothing, reduction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_dtypes(dtype, kind, tiling):
    shape, channels_last = [((2, 5, 3, 3), False), ((2, 8, 3, 1), True), ((3, 40), False)][
        (KINDS.index(kind) + DTYPES.index(dtype)) % 3
    ]
    x = logits(shape, dtype, channels_last)
    check(x, *target_of(x, kind, True, 0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient(kind, tiling):
    x = logits((2, 9, 3), FLOAT)
    options = target_of(x, kind, True, 0.1)
    with_it = kernels.cross_entropy(x, *options, True)
    without = kernels.cross_entropy(x, *options, False)
    assert without[2].shape == (0,)
    for ours, theirs in zip(without[:2], with_it[:2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_one_factor_for_losses_that_are_not_reduced(kind):
    x = logits((4, 6), FLOAT)
    options = target_of(x, kind, reduction=NONE)
    stats = kernels.cross_entropy(x, *options, False)[1]
    g = torch.tensor(-2.5, device=DEVICE)
    one, each = (
        kernels.cross_entropy_backward(g, x, stats, *options) for g in (g, g.expand(4).contiguous())
    )
    assert torch.equal(one, each)


def test_probabilities_in_the_type_that_is_computed_in():
    x = logits((3, 6), torch.float16)
    options = target_of(x, "probabilities")
    check(x, options[0].float(), *options[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("count", [1, 3])
def test_shares_of_any_type(dtype, count):
    x = logits((3, 4, 5), FLOAT)
    options = target_of(x, "pair")
    check(x, *options[:2], torch.rand(count).to(DEVICE, dtype), *options[3:])


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_more_classes_than_a_tile_holds(kind):
    x = logits((2, 33_001), FLOAT)
    check(x, *target_of(x, kind, label_smoothing=0.1 if kind == "labels" else 0.0))


def test_a_pair_of_one_label():
    x = logits((4, 6), FLOAT)
    target, _, *rest = target_of(x, "pair", True, 0.1)
    check(x, target, target, *rest)


def test_labels_in_many_parts(monkeypatch):
    monkeypatch.setattr(_loss, "LABELS", 4)
    monkeypatch.setattr(_loss, "LABEL_PROGRAMS", 3)
    x = logits((7, 3, 5), FLOAT)
    for kind in ("labels", "pair"):
        check(x, *target_of(x, kind, True))


@pytest.mark.parametrize("index", [0, 2, 6, -1])
def test_any_label_may_be_ignored(index, tiling):
    x = logits((9, 5), FLOAT)
    options = target_of(x, "pair", True, 0.1, NONE, ignore_index=index)
    ours = check(x, *options)
    nothing = (options[0] == index) & (options[1] == index)
    assert nothing.any()
    assert not ours[0][nothing].any()
    assert not ours[2][nothing].any()


# Edges


def against_torch(x, target, **options):
    """Losses and gradients of the op through autograd, and torch's of float64."""
    theirs = torch.nn.functional.cross_entropy
    results = []
    for function, values in ((F.cross_entropy, x), (theirs, x.double())):
        values = values.detach().requires_grad_()
        more = {"backend": "triton"} if function is F.cross_entropy else {}
        loss = function(values, target, **options, **more)
        (gradient,) = torch.autograd.grad(loss.sum(), values)
        results.append((loss.detach(), gradient))
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, x.dtype, 10.0)
    return results[0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infinite_logits(label_smoothing, tiling):
    inf = math.inf
    x = torch.zeros(6, 40, device=DEVICE)
    x[1, 3:30] = -inf  # with its label among the others
    x[2, 1] = -inf  # its label
    x[3] = -inf
    x[4, 7] = inf
    x[5, 8] = math.nan
    x[0, :35] = -inf  # the first tiles, where there are several
    target = torch.tensor([36, 2, 1, 1, 1, 1], device=DEVICE)
    loss, gradient = against_torch(x, target, reduction="none", label_smoothing=label_smoothing)
    if label_smoothing == 0.0:
        assert loss[2] == inf
        assert loss[:2].isfinite().all()
        assert not gradient[0, :35].any()
    assert loss[3:].isnan().all()
    assert gradient[3:].isnan().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits(label_smoothing, tiling):
    x = torch.randn(4, 40, device=DEVICE)
    x[0] += 1e4
    x[1] -= 1e4
    x[2, 39] = 1e4
    x[3, 0], x[3, 39] = -1e4, 1e4
    target = torch.tensor([3, 3, 3, 0], device=DEVICE)
    loss, _ = against_torch(x, target, reduction="none", label_smoothing=label_smoothing)
    if label_smoothing == 0.0:
        assert loss[3] == 2e4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["labels", "pair"])
def test_an_ignored_position_counts_for_nothing(kind, value, tiling):
    x = logits((3, 20), FLOAT)
    options = target_of(x, kind, True, 0.1)
    for labels in options[:2]:
        if labels is not None:
            labels[:] = torch.tensor([4, IGNORED, 19])
    x[1, 2:15] = value
    loss, _, gradient = kernels.cross_entropy(x, *options, True)
    assert loss.isfinite()
    assert gradient[[0, 2]].isfinite().all()
    assert not gradient[1].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored(reduction):
    x = logits((3, 4), FLOAT)
    loss, gradient = against_torch(x, torch.full((3,), IGNORED, device=DEVICE), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss == 0
    assert not gradient.any()


def test_a_mean_of_which_the_partners_are_all_ignored():
    x = logits((3, 4), FLOAT)
    target, partner, *rest = target_of(x, "pair")
    partner.fill_(IGNORED)
    loss, _, gradient = kernels.cross_entropy(x, target, partner, *rest, True)
    assert loss.isnan()
    assert gradient.isfinite().all()


@pytest.mark.skipif(not INTERPRETED, reason="an assertion would end the process")
@pytest.mark.parametrize("reduction", [NONE, MEAN])
@pytest.mark.parametrize("wrong", [5, -1])
@pytest.mark.parametrize("partner", [False, True])
def test_labels_out_of_range_are_asserted(partner, wrong, reduction, monkeypatch):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, **_loss.ASSERTING)
    monkeypatch.setattr(type(builder), "options", options, raising=False)
    monkeypatch.delattr(builder, "options", raising=False)
    x = logits((4, 5), FLOAT)
    arguments = target_of(x, "pair", reduction=reduction)
    kernels.cross_entropy(x, *arguments, True)
    arguments[partner][2] = wrong
    with pytest.raises(interpreter.InterpreterError, match="neither in"):
        kernels.cross_entropy(x, *arguments, True)


# Through autograd


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_autograd(dtype, reduction):
    x = logits((4, 6, 3), dtype).requires_grad_()
    target = torch.randint(0, 6, (4, 3), device=DEVICE)
    loss = F.cross_entropy(x, target, reduction=reduction, backend="triton")
    g = torch.randn_like(loss)
    first, second = (torch.autograd.grad(loss, x, g, retain_graph=True)[0] for _ in range(2))
    y = x.detach().double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(y, target, reduction=reduction)
    assert loss.dtype == dtype
    assert_close(loss.detach(), truth.detach(), dtype, 10.0)
    (truth,) = torch.autograd.grad(truth, y, g.double())
    # The gradient that was kept is rounded before it is multiplied.
    for gradient in (first, second):
        torch.testing.assert_close(
            gradient.double(), truth, rtol=3 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
        )


def test_a_mixed_target():
    x = logits((6, 5), FLOAT).requires_grad_()
    labels, partners = (torch.randint(0, 5, (6,), device=DEVICE) for _ in range(2))
    target = MixedTarget(labels, partners, torch.rand(6, device=DEVICE), 0.1)
    loss = F.cross_entropy(x, target, backend="triton")
    truth = torch.nn.functional.cross_entropy(x, target.to_dense(5))
    assert_close(loss.detach(), truth.detach().double(), FLOAT)
    ours, theirs = (torch.autograd.grad(y, x)[0] for y in (loss, truth))
    assert_close(ours, theirs.double(), FLOAT)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits(kind):
    x = logits((50, 7, 9), FLOAT)
    options = target_of(x, kind, True, 0.1)
    first, second = (kernels.cross_entropy(x, *options, True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_rescale(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    for size in (1, 16, 32, 83, 0):  # one program, which goes on to the next block
        x = torch.randn(size).to(DEVICE, dtype)
        truth = (x.double() * -0.75).to(dtype)
        compute = torch.promote_types(dtype, FLOAT)
        kernels.rescale_(x, torch.tensor(-0.75, dtype=compute, device=DEVICE))
        rtol = torch.finfo(dtype).eps if INTERPRETED and dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(x, truth, rtol=rtol, atol=0.0)


def test_rescaling_by_1_touches_nothing():
    # A signalling NaN would become a quiet one.
    bits = torch.full((40,), 0x7F800001, dtype=torch.int32, device=DEVICE)
    x = bits.clone().view(FLOAT)
    kernels.rescale_(x, torch.ones((), device=DEVICE))
    assert torch.equal(x.view(torch.int32), bits)
    kernels.rescale_(x, torch.full((), 2.0, device=DEVICE))
    assert not torch.equal(x.view(torch.int32), bits)
