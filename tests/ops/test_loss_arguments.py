"""What the losses and mixup are given in place of plain floats and tensors: numbers that vary in a
compiled program, numbers of other kinds, tensors that torch.jit.trace records, no target at all."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from loss_inputs import compiling, draw
from torch.library import opcheck

from reg_kernels import functional as F
from reg_kernels import nn
from reg_kernels.augment import MixedTarget, Mixup

from support import DEVICE, implementations

on_each = pytest.mark.parametrize("backend", implementations())
INF, NAN = math.inf, math.nan
Y = torch.tensor([0, 4, 2], device=DEVICE)
X = torch.tensor([[0.5, -1, 2, 0, 3], [1, 0, 0, -2, 0.25], [3, 1, -1, 0, 0]], device=DEVICE)
TEACHER = X.flip(1)
IMAGES = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def mixed(lam=0.3, smoothing=0.0):
    return MixedTarget(Y, Y.flip(0), lam, smoothing)


# Each with values that it may have; the first of all is a constant of the first program.
VARYING = {
    "temperature": (lambda x, v, b: F.distillation_loss(x, TEACHER, Y, temperature=v, backend=b)),
    "whole temperature": (
        lambda x, v, b: F.distillation_loss(x, TEACHER, Y, temperature=v, backend=b)
    ),
    "alpha": (
        lambda x, v, b: F.distillation_loss(
            x, TEACHER, mixed(), alpha=v, reduction="sum", backend=b
        )
    ),
    "without labels": (
        lambda x, v, b: F.distillation_loss(x, TEACHER, temperature=v, alpha=1, backend=b)
    ),
    "smoothing": lambda x, v, b: F.cross_entropy(x, Y, X[0].exp(), label_smoothing=v, backend=b),
    "smoothing and temperature": (
        lambda x, v, b: F.distillation_loss(
            *(x, TEACHER, mixed(), X[0].exp()), temperature=v, label_smoothing=v, backend=b
        )
    ),
    "smoothing of probabilities": (
        lambda x, v, b: F.cross_entropy(x, TEACHER.softmax(1), label_smoothing=v, backend=b)
    ),
    "the target's": lambda x, v, b: F.cross_entropy(x, mixed(v, v), backend=b),
    "ignore_index": lambda x, v, b: F.cross_entropy(x, Y, ignore_index=v, backend=b),
    "lam": lambda x, v, b: F.mixup(x, v, backend=b),
    "mean": lambda x, v, b: F.mixup(x.view(3, 1, 5), 0.5, mean=v, std=0.5, backend=b),
    "std": lambda x, v, b: F.mixup(x, 0.5, mean=(0.5,), std=(v,) * 5, backend=b),
    "dense": lambda x, v, b: F.cross_entropy(x, mixed(v, v).to_dense(5).to(x), backend=b),
}


def with_gradient(function, x, *args):
    leaf = x.detach().requires_grad_()
    y = function(leaf, *args)
    return [y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]]


@on_each
@pytest.mark.parametrize("name", VARYING)
def test_a_number_that_varies_takes_two_compilations(name, backend):
    function = VARYING[name]
    with compiling("aot_eager") as (compiled, counter):
        traced = compiled(lambda x, v: function(x, v, backend))
        whole = name in ("whole temperature", "ignore_index")
        for value in (4, 2, 7, 3, 9) if whole else (0.4, 0.1, 0.7, 0.2, 0.9):
            ours = with_gradient(traced, X, value)
            expected = with_gradient(function, X, value, backend)
            torch.testing.assert_close(ours, expected, rtol=3e-6, atol=1e-6)
        assert counter.frame_count <= 2


def test_numbers_that_vary_by_inductor():
    def function(x, v):
        return F.distillation_loss(x, TEACHER, mixed(v), temperature=v, label_smoothing=v)

    with compiling("inductor") as (compiled, counter), torch.no_grad():
        traced = compiled(function)
        for value in (0.4, 0.1, 0.7):
            torch.testing.assert_close(traced(X, value), function(X, value))
        assert counter.frame_count <= 2


def test_opcheck_of_a_traced_smoothing():
    x, labels = torch.randn(2, 3, 2, device=DEVICE), torch.tensor([[0, 1], [2, 2]], device=DEVICE)
    smoothing = torch.tensor([0.1], dtype=torch.float64, device=DEVICE)
    target = (labels, None, None, 1.0, None, 2, 0.0, 2, smoothing)
    ops = torch.ops.reg_kernels
    opcheck(ops.cross_entropy.default, (x.requires_grad_(), *target, True))
    loss, stats, _ = ops.cross_entropy(x.detach(), *target, False)
    opcheck(ops.cross_entropy_backward.default, (torch.randn_like(loss), x, stats, *target))
    target = (x.detach().cos(), *target, 2.0, 0.5, None)
    opcheck(ops.distillation.default, (x, *target, True))


def test_a_number_that_varies_is_checked():
    with compiling("aot_eager") as (compiled, _):
        traced = compiled(lambda v: F.distillation_loss(X, TEACHER, Y, temperature=v))
        for value in (2.0, 3.0):
            traced(value)
        with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
            VARYING["temperature"](X, -1.0, None)
        with pytest.raises(Exception, match="temperature must be positive"):
            traced(-1.0)


# Numbers as torch takes them

KINDS = {
    "numpy": np.float32,
    "double": np.float64,
    "tensor": lambda value: torch.tensor(value, device=DEVICE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_other_kinds(kind):
    half = KINDS[kind](0.5)
    one, ignored = np.int64(1), torch.tensor(4) if kind == "tensor" else np.int32(4)
    options = {"label_smoothing": 0.5, "ignore_index": 4}
    given = {"label_smoothing": half, "ignore_index": ignored}
    expected = TF.cross_entropy(X, Y, **options)
    for loss in (
        TF.cross_entropy(X, Y, **given),
        F.cross_entropy(X, Y, **given),
        nn.CrossEntropyLoss(**given)(X, Y),
        F.cross_entropy(X, MixedTarget(Y, Y, half, half), ignore_index=ignored),
    ):
        torch.testing.assert_close(loss, expected)
    soft = {"temperature": 0.5, "alpha": 0.5}
    expected = F.distillation_loss(X, TEACHER, Y, **options, **soft)
    given |= {"temperature": half, "alpha": half}
    assert F.distillation_loss(X, TEACHER, Y, **given).equal(expected)
    layer = nn.DistillationLoss(**given)
    assert layer(X, TEACHER, Y).equal(expected)
    assert "temperature=0.5, alpha=0.5" in repr(layer)
    assert F.distillation_loss(X, TEACHER, alpha=one).isfinite()
    plain = F.mixup(IMAGES, 0.5, mean=0.5, std=(0.5, 0.5))
    torch.testing.assert_close(F.mixup(IMAGES, half, mean=half, std=[half, half]), plain)
    mixup = Mixup(half, half, prob=half, switch_prob=half, label_smoothing=half, seed=one)
    assert repr(mixup) == repr(Mixup(0.5, 0.5, None, 0.5, 0.5, label_smoothing=0.5, seed=1))


@pytest.mark.parametrize("wrong", ["0.5", None, 1j, X[0], X[0, 0].clone().requires_grad_()])
def test_what_is_no_number(wrong):
    for call in (
        lambda: F.cross_entropy(X, Y, label_smoothing=wrong),
        lambda: F.cross_entropy(X, Y, ignore_index=wrong),
        lambda: F.cross_entropy(X, mixed(0.5, wrong)),
        lambda: F.distillation_loss(X, TEACHER, Y, temperature=wrong),
        lambda: nn.DistillationLoss(alpha=wrong),
        lambda: F.mixup(IMAGES, 0.5, std=[wrong, 1.0]),
        lambda: Mixup(wrong),
    ):
        with pytest.raises(TypeError, match=r"must be (a number|an integer)"):
            call()


# No target


@on_each
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_distillation_without_a_target(reduction, backend):
    for shape in ((3, 5), (5,), (2, 7, 3), (0, 4)):
        x, teacher = draw(*shape), draw(*shape)
        dim = min(1, len(shape) - 1)

        def by_torch(x, teacher=teacher, dim=dim):
            log_q, log_p = (x / 3).log_softmax(dim), (teacher / 3).log_softmax(dim)
            each = 9 * TF.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim)
            return each if reduction == "none" else getattr(each, reduction)()

        options = {"temperature": 3.0, "alpha": 1.0, "reduction": reduction, "backend": backend}
        loss = functools.partial(F.distillation_loss, teacher=teacher, **options)
        expected = with_gradient(by_torch, x)
        for ours in (with_gradient(loss, x), with_gradient(lambda x, f=loss: f(x, target=None), x)):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13, equal_nan=True)
        layer = nn.DistillationLoss(
            3.0, 1.0, torch.rand(4), reduction=reduction, label_smoothing=0.1, backend=backend
        )
        torch.testing.assert_close(layer(x, teacher), expected[0], equal_nan=True)


def test_a_target_may_be_left_out_with_an_alpha_of_1_alone():
    message = r"^distillation_loss: target must be given unless alpha is 1, got alpha 0\.5$"
    for call in (F.distillation_loss, nn.DistillationLoss()):
        with pytest.raises(TypeError, match=message):
            call(X, TEACHER)
    with pytest.raises(TypeError, match="target must be a Tensor or a MixedTarget, got NoneType"):
        F.cross_entropy(X, None)


# Values: a loss that counts for nothing is a part of the sum all the same


@on_each
@pytest.mark.parametrize("lam", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("layout", ["short", "long", "planes"])
def test_a_share_of_nothing_of_an_infinite_loss(layout, lam, backend):
    shape = {"short": (4, 5), "long": (4, 70), "planes": (4, 5, 3)}[layout]
    x = draw(*shape)
    x[0, 1], x[1] = -INF, x[1]
    labels = torch.full(shape[:1] + shape[2:], 3, device=DEVICE)
    partners = labels - 1
    partners[1], partners[3] = -100, -100
    x[3, 0] = -INF
    for smoothing, each in itertools.product((0.0, 0.1), (False, True)):
        share = torch.full((4,), lam, dtype=x.dtype, device=DEVICE) if each else lam
        ours = F.cross_entropy(
            *(x, MixedTarget(labels, partners, share)),
            label_smoothing=smoothing,
            reduction="none",
            backend=backend,
        )
        one, other = (
            TF.cross_entropy(x, y, label_smoothing=smoothing, reduction="none")
            for y in (labels, partners)
        )
        torch.testing.assert_close(ours, lam * one + (1 - lam) * other, equal_nan=True)
        if smoothing and lam != 0.5:
            assert ours[0].isnan().all()
            assert ours[2].isfinite().all()


# Recorded, and with batched gradients

RECORDED = {
    "cross_entropy": lambda x, y, b: F.cross_entropy(x, y, label_smoothing=0.1, backend=b),
    "each": lambda x, y, b: F.cross_entropy(x, y, reduction="none", backend=b),
    "mixed": lambda x, y, b: F.cross_entropy(x, MixedTarget(y, y.flip(0), 0.3), backend=b),
    "distillation": lambda x, y, b: F.distillation_loss(x, x.flip(1), y, backend=b),
    "mixup": lambda x, y, b: F.mixup(x, 0.3, y % len(x), mean=0.5, std=(0.5,), backend=b),
    "in place": lambda x, y, b: F.mixup(x * 1, 0.3, inplace=True, backend=b),
}


@on_each
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.filterwarnings("ignore")  # what is looked at is a constant of the program
def test_recorded_by_torch_jit(name, backend):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.5, device=DEVICE))

        def forward(self, x, y):
            return RECORDED[name](x * self.scale, y, backend)

    model = Model()
    program = torch.jit.trace(model, (X, Y), check_trace=False)
    for x, y in ((X, Y), (TEACHER - 1, Y.flip(0))):
        ours, expected = program(x, y), model(x, y)
        torch.testing.assert_close(ours, expected)
        ours, expected = (
            torch.autograd.grad(out.square().sum(), model.scale) for out in (ours, expected)
        )
        torch.testing.assert_close(ours, expected)


@on_each
@pytest.mark.parametrize("name", RECORDED)
def test_batched_gradients(name, backend):
    def function(x):
        return RECORDED[name](x, Y, backend)

    x = X.double().requires_grad_()
    y = function(x)
    batch = torch.randn(3, *y.shape, dtype=y.dtype, device=DEVICE)
    (ours,) = torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in batch]
    torch.testing.assert_close(ours, torch.stack(expected))
    for second_order in (torch.autograd.functional.hessian, torch.autograd.functional.jacobian):
        scalar = second_order is torch.autograd.functional.hessian

        def called(x, scalar=scalar):
            return function(x).square().sum() if scalar else function(x)

        ours, expected = (second_order(called, X.double(), vectorize=v) for v in (True, False))
        torch.testing.assert_close(ours, expected)
