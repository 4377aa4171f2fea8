"""convert(fuse=True): what is fused, what is not, and that a model goes on being what it was."""

import copy
import io
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from fuse_models import (
    BLOCKS,
    BasicBlock,
    FunctionalDropout,
    OwnDropout,
    OwnNorm,
    OwnReLU,
    PureBranch,
    ResNet,
    Steps,
    around,
    assert_same,
    chains,
    convert,
    disturbed,
    images,
    passes,
    run,
    zeros,
)
from torch import nn

import reg_kernels
from reg_kernels.convert._fused import Fused


@pytest.fixture(autouse=True)
def _reference():
    # These are about graphs: one implementation of the ops is as good as another.
    with reg_kernels.backend("reference"):
        yield


@pytest.mark.parametrize("block", BLOCKS)
def test_a_resnet_computes_what_it_did(block):
    net = disturbed(ResNet(block))
    converted, report = convert(net)
    found = chains(report)
    last = "bn2" if block is BasicBlock else "bn3"
    assert found["bn1"] == "bn1 → relu"
    assert found["layer1.0.bn1"] == "bn1 → relu"
    assert found[f"layer2.1.{last}"] == f"{last} → + residual → relu"
    assert len(found) == 1 + 4 * (2 if block is BasicBlock else 3)
    assert report.apart == []
    assert_same(net, converted, images(3, 8))
    of_a_block = ["relu"] * (1 if block is BasicBlock else 2) + ["+ relu"]
    assert passes(converted, images(3, 8)) == ["relu", *of_a_block * 4]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_resnet_stays_the_model_that_it_was(block):
    net = ResNet(block)
    net.layer1[0].note = "kept"
    seen = []
    net.layer1[0].register_forward_hook(lambda *_: seen.append(1))
    layers, parameters = list(net.named_modules()), list(net.named_parameters())
    state = copy.deepcopy(net.state_dict())
    original = copy.deepcopy(net)

    assert reg_kernels.convert(net, fuse=True, inplace=True) is net
    assert all(a is b for (_, a), (_, b) in zip(layers, net.named_modules(), strict=True))
    assert all(a is b for (_, a), (_, b) in zip(parameters, net.named_parameters(), strict=True))
    assert [n for n, _ in layers] == [n for n, _ in net.named_modules()]
    assert isinstance(net.layer1[0], block) and net.layer1[0].note == "kept"
    assert type(net.layer1[0]).__qualname__ == block.__qualname__
    assert type(net.layer1[0].bn1) is reg_kernels.nn.BatchNorm2d
    assert type(net.layer1[0].relu) is nn.ReLU
    assert not isinstance(net.layer1, Fused)  # a Sequential without a chain
    net(images(3, 8).float())
    assert seen == [1]

    # state_dict, both ways
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state, strict=True)
    original.load_state_dict(net.state_dict(), strict=True)


