"""torch.jit.trace of every op: the program that was saved and loaded gives what the layer gives,
with its gradients, for inputs of other sizes and layouts than it was traced with."""

import io
import warnings

import pytest
import torch

import reg_kernels
from reg_kernels import functional as F
from reg_kernels import nn

from support import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")

C = 3
LABELS = torch.tensor([0, 2], device=DEVICE)
STATE = torch.tensor([3, 4])


class Scaled(torch.nn.Module):
    """A function of an input that depends on a parameter."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, C))

    def forward(self, x):
        return self.function(x * self.weight.view(-1, 1, 1))


def chain():
    return reg_kernels.convert(
        torch.nn.Sequential(torch.nn.BatchNorm2d(C), torch.nn.ReLU(), torch.nn.Dropout(0.5)),
        fuse=True,
    )


def logits(x):
    return x.mean((2, 3))


MODULES = {
    "dropout in evaluation": lambda: Scaled(lambda x: F.dropout(x, training=False)),
    "batch_norm": lambda: nn.BatchNorm2d(C),
    "batch_norm without statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "cumulative average": lambda: nn.BatchNorm2d(C, momentum=None),
    "batch_norm_act": lambda: nn.BatchNormAct2d(C, activation="silu"),
    "residual": lambda: Scaled(
        lambda x: F.batch_norm_act(x, None, None, residual=x.cos(), training=True)
    ),
    "drop_path with a layer scale": lambda: Scaled(
        lambda x: F.drop_path(x, 0.5, layer_scale=x[0, 0, 0].detach().cos(), rng_state=STATE)
    ),
    "drop_path with a residual": lambda: Scaled(
        lambda x: F.drop_path(x, 0.5, residual=x.cos(), rng_state=STATE)
    ),
    "l1_penalty": lambda: Scaled(lambda x: F.l1_penalty([x, x * 2]) * x),
    "l2_penalty": lambda: Scaled(lambda x: F.l2_penalty(x) * x),
    "mixup": lambda: Scaled(lambda x: F.mixup(x, 0.3)),
    "cross_entropy": lambda: Scaled(lambda x: F.cross_entropy(logits(x), LABELS)),
    "distillation": lambda: Scaled(
        lambda x: F.distillation_loss(logits(x), logits(x.detach()).cos(), LABELS)
    ),
}
DRAWING = {  # the chains' gradients are no masks
    "dropout": lambda: Scaled(F.dropout),
    "dropout in place": lambda: Scaled(lambda x: F.dropout(x, inplace=True)),
    "dropout2d": lambda: Scaled(F.dropout2d),
    "layer": nn.Dropout,
    "chain": lambda: nn.BatchNormAct2d(C, drop=0.5),
    "fused chain": chain,
}


def traced(module, x, **options):
    """The program as another process gets it, and what tracing warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.jit.trace(module, x, **options)
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    caught = [w for w in caught if issubclass(w.category, torch.jit.TracerWarning)]
    return torch.jit.load(file), caught


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def others():
    """Inputs of two samples: of other sizes, and in other orders."""
    yield images(2, C, 4, 6)
    yield images(2, C, 4, 5, seed=1).contiguous(memory_format=torch.channels_last)
    yield images(2, C, 4, 5, seed=2).transpose(2, 3)
    yield images(2, C + 2, 4, 5, seed=3)[:, 1:-1]


def results(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], weights, allow_unused=True)
    return [y, *gradients, *module.buffers()]


@pytest.mark.parametrize("check_trace", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients(name, training, check_trace):
    module = MODULES[name]().to(DEVICE).train(training)
    program, _ = traced(module, images(2, C, 5, 4), check_trace=check_trace)
    module.load_state_dict(program.state_dict())
    for x in others():
        for ours, theirs in zip(results(program, x), results(module, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DRAWING)
def test_each_run_draws_anew_and_its_gradient_has_its_mask(name):
    module = DRAWING[name]().to(DEVICE)
    program, caught = traced(module, images(2, C, 5, 4) + 9, check_trace=False)
    assert not caught  # sizes are not for the program to see
    for x in others():
        x = (x + 9).requires_grad_()
        torch.manual_seed(1)
        first, second = program(x), program(x)
        torch.manual_seed(1)
        assert torch.equal(program(x), first)
        assert name == "dropout2d" or not torch.equal(first, second)  # of few channels
        (gradient,) = torch.autograd.grad(second.sum(), x)
        assert "chain" in name or torch.equal(gradient != 0, second != 0)


@pytest.mark.parametrize("mode", ["batch", "subset", "row"])
def test_a_block_that_skips_its_branch(mode):
    branch = torch.nn.Conv2d(C, C, 1)
    block = nn.StochasticDepthBlock(branch, 0.5, mode).to(DEVICE)
    torch.manual_seed(1)  # the coin of the batch, which the program keeps, lets the branch be
    program, _ = traced(block, images(8, C, 5, 4), check_trace=False)
    numbers = []
    for seed, last in enumerate(((4, 6), (4, 5), (5, 4))):
        given = images(8, C, *last, seed=seed)
        channels_last = given.contiguous(memory_format=torch.channels_last)
        for x in (given, channels_last, given.transpose(2, 3)):
            x.requires_grad_()
            y, full = program(x), x + 2 * branch(x)
            kept = (y != x).flatten(1).any(1)
            numbers.append(int(kept.sum()))
            expected = torch.where(kept.view(-1, 1, 1, 1), full, x)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            leaves = (x, program.branch.weight), (x, branch.weight)
            ours, theirs = (
                torch.autograd.grad(of.square().sum(), leaf)
                for of, leaf in zip((y, expected), leaves, strict=True)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if mode == "row":
        assert len(set(numbers)) > 1  # each run draws anew
    else:
        assert set(numbers) == {8 if mode == "batch" else 4}


def test_a_trace_for_a_graph_of_the_model():
    """As SummaryWriter.add_graph traces it."""
    model = torch.nn.Sequential(torch.nn.Conv2d(C, C, 1), *chain(), nn.Dropout2d()).to(DEVICE)
    program = torch.jit.trace(model, images(2, C, 5, 4), strict=False, check_trace=False)
    kinds = {node.kind() for node in program.inlined_graph.nodes()}
    assert {"reg_kernels::batch_norm", "reg_kernels::feature_dropout"} <= kinds
