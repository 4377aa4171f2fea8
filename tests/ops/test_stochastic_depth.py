"""Layers of stochastic depth: their twins in other packages, rates, and blocks that are skipped."""

import copy
import inspect
import math
import pickle
import sys
import types

import pytest
import torch

import reg_kernels
from reg_kernels import functional as F
from reg_kernels import nn
from reg_kernels.nn import stochastic_depth

MODES = ("batch", "subset", "row")


def test_drop_path_rates():
    assert nn.drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert nn.drop_path_rates(0.3, [1, 3]) == [
        pytest.approx([0.0]),
        pytest.approx([0.1, 0.2, 0.3]),
    ]
    assert nn.drop_path_rates(0.3, 1) == [0.0]
    assert nn.drop_path_rates(0.3, []) == []
    for depths in (-1, [2, -1], [1.5]):
        with pytest.raises(ValueError, match="drop_path_rates: depths must be counts of blocks"):
            nn.drop_path_rates(0.1, depths)
    with pytest.raises(ValueError, match=r"drop_path_rates: rate must be in \[0, 1\]"):
        nn.drop_path_rates(1.1, 3)


def test_the_layers_keep_samples_at_the_rate():
    x = torch.ones(10**5, 2)
    for layer, scale in (
        (nn.DropPath(0.3, scale_by_keep=False), 1),
        (nn.DropPath(0.3), 1 / 0.7),
        (nn.StochasticDepth(0.3, "row"), 1 / 0.7),
    ):
        y = layer(x, x)
        assert torch.equal(y[:, 0], y[:, 1])
        kept = y[:, 0] != 1
        assert abs(kept.sum().item() - 7e4) < 4 * math.sqrt(1e5 * 0.3 * 0.7)
        torch.testing.assert_close(y[kept], 1 + x[kept] * scale, rtol=1e-4, atol=0)
        assert layer.eval()(x) is x
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(layer)).graph
    assert any(node.op == "call_module" for node in graph.nodes)
    assert str(nn.DropPath(0.3)) == "DropPath(drop_prob=0.3, scale_by_keep=True)"
    assert str(nn.StochasticDepth(0.3, "row")) == "StochasticDepth(p=0.3, mode=row)"


def test_one_draw_for_the_batch():
    layer, x = nn.StochasticDepth(0.5, "batch"), torch.ones(7, 3)
    ys = [layer(x) for _ in range(100)]
    assert all((y == 0).all() or (y == 2).all() for y in ys)
    assert 20 < sum(bool((y == 0).all()) for y in ys) < 80
    state = torch.tensor([5, 6])
    whole = F.drop_path(x, 0.5, mode="batch", rng_state=state)
    part = F.drop_path(x[4:], 0.5, mode="batch", rng_state=state, sample_offset=4)
    assert torch.equal(part, whole[4:])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: nn.DropPath(1.5), ValueError, r"DropPath: drop_prob must be in \[0, 1\]"),
        (lambda: nn.DropPath(0.5, 1), TypeError, "DropPath: scale_by_keep must be True or False"),
        (lambda: nn.StochasticDepth(0.5, "rows"), ValueError, "mode must be 'row' or 'batch'"),
        (lambda: F.drop_path(torch.ones(2), 0.5, mode="x"), ValueError, "mode must be 'row' or"),
        (
            lambda: nn.StochasticDepthBlock(torch.nn.Identity(), 0.5, "rows"),
            ValueError,
            "mode must be 'batch', 'subset' or 'row', got 'rows'",
        ),
        (lambda: nn.drop_path_rates(0.1, 2.5), TypeError, "depths must be a number of blocks or"),
        (
            lambda: F.drop_path(torch.ones(2), 0.5, mode="batch", sample_offset=-1),
            ValueError,
            r"drop_path: sample_offset must be in \[0, 2\^62\), got -1",
        ),
        (
            lambda: nn.StochasticDepthBlock(torch.nn.Identity(), 0.5, "subset")(torch.ones(())),
            RuntimeError,
            "StochasticDepthBlock: input must be a batch",
        ),
        (
            lambda: nn.StochasticDepthBlock(torch.nn.MaxPool1d(1, return_indices=True), 0.0)(
                torch.ones(1, 2, 2)
            ),
            TypeError,
            "the branch's output must be a Tensor, got tuple",
        ),
        (
            lambda: nn.StochasticDepthBlock(torch.relu, 0.5),
            TypeError,
            "StochasticDepthBlock: branch must be an nn.Module",
        ),
        (
            lambda: nn.StochasticDepthBlock(torch.nn.Flatten(0), 0.0)(torch.ones(2, 2)),
            RuntimeError,
            "the branch's output must be like the input",
        ),
    ],
)
def test_refusals(call, kind, message):
    before = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        call()
    assert torch.equal(torch.get_rng_state(), before)