def test_the_copy_is_converted_and_the_model_is_not():
    net = ResNet()
    before = repr(net)
    convert(net)
    assert repr(net) == before
    assert type(net.layer1[0]) is BasicBlock


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_fused_model_is_copied_whole(again):
    net = ResNet(drop=0.3)
    net.head = nn.Sequential(nn.BatchNorm1d(5), nn.SiLU(), nn.Dropout(0.4))
    disturbed(net)
    converted, _ = convert(net)
    other = again(converted)
    assert repr(other) == repr(converted)
    assert type(other.layer1[0]) is type(converted.layer1[0])
    for training in (True, False):
        x = images(3, 8)
        expected, actual = (run(m.train(training), x) for m in (converted, other))
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    # The dropout that a chain looks at is the copy's own.
    other.head[2].p = 0.0
    x = torch.randn(2, 5, dtype=torch.float64)
    assert passes(other.train().head, x) == ["silu"]
    assert passes(converted.train().head, x) == ["silu 0.4"]
    assert repr(reg_kernels.revert(other)).replace("p=0.0", "p=0.4") == repr(net)
    x = images(3, 8)
    torch.testing.assert_close(other.eval()(x), net.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", BLOCKS)
def test_revert_undoes_it_to_the_bit(block):
    net = disturbed(ResNet(block, drop=0.2))
    reverted = reg_kernels.revert(convert(net, backend="reference")[0])
    assert repr(reverted) == repr(net)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in net.modules()]
    for a, b in zip(reverted.modules(), net.modules(), strict=True):
        assert vars(a).keys() == vars(b).keys()
    for training in (True, False):
        expected = run(net.train(training), images(3, 8).fill_(0.5))
        actual = run(reverted.train(training), images(3, 8).fill_(0.5))
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_whole(training):
    net = disturbed(ResNet())
    converted = convert(net)[0].train(training)
    compiled = torch.compile(copy.deepcopy(converted), fullgraph=True, backend="aot_eager")
    expected, actual = (run(m, images(3, 8).fill_(0.25)) for m in (converted, compiled))
    for (name, value), (_, other) in zip(expected.items(), actual.items(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9, msg=name)


# Every form of a link


ACTIVATIONS = {
    "ReLU": (lambda s, z, x: s.act(z), nn.ReLU()),
    "ReLU in place": (lambda s, z, x: s.act(z), nn.ReLU(inplace=True)),
    "LeakyReLU": (lambda s, z, x: s.act(z), nn.LeakyReLU(0.25)),
    "SiLU": (lambda s, z, x: s.act(z), nn.SiLU()),
    "GELU": (lambda s, z, x: s.act(z), nn.GELU()),
    "F.relu": (lambda s, z, x: F.relu(z), None),
    "F.relu in place": (lambda s, z, x: F.relu(z, inplace=True), None),
    "torch.relu": (lambda s, z, x: torch.relu(z), None),
    "relu": (lambda s, z, x: z.relu(), None),
    "relu_": (lambda s, z, x: z.relu_(), None),
    "F.leaky_relu": (lambda s, z, x: F.leaky_relu(z, 0.5), None),
    "F.leaky_relu by name": (lambda s, z, x: F.leaky_relu(z, negative_slope=0.5), None),
    "F.silu": (lambda s, z, x: F.silu(z), None),
    "F.gelu": (lambda s, z, x: F.gelu(z), None),
    "relu(z + x)": (lambda s, z, x: F.relu(z + x), None),
    "relu(x + z)": (lambda s, z, x: F.relu(x + z), None),
    "relu(torch.add)": (lambda s, z, x: F.relu(torch.add(z, x, alpha=1)), None),
    "relu(add)": (lambda s, z, x: F.relu(z.add(x)), None),
    "relu(iadd)": (lambda s, z, x: F.relu(operator.iadd(z, x)), None),
    "silu(add_)": (lambda s, z, x: F.silu(z.add_(x)), None),
    "z + x": (lambda s, z, x: z + x, None),
    "relu(z + 2 x)": (lambda s, z, x: F.relu(z + x * 2), None),
}


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_every_form_of_activation_and_residual(form):
    rest, layer = ACTIVATIONS[form]
    net = around(rest, **({} if layer is None else {"act": layer}))
    converted, report = convert(net)
    (chain,) = chains(report).values()
    assert ("residual" in chain) == ("add" in form or "+" in form)
    assert len(passes(converted, images())) == 1
    assert_same(net, converted, images())


NOT_FUSED = {
    "gelu by tanh": lambda s, z, x: F.gelu(z, approximate="tanh"),
    "another activation": lambda s, z, x: F.hardswish(z),
    "alpha": lambda s, z, x: torch.add(z, x, alpha=2),
    "out": lambda s, z, x: torch.add(z, x, out=torch.empty_like(z)).detach() * x,
    "a constant": lambda s, z, x: z + 1.0,
    "itself": lambda s, z, x: z + z,
    "used twice": lambda s, z, x: F.relu(z) * z,
    "changed for others": lambda s, z, x: (z.relu_(), z * 2)[1],
    "added into another": lambda s, z, x: operator.iadd(x * 2, z),
    "dropout2d": lambda s, z, x: F.dropout2d(z, 0.0),
}


@pytest.mark.parametrize("form", NOT_FUSED)
def test_what_is_no_chain_stays(form):
    net = around(NOT_FUSED[form])
    converted, report = convert(net)
    assert report.fused == []
    assert type(converted.bn) is reg_kernels.nn.BatchNorm2d
    if form != "out":
        assert_same(net, converted, images())


class BranchWritesElsewhere(Steps):
    def forward(self, x):
        x = x * 1
        z = self.bn(self.conv(x))
        y = self.branch(x)
        return F.relu(z + y)


class BranchWritesTheInput(Steps):
    def forward(self, x):
        h = x * 1
        z = self.bn(h)
        y = self.branch(h)
        return F.relu(z + y)


class MethodWritesAView(Steps):
    def forward(self, x):
        h = x * 1
        z = self.bn(h)
        y = h.view(h.shape).mul_(2)
        return F.relu(z + y)


class ResidualIsWrittenLater(Steps):
    def forward(self, x):
        y = x * 2
        z = self.bn(self.conv(x)) + y
        y.relu_()
        return F.relu(z) * y


class ArgumentIsWritten(Steps):
    def forward(self, x):
        x = x * 1
        kept = x
        x += self.bn(self.conv(x))
        return F.relu(self.pure(x)) + kept


@pytest.mark.parametrize(
    "block, expected",
    [
        (PureBranch, "bn → + residual → relu()"),
        (BranchWritesElsewhere, "bn → + residual → relu()"),
        (BranchWritesTheInput, None),
        (MethodWritesAView, None),
        (ResidualIsWrittenLater, "bn → + residual"),
        (ArgumentIsWritten, None),
    ],
)
def test_what_is_read_later_must_not_change_meanwhile(block, expected):
    net = disturbed(block())
    converted, report = convert(net)
    assert chains(report).get("bn") == expected
    if expected != "bn → + residual → relu()" and block is not ArgumentIsWritten:
        assert any("may be changed before" in why for _, _, why in report.apart)
    for training in (True, False):
        with torch.no_grad():  # where torch lets an input of bn be written
            x = images()
            expected_y = copy.deepcopy(net).train(training)(x)
            actual_y = copy.deepcopy(converted).train(training)(x)
        torch.testing.assert_close(actual_y, expected_y, rtol=1e-9, atol=1e-9)


def test_two_arguments_may_be_one_tensor():
    class Arguments(Steps):
        def forward(self, x, y):
            z = self.bn(x)
            return F.relu(z + self.branch(y))

    net = disturbed(Arguments())
    converted, report = convert(net)
    assert report.fused == [] and "may be changed before" in report.apart[0][2]
    with torch.no_grad():
        x = images()
        expected, actual = (m.eval()(v, v) for m, v in ((net, x.clone()), (converted, x.clone())))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class AddsLater(nn.Module):
    """The residual comes as an argument, of whatever kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)


class Adds(AddsLater):
    def forward(self, x, y):
        return F.silu(self.bn(self.conv(x)) + y)


class AddsInPlace(AddsLater):
    def forward(self, x, y):
        z = self.bn(self.conv(x))
        z += y
        return F.silu(z)


@pytest.mark.parametrize("block", [Adds, AddsInPlace])
@pytest.mark.parametrize(
    "residual",
    [
        torch.randn(3, 4, 6, 6, dtype=torch.float64),
        torch.randn(3, 4, 6, 6).double().to(memory_format=torch.channels_last),
        torch.randn(1, 4, 1, 1, dtype=torch.float64),
        torch.randn(6, dtype=torch.float64),
        torch.randn((), dtype=torch.float64),
        torch.randn(3, 4, 6, 6),
        torch.ones(3, 4, 6, 6, dtype=torch.int64),
        2.5,
    ],
    ids=["same", "layout", "channels", "row", "number", "float32", "int", "Python's"],
)
def test_a_residual_of_any_kind(block, residual):
    net = disturbed(block())
    converted, report = convert(net)
    assert chains(report) == {"bn": "bn → + residual → silu()"}
    fits = isinstance(residual, torch.Tensor) and residual.shape == (3, 4, 6, 6)
    fits = fits and residual.dtype == torch.float64
    assert passes(converted, images(), residual) == ["+ silu"] * fits
    assert_same(net, converted, images(), residual)


@pytest.mark.parametrize("block", [Adds, AddsInPlace])
def test_a_residual_decides_dtype_and_shape_as_torch_has_it(block):
    net = block().float()
    converted, _ = convert(net)
    x, wide = images().float(), torch.randn(2, 3, 4, 6, 6)
    double = images()
    assert converted(x, double).dtype == net(x, double).dtype
    if block is Adds:
        assert converted(x, wide[:, :1]).shape == net(x, wide[:, :1]).shape
    else:
        with pytest.raises(RuntimeError, match="output with shape"):
            converted(x, wide)


# Dropout


def test_the_mask_is_that_of_dropout():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.4)).double()
    converted, report = convert(net)
    assert chains(report) == {"0": "0 → 1 → 2"}
    x = images()
    torch.manual_seed(3)
    y = converted(x)
    torch.manual_seed(3)
    expected = reg_kernels.functional.dropout(net[:2](x), 0.4)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert (y == 0).float().mean() > 0.5
    torch.testing.assert_close(converted.eval()(x), net.eval()(x), rtol=1e-12, atol=1e-12)


def test_dropouts_draw_in_the_order_that_they_had():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()
            self.drop, self.other = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x):
            z = self.bn(x)
            y = self.other(x)
            return self.drop(self.act(z)) + y

    net = Two().double()
    converted, report = convert(net)
    assert chains(report) == {"bn": "bn → act → drop"}
    assert_same(reg_kernels.convert(net).train(), converted, images())


class AlwaysDrops(FunctionalDropout):
    def forward(self, x):
        return F.dropout(F.silu(self.bn(x)), self.rate)


class Residual(OwnDropout):
    def forward(self, x):
        return self.drop(self.act(self.bn(x) + x))


@pytest.mark.parametrize("block", [FunctionalDropout, AlwaysDrops, OwnDropout, Residual])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_each_part_goes_by_its_own_flag(block, norm, rest, compiled):
    net = disturbed(block())
    converted, report = convert(net)
    assert "drop" in chains(report)["bn"]
    for model in (net, converted):
        model.train(rest)
        model.bn.train(norm)
    x, before = images(), converted.bn.running_mean.clone()
    model = converted
    if compiled:
        model = torch.compile(converted, fullgraph=True, backend="eager")
    assert zeros(model, x) == zeros(net, x) == (rest or block is AlwaysDrops)
    assert torch.equal(converted.bn.running_mean, before) == (not norm)
    torch.testing.assert_close(converted.bn.running_mean, net.bn.running_mean)


def test_a_layers_rate_may_change():
    converted, _ = convert(OwnDropout().double())
    converted.drop.p = 0.0
    assert not zeros(converted, images())
    converted.drop.p = 1.0
    assert torch.equal(converted(images()), torch.zeros(3, 4, 6, 6, dtype=torch.float64))


def test_a_dropout_that_is_off_on_its_own():
    net = OwnDropout().double()
    net.drop.eval()
    converted, _ = convert(net)
    assert not zeros(converted, images())
    assert zeros(converted.train(), images())


# Which layers


def test_gelu_by_tanh_is_another_activation():
    assert convert(nn.Sequential(nn.BatchNorm2d(4), nn.GELU("tanh")))[1].fused == []


def test_subclasses_are_left_alone():
    net = disturbed(nn.Sequential(OwnNorm(4), nn.ReLU(), nn.BatchNorm2d(4), OwnReLU()))
    converted, report = convert(net)
    assert report.fused == []
    assert type(converted[0]) is OwnNorm
    assert_same(net, converted, images())


@pytest.mark.parametrize(
    "norm, shape",
    [(nn.BatchNorm1d, (5, 4)), (nn.BatchNorm1d, (5, 4, 3)), (nn.BatchNorm3d, (2, 4, 3, 2, 2))],
)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_every_kind_of_batch_norm(norm, shape, options):
    net = disturbed(nn.Sequential(norm(4, **options), nn.LeakyReLU(0.25), nn.Identity()))
    converted, report = convert(net)
    assert chains(report) == {"0": "0 → 1"}
    assert isinstance(converted[0], norm)
    assert_same(net, converted, torch.randn(shape, dtype=torch.float64))


def test_an_identity_between_is_no_obstacle():
    net = disturbed(
        nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(), nn.Identity(), nn.Dropout(0.0))
    )
    converted, report = convert(net)
    assert chains(report) == {"0": "0 → 2 → 4"}
    assert_same(net, converted, images())


def test_a_model_that_was_converted_before():
    net = disturbed(ResNet())
    converted, report = convert(reg_kernels.convert(net, backend="reference"))
    assert len(report.fused) == 9 and converted.bn1.backend == "reference"
    assert_same(net, converted, images(3, 8))
    _, again = convert(converted)
    assert again.fused == [] and again.swapped == []
    assert ("bn1", "reg_kernels.nn.BatchNorm2d", "fused already") in again.left


def test_the_backend_is_forced_in_chains_too():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
    converted, _ = convert(net, backend="reference")
    assert [getattr(m, "backend", None) for m in converted] == ["reference", None, "reference"]
    reverted = reg_kernels.revert(converted)
    assert not any("backend" in vars(m) for m in reverted)


def test_a_graph_module_keeps_its_graph():
    for net in (BasicBlock(4, 4), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())):
        net = torch.fx.symbolic_trace(disturbed(net))
        converted, report = convert(net)
        assert report.fused == [] and "copies itself" in report.apart[0][2]
        assert not isinstance(converted, Fused)
        assert_same(net, copy.deepcopy(converted), images())


def test_the_report():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
    _, report = convert(net)
    assert str(report) == (
        "1 chain fused, 2 swapped, 0 left as they were\n"
        "  1: 1 → 2 → 3 in one pass\n"
        "  1: torch.nn.BatchNorm2d -> reg_kernels.nn.BatchNorm2d\n"
        "  3: torch.nn.Dropout -> reg_kernels.nn.Dropout"
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", ["torchvision.models", "timm"])
def test_a_resnet_of(library, name):
    try:
        models = pytest.importorskip(library)
    except RuntimeError as error:
        pytest.skip(f"{library} does not load: {error}")
    net = models.create_model(name) if library == "timm" else getattr(models, name)()
    disturbed(net)
    converted, report = convert(net)
    assert len(report.fused) == {"resnet18": 17, "resnet50": 49}[name]
    assert sum("residual" in chain for chain in chains(report).values()) in (8, 16)
    assert report.apart == []
    x = images(3, 64)
    torch.testing.assert_close(converted.eval()(x), net.eval()(x), rtol=1e-9, atol=1e-9)
    assert list(converted.state_dict()) == list(net.state_dict())
