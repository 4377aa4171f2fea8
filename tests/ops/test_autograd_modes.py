"""What torch.autograd does around BatchNorm with all it may be given, and Hessians of every op:
batched gradients, hooks on what is saved, and mutation of it; each beside what it gives without."""

import pytest
import torch

from reg_kernels import functional as F

from support import DEVICE

graph = torch.autograd.graph
STATE = torch.tensor([3, 4])
LABELS = torch.tensor([0, 1, 2, 0], device=DEVICE)
C = 3
MEAN, VAR = (torch.full((C,), v, dtype=torch.float64, device=DEVICE) for v in (0.5, 2.0))


def tracked():
    return MEAN.clone(), VAR.clone()


# Of x (4, C, 2)
FUNCTIONS = {
    "l1_penalty": lambda x: F.l1_penalty([x * 1]) ** 2 * x,
    "l2_penalty": lambda x: F.l2_penalty([x, x * 2]) ** 2 * x,
    "dropout": lambda x: F.dropout(x.transpose(1, 2), 0.3, rng_state=STATE) ** 2,
    "dropout1d": lambda x: F.dropout1d(x, 0.3, rng_state=STATE) ** 2,
    "dropout in place": lambda x: F.dropout(x * 1, 0.3, inplace=True, rng_state=STATE) ** 2,
    "without statistics": lambda x: F.batch_norm(x, None, None, x.sum((0, 2)), None, True),
    "batch_norm": lambda x: F.batch_norm(x, *tracked(), x.sum((0, 2)), None, True) ** 2,
    "with a counter": lambda x: F.batch_norm(
        *(x, *tracked(), None, None, True, None), num_batches_tracked=torch.tensor(3).to(DEVICE)
    ),
    "in evaluation": lambda x: F.batch_norm(x, MEAN, VAR) ** 2,
    "batch_norm_act": lambda x: F.batch_norm_act(
        *(x, None, None, None, None, x * x, True), drop=0.3, rng_state=STATE
    ),
    "silu": lambda x: F.batch_norm_act(x, *tracked(), None, None, x * x, True, activation="silu"),
    "cross_entropy": lambda x: F.cross_entropy(x.mean(2), LABELS) * x,
    "distillation": lambda x: F.distillation_loss(x.mean(2), x.detach().mean(2).cos(), LABELS) * x,
    "mixup": lambda x: F.mixup(x, 0.3) ** 2,
}
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def draw():
    return torch.randn(4, C, 2, dtype=torch.float64, device=DEVICE)


def gradient_of(function, x):
    return torch.autograd.grad(function(x).sin().sum(), x)[0]


@each
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(function, create_graph):
    x = draw().requires_grad_()
    y = function(x)
    g = torch.randn(2, *y.shape, dtype=y.dtype, device=DEVICE)

    def by(g, **options):
        return torch.autograd.grad(y, x, g, retain_graph=True, **options)[0]

    expected = torch.stack([by(one) for one in g])
    batched = by(g, is_grads_batched=True, create_graph=create_graph)
    torch.testing.assert_close(batched, expected)
    torch.testing.assert_close(torch.vmap(by)(g), expected)


@each
def test_vectorized_hessian(function):
    def value(x):
        return function(x).sin().sum()

    x = draw()
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(value, x, vectorize=True), hessian(value, x))


@each
def test_hooks_on_what_is_saved(function):
    x = draw().requires_grad_()
    expected = gradient_of(function, x)
    hooks = (lambda t: (t.clone(), t.device), lambda packed: packed[0])
    contexts = (
        graph.saved_tensors_hooks(*hooks),
        graph.save_on_cpu(),
        graph.disable_saved_tensors_hooks("none here"),
    )
    for context in contexts:
        with context:
            torch.testing.assert_close(gradient_of(function, x), expected, rtol=0, atol=0)


@each
def test_mutation_of_what_is_saved(function):
    x = draw().requires_grad_()
    expected = gradient_of(function, x)
    with graph.allow_mutation_on_saved_tensors():
        copy = x * 1
        value = function(copy).sin().sum()
        copy.detach().mul_(0)
        (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_mutation_of_running_statistics_that_were_saved():
    x = draw()
    w = torch.ones(C, dtype=torch.float64, device=DEVICE, requires_grad=True)
    mean, var = tracked()
    with graph.allow_mutation_on_saved_tensors():
        product = (mean * w).sum()
        F.batch_norm(x, mean, var, training=True)
        (gradient,) = torch.autograd.grad(product, w)
    assert torch.equal(gradient, MEAN)
    assert not torch.equal(mean, MEAN)