# Blocks


class Branch(torch.nn.Module):
    """Doubles its input and notes how many samples it was given."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return x * self.scale


@pytest.mark.parametrize("mode", MODES)
def test_a_block_has_the_expectation_of_its_evaluation(mode):
    block = nn.StochasticDepthBlock(Branch(), 0.5, mode)
    x = torch.ones(10, 3)
    total = sum(block(x) for _ in range(400)) / 400
    torch.testing.assert_close(total, 3 * x, rtol=0, atol=4 * 2 / math.sqrt(400) * 1.5)
    assert torch.equal(block.eval()(x), 3 * x)


def test_a_dropped_batch_computes_nothing_and_gives_no_gradient():
    block = nn.StochasticDepthBlock(Branch(), 1.0)
    x = torch.ones(4, requires_grad=True)
    y = block(x)
    assert block.branch.seen == []
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4))
    assert block.branch.scale.grad is None
    before = block.branch.scale.item()
    torch.optim.AdamW(block.parameters(), lr=1.0, weight_decay=1.0).step()
    assert block.branch.scale.item() == before


def test_a_subset_has_a_fixed_number_of_samples():
    block = nn.StochasticDepthBlock(Branch(), 0.3, "subset")
    x = torch.randn(10, 5, requires_grad=True)
    y = block(x)
    assert block.branch.seen == [7]
    kept = (y != x).any(1)
    assert kept.sum() == 7
    torch.testing.assert_close(y[kept], x[kept] * (1 + 2 * 10 / 7))
    assert torch.equal(y[~kept], x[~kept])
    y.sum().backward()
    torch.testing.assert_close(x.grad[kept], torch.full((7, 5), 1 + 20 / 7))
    torch.testing.assert_close(block.branch.scale.grad, (x[kept] * 10 / 7).sum().detach())
    chosen = {tuple((block(x) != x).any(1).tolist()) for _ in range(20)}
    assert len(chosen) > 10
    none = nn.StochasticDepthBlock(Branch(), 0.96, "subset")
    assert none(x) is x
    assert none.branch.seen == []


def test_a_subset_keeps_the_memory_format():
    block = nn.StochasticDepthBlock(torch.nn.Conv2d(3, 3, 3, padding=1), 0.5, "subset")
    x = torch.randn(8, 3, 4, 5).to(memory_format=torch.channels_last)
    y = block(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y != x).flatten(1).any(1).sum() == 4


def test_batch_norm_in_a_subset_sees_what_is_kept():
    norm = torch.nn.BatchNorm1d(3, momentum=1.0)
    block = nn.StochasticDepthBlock(norm, 0.5, "subset")
    x = torch.randn(8, 3)
    y = block(x)
    kept = (y != x).any(1)
    torch.testing.assert_close(norm.running_mean, x[kept].mean(0))


@pytest.mark.parametrize("mode", MODES)
def test_blocks_under_autocast_in_graphs_and_copies(mode):
    block = nn.StochasticDepthBlock(torch.nn.Linear(4, 4), 0.5, mode)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x).dtype == torch.float32
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(block))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    twin = copy.deepcopy(block)
    torch.manual_seed(3)
    expected = block(x)
    torch.manual_seed(3)
    assert torch.equal(twin(x), expected)
    assert set(block.state_dict()) == {"branch.weight", "branch.bias"}


def test_a_subset_is_one_graph():
    block = nn.StochasticDepthBlock(torch.nn.Linear(4, 4), 0.5, "subset")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 4)
    y = compiled(x)
    assert (y != x).any(1).sum() == 3
    assert any(not torch.equal(compiled(x), y) for _ in range(8))


# Layers of other packages, and sums


@pytest.fixture
def packages(monkeypatch):
    """Modules with classes as timm and torchvision have them: names, attributes and calls."""

    class DropPath(torch.nn.Module):
        def __init__(self, drop_prob=0.0, scale_by_keep=True):
            super().__init__()
            self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

        def forward(self, x):
            raise AssertionError("not swapped")

    class StochasticDepth(torch.nn.Module):
        def __init__(self, p, mode):
            super().__init__()
            self.p, self.mode = p, mode

        def forward(self, input):
            raise AssertionError("not swapped")

    before = dict(stochastic_depth.TWINS)
    found = []
    for cls, name in (
        (DropPath, "timm.layers.drop"),
        (StochasticDepth, "torchvision.ops.stochastic_depth"),
    ):
        module = types.ModuleType(name)
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)
        found.append(cls)
    yield found
    stochastic_depth.TWINS.clear()
    stochastic_depth.TWINS.update(before)
    for name in stochastic_depth._OF_PACKAGES:
        vars(stochastic_depth).pop(name, None)


class Residual(torch.nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.branch = torch.nn.Linear(4, 4)
        self.drop_path = drop

    def forward(self, x):
        return x + self.drop_path(self.branch(x))


def test_twins_of_packages_are_swapped_fused_and_put_back(packages, monkeypatch):
    timms, torchvisions = packages
    x = torch.randn(50, 4)
    for layer, ours in (
        (timms(0.5, False), nn.DropPath(0.5, False)),
        (torchvisions(0.5, "row"), nn.StochasticDepth(0.5, "row")),
    ):
        model = Residual(layer)
        state = model.state_dict()
        reports = []
        fused = reg_kernels.convert(model, fuse=True, report=reports.append)
        assert "drop_path → + residual" in str(reports[0])
        assert isinstance(fused.drop_path, type(layer))
        expected = Residual(ours)
        expected.load_state_dict(state)
        torch.manual_seed(1)
        y = fused(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, expected(x))
        with monkeypatch.context() as patch:
            patch.setattr(F, "drop_path", lambda *given, **options: options["residual"])
            assert fused(x) is x  # in one pass
        (word,) = inspect.signature(layer.forward).parameters
        branch = fused.branch(x)
        torch.manual_seed(1)
        torch.testing.assert_close(x + fused.drop_path(**{word: branch}), y)
        pickle.loads(pickle.dumps(fused.drop_path))
        back = reg_kernels.revert(fused)
        assert type(back.drop_path) is type(layer)
        assert "backend" not in vars(back.drop_path)


def test_a_sum_is_left_where_it_is_not_one_of_a_shortcut():
    class Late(Residual):
        def forward(self, x):
            y = self.drop_path(self.branch(x))
            return y + x * y

    class Broadcast(Residual):
        def forward(self, x):
            return x[:1] + self.drop_path(self.branch(x))

    x = torch.randn(5, 4)
    for kind in (Late, Broadcast):
        model = kind(nn.DropPath(0.5))
        fused = reg_kernels.convert(model, fuse=True)
        torch.manual_seed(1)
        y = fused(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, model(x))
    hooked = reg_kernels.convert(Residual(nn.DropPath(0.5)), fuse=True)
    seen = []
    hooked.drop_path.register_forward_hook(lambda layer, given, output: seen.append(len(given)))
    hooked(x)
    assert seen == [1]


# A layer scale before the dropped branch, in the words of timm's layers and of models' own.


class LayerScale(torch.nn.Module):
    def __init__(self, dim, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.gamma = torch.nn.Parameter(torch.rand(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class LayerScale2d(LayerScale):
    def forward(self, x):
        gamma = self.gamma.view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


class Scaling(Residual):
    def __init__(self, scale=None):
        super().__init__(nn.DropPath(0.5))
        self.ls = scale or LayerScale(4)
        self.gamma = self.ls.gamma


class OfLayer(Scaling):
    def forward(self, x):
        return x + self.drop_path(self.ls(self.branch(x)))


class OfMethod(Scaling):
    def forward(self, x):
        return self.drop_path(self.branch(x).mul(self.gamma.reshape(1, -1))) + x


class OfOperator(Scaling):
    def forward(self, x):
        return x + self.drop_path(self.gamma * self.branch(x))


class InPlace(Scaling):  # the sum, as torchvision's ConvNeXt has it
    def forward(self, x):
        y = self.gamma * self.branch(x)
        y = self.drop_path(y)
        y += x
        return y


def called(module, *given, seed=1):
    """The result, and what drop_path was told."""
    told = []

    def drop_path(*arguments, **options):
        told.append(options)
        return call(*arguments, **options)

    call, F.drop_path = F.drop_path, drop_path
    try:
        torch.manual_seed(seed)
        return module(*given), told
    finally:
        F.drop_path = call


@pytest.mark.parametrize("kind", [OfLayer, OfMethod, OfOperator, InPlace])
def test_a_layer_scale_is_fused(kind):
    x, model, reports = torch.randn(50, 4), kind(), []
    fused = reg_kernels.convert(model, fuse=True, report=reports.append)
    assert "drop_path → × layer scale → + residual" in str(reports[0])
    for training in (True, False):
        expected, _ = called(model.train(training), x)
        y, (told,) = called(fused.train(training), x)
        assert told["residual"] is x and told["layer_scale"].numel() == 4
        torch.testing.assert_close(y, expected)
        given = [x, *model.parameters()]
        theirs = torch.autograd.grad(expected.sum(), given[1:])
        torch.testing.assert_close(torch.autograd.grad(y.sum(), [*fused.parameters()]), theirs)
    y, _ = called(torch.compile(fused, backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(y, expected)
    again, (told,) = called(pickle.loads(pickle.dumps(fused)).train(), x)
    torch.testing.assert_close(again, called(model.train(), x)[0])
    assert "layer_scale" in told


def test_a_layer_scale_of_images_is_fused():
    class Images(OfLayer):
        def __init__(self):
            super().__init__(LayerScale2d(4))
            self.branch = torch.nn.Conv2d(4, 4, 1)

    x, model = torch.randn(9, 4, 3, 5), Images()
    y, (told,) = called(reg_kernels.convert(model, fuse=True), x)
    torch.testing.assert_close(y, called(model, x)[0])
    assert told["layer_scale"].shape == (1, 4, 1, 1)


class Shifted(LayerScale):
    def forward(self, x):
        return x * self.gamma + 1


def _in_place(block):
    block.ls.inplace = True


def _hooked(block):
    block.ls.register_forward_hook(lambda layer, given, output: output * 2)


def _drop_hooked(block):
    block.drop_path.register_forward_pre_hook(lambda layer, given: (given[0] * 2,))


def _double(block):
    block.ls.gamma = torch.nn.Parameter(torch.rand(4).double())


def _a_number_a_sample(block):
    block.ls.gamma = torch.nn.Parameter(torch.rand(9, 1))


def _another(block):
    block.ls = Shifted(4)


@pytest.mark.parametrize(
    "change", [_in_place, _hooked, _drop_hooked, _double, _a_number_a_sample, _another]
)
def test_a_layer_scale_that_changed_is_called_by_itself(change):
    x, model = torch.randn(9, 4), OfLayer()
    fused = reg_kernels.convert(model, fuse=True)
    for block in (model, fused):
        torch.manual_seed(3)
        change(block)
    expected, _ = called(model, x)
    y, (told,) = called(fused, x)
    assert told.get("layer_scale") is None
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


def test_a_product_is_left_that_is_none_with_a_layer_scale():
    class Seen(OfLayer):  # twice
        def forward(self, x):
            y = self.ls(self.branch(x))
            return x + self.drop_path(y) + y

    class Written(OfLayer):  # in between
        def forward(self, x):
            y = self.branch(x)
            z = self.gamma * y
            y.add_(1)
            return x + self.drop_path(z)

    class Shown(OfLayer):  # the sum in place
        def forward(self, x):
            y = self.branch(x)
            z = self.drop_path(y)
            z += x
            return z + y

    class Gated(OfLayer):
        def forward(self, x):
            y = self.branch(x)
            return x + self.drop_path(y.sigmoid() * y)

    class Other(OfLayer):
        def __init__(self):
            super().__init__(Shifted(4))

    x = torch.randn(9, 4)
    for kind in (Seen, Written, Shown, Gated, Other):
        model = kind()
        for training in (True, False):
            reports = []
            fused = reg_kernels.convert(model.train(training), fuse=True, report=reports.append)
            assert "layer scale" not in str(reports[0])
            assert ("+ residual" in str(reports[0])) == (kind is not Shown)
            y, (told,) = called(fused, x)
            torch.testing.assert_close(y, called(model, x)[0])
            assert told.get("layer_scale") is None
