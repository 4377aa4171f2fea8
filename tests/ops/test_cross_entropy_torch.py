"""The losses where more is done with a gradient than one backward, and where there is nothing."""

import math

import pytest
import torch
import torch.nn.functional as TF
from loss_inputs import overload_of

from reg_kernels import functional as F
from reg_kernels._mixed_target import MixedTarget

from support import DEVICE, implementations

on_each = pytest.mark.parametrize("backend", implementations())


@on_each
@pytest.mark.parametrize("classes", [3, 64])
@pytest.mark.parametrize("incoming", [math.inf, math.nan, 2.0])
@pytest.mark.parametrize("logit", [0.0, -math.inf, math.inf, math.nan])
def test_an_ignored_position_has_no_gradient(classes, incoming, logit, backend):
    for shape in ((2, classes), (2, classes, 5)):
        x = torch.randn(shape, device=DEVICE)
        x[0] = logit
        x.requires_grad_()
        target = torch.ones(shape[:1] + shape[2:], dtype=torch.int64, device=DEVICE)
        target[0] = -100
        loss = F.cross_entropy(x, target, reduction="none", backend=backend)
        g = torch.ones_like(loss)
        g[0] = incoming
        gradient = torch.autograd.grad(loss, x, g)[0]
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        assert gradient[1].isfinite().all()


@on_each
def test_batched_gradients(backend):
    x = torch.randn(4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.tensor([0, 4, 1, 2], device=DEVICE)
    factors = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
    ours = F.cross_entropy(x, y, backend=backend)
    # Twice: the gradient that the forward kept is still there the first time.
    for _ in range(2):
        batch = torch.autograd.grad(ours, x, factors, is_grads_batched=True, retain_graph=True)[0]
        one = torch.autograd.grad(TF.cross_entropy(x, y), x)[0]
        torch.testing.assert_close(batch, factors.view(3, 1, 1) * one)
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], one)


@on_each
def test_a_weight_that_requires_grad(backend):
    x = torch.randn(4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    probabilities = torch.rand(4, 5, dtype=torch.float64, device=DEVICE)
    weight = torch.rand(5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ours = F.cross_entropy(x, probabilities, weight, backend=backend)
    theirs = TF.cross_entropy(x, probabilities, weight)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight)),
        torch.autograd.grad(theirs, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@on_each
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 4)])
def test_the_ops_take_no_logits_at_all(shape, backend):
    x = torch.empty(shape, device=DEVICE)
    labels = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device=DEVICE)
    for name, first, last in (("cross_entropy", (), ()), ("distillation", (x,), (2.0, 0.5, None))):
        forward, backward = overload_of(name, backend), overload_of(f"{name}_backward", backend)
        for reduction, expected in ((0, labels.float()), (1, math.nan), (2, 0.0)):
            args = (*first, labels, None, None, 1.0, None, -100, 0.0, reduction, None, *last)
            loss, stats, gradient = forward(x, *args, True)
            expected = torch.as_tensor(expected, device=DEVICE)
            assert torch.equal(loss.nan_to_num(7.0), expected.nan_to_num(7.0))
            assert stats.shape[1:] == labels.shape
            assert gradient.shape == backward(torch.ones_like(loss), x, stats, *args).shape == shape


@on_each
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_for_a_number_of_positions_that_depends_on_values(backend):
    def masked(x, y, mask):
        return F.cross_entropy(x[mask], y[mask], backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(6, 5, device=DEVICE), torch.tensor([0, 4, 1, 2, 3, 0], device=DEVICE)
    for mask in (y > 1, y > 0, y > 9):
        expected = TF.cross_entropy(x[mask], y[mask])
        torch.testing.assert_close(compiled(x, y, mask), expected, equal_nan=True)


@on_each
def test_what_is_no_tensor(backend):
    x, y = torch.randn(4, 5, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(TypeError, match="weight must be a Tensor, got list"):
        F.cross_entropy(x, y, [1.0] * 5, backend=backend)
    for lam in (None, "0.3"):
        with pytest.raises(TypeError, match="lam must be a number, got"):
            F.cross_entropy(x, MixedTarget(y, y, lam), backend=backend)
