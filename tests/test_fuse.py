"""convert(fuse=True): what is fused, what is not, and that a model goes on being what it was."""

import copy
import io
import operator
import pickle
import random
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import reg_kernels
from reg_kernels.convert._fused import Fused


@pytest.fixture(autouse=True)
def _reference():
    # These are about graphs: one implementation of the ops is as good as another.
    with reg_kernels.backend("reference"):
        yield


def convert(model, **options):
    reports = []
    converted = reg_kernels.convert(model, fuse=True, report=reports.append, **options)
    return converted, reports[0]


def chains(report):
    return {name: chain for name, chain, _ in report.fused}


def passes(model, *arguments):
    """What is done in one pass when a model is called: an activation, "+" of a residual, a drop."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with mock.patch.object(
        reg_kernels.functional, "batch_norm_act", wraps=reg_kernels.functional.batch_norm_act
    ) as function:
        model(*arguments)
    for buffer, value in before:
        buffer.copy_(value)
    found = []
    for call in function.call_args_list:
        residual, drop = "+ " * (call.args[5] is not None), call.kwargs["drop"]
        found.append(f"{residual}{call.kwargs['activation']}" + f" {drop}" * (drop > 0))
    return found


def run(model, x, *rest):
    """Output, gradients, buffers."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x, *rest)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())}


def assert_same(model, converted, x, *rest):
    """The same values in training and in evaluation, for float64 models without dropout."""
    for training in (True, False):
        expected = run(model.train(training), x, *rest)
        actual = run(converted.train(training), x, *rest)
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def disturbed(model):
    """Statistics and parameters that are not where they start, in float64."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for values in (m.running_mean, m.weight, m.bias):
                if values is not None:
                    values.data.normal_()
            if m.running_var is not None:
                m.running_var.data.uniform_(0.5, 2)
    return model.double()


def images(channels=4, size=6):
    return torch.randn(3, channels, size, size, dtype=torch.float64)


# A small ResNet, in the words of torchvision's


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, channels, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inputs, channels, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block=BasicBlock, drop=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._layer(block, 4, 4, 1)
        self.layer2 = self._layer(block, 4 * block.expansion, 6, 2)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(6 * block.expansion, 5)
        self.head = nn.Identity()

    def _layer(self, block, inputs, channels, stride):
        outputs, downsample = channels * block.expansion, None
        if stride != 1 or inputs != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        return nn.Sequential(block(inputs, channels, stride, downsample), block(outputs, channels))

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(self.fc(self.drop(x)))


BLOCKS = [BasicBlock, Bottleneck]


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


class Around(nn.Module):
    """act(bn(conv(x))), the rest of it a function of (self, bn's output, x)."""

    def __init__(self, rest, **layers):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.rest = rest
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.rest(self.bn(self.conv(x)), x)


def around(rest, **layers):
    """Around, of a class whose forward calls `rest` as a method: an attribute may change."""
    cls = type("Around", (Around,), {"rest": rest})
    module = cls.__new__(cls)
    Around.__init__(module, None, **layers)
    del module.rest
    return disturbed(module)


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


class Steps(nn.Module):
    """Forwards in which something happens between the links."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        self.pure = nn.Conv2d(4, 4, 1)


class PureBranch(Steps):
    def forward(self, x):
        h = self.conv(x)
        z = self.bn(h)
        y = self.pure(h)
        return F.relu(z + y)


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


def zeros(model, x):
    """Whether dropout is at work, of a model of silu, which has no zeros itself."""
    torch.manual_seed(0)
    return (model(x) == 0).any().item()


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.rate = nn.BatchNorm2d(4), 0.5

    def forward(self, x):
        return F.dropout(F.silu(self.bn(x)), self.rate, self.training)


class AlwaysDrops(FunctionalDropout):
    def forward(self, x):
        return F.dropout(F.silu(self.bn(x)), self.rate)


class OwnDropout(FunctionalDropout):
    def __init__(self):
        super().__init__()
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.act(self.bn(x)))


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


# What a forward's graph takes for granted


def test_an_attribute_that_changes_is_noticed():
    net = disturbed(FunctionalDropout())
    converted, _ = convert(net)
    for model in (net, converted):
        model.rate = 0.0
    with pytest.warns(UserWarning, match="FunctionalDropout: a call differs"):
        converted.eval()(images())
    assert type(converted) is FunctionalDropout
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(net, converted, images())


def test_an_attribute_that_leaves_a_layer_out():
    class MayActivate(OwnDropout):
        active = True

        def forward(self, x):
            x = self.bn(x)
            return self.act(x) if self.active else x

    net = disturbed(MayActivate())
    converted, report = convert(net)
    assert chains(report) == {"bn": "bn → act"}
    assert_same(net, converted, images())
    net.active = converted.active = False
    with pytest.warns(UserWarning, match="a call differs"):
        converted.eval()(images())
    assert_same(net, converted, images())


class OptionalArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x, scale=None, *, negate=False):
        x = self.relu(self.bn(x) + x)
        if scale is not None:
            x = x * scale
        return -x if negate else x


@pytest.mark.parametrize("arguments", [((2.0,), {}), ((), {"negate": True}), ((None,), {})])
def test_optional_arguments(arguments):
    net = disturbed(OptionalArgument())
    converted, report = convert(net)
    assert chains(report) == {"bn": "bn → + residual → relu"}
    assert_same(net, converted, images())
    positional, named = arguments
    changes = positional != (None,)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = converted.eval()(images().fill_(1), *positional, **named)
    assert bool(caught) == changes
    expected = net.eval()(images().fill_(1), *positional, **named)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


class MayBeNone(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x, skip):
        x = self.bn(x)
        return F.relu(x) if skip is None else F.relu(x + skip)


def test_an_argument_that_is_none():
    net = disturbed(MayBeNone())
    converted, _ = convert(net)
    assert_same(net, converted, images(), images())
    with pytest.warns(UserWarning, match="a call differs"):
        y = converted.eval()(images().fill_(1), None)
    torch.testing.assert_close(y, net.eval()(images().fill_(1), None), rtol=1e-9, atol=1e-9)


# Forwards that are no graph


def chain(self, x):
    return F.relu(self.bn(x) + x)


def branches(self, x):
    return chain(self, x) if x.sum() > 0 else x


def asks_the_type(self, x):
    return chain(self, x) if isinstance(x, torch.Tensor) else chain(self, x[0])


def without_gradients(self, x):
    with torch.no_grad():
        return chain(self, x)


def in_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return chain(self, x)


def checkpoints(self, x):
    return checkpoint(lambda v: chain(self, v), x, use_reentrant=False)


def draws(self, x):
    return chain(self, x) if torch.rand(()) < 2 else x


def draws_of_python(self, x):
    return chain(self, x) if random.random() < 2 else x


def draws_of_numpy(self, x):
    return chain(self, x) if np.random.rand() < 2 else x


def remembers(self, x):
    self.last = chain(self, x)
    return self.last


def tags(self, x):
    x = chain(self, x)
    x.tag = 1
    return x


def appends(self, x):
    self.seen.append(chain(self, x))
    return self.seen[-1]


def trains_differently(self, x):
    return chain(self, x) if self.training else x


def asks_a_layer(self, x):
    return F.dropout(chain(self, x), 0.0, self.bn.training)


def asks_for_gradients(self, x):
    return chain(self, x) if torch.is_grad_enabled() else x


def fails_quietly(self, x):
    try:
        return x if x.sum() > 0 else chain(self, x)
    except Exception:
        return chain(self, x)


def prints(self, x):
    print(end="")
    return chain(self, x)


def many(self, *xs):
    return chain(self, xs[0])


REFUSED = {
    branches: "branches on the values of a tensor",
    asks_the_type: "calls isinstance",
    without_gradients: "switches gradients",
    in_autocast: "switches gradients, autocast",
    checkpoints: "",
    draws: "tensors that no argument brought",
    draws_of_python: "draws random numbers",
    draws_of_numpy: "draws random numbers",
    remembers: "changes the attribute last",
    tags: "sets tag of a tensor",
    appends: "reads the attribute seen, of list",
    trains_differently: "something else in training",
    asks_a_layer: "training flag of a layer",
    asks_for_gradients: "calls is_grad_enabled",
    fails_quietly: "branches on the values of a tensor",
    prints: "calls print",
    many: r"takes \*xs",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_a_forward_that_cannot_be_traced_is_left(forward):
    cls = type("Block", (nn.Module,), {"forward": forward})
    block = cls()
    block.bn, block.seen = nn.BatchNorm2d(4), []
    block.inner = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    disturbed(block)
    before, drawn, np_drawn = vars(block).keys(), random.random, np.random.get_state()[2]
    random.seed(0)
    state = random.getstate()
    converted, report = convert(block)
    assert random.getstate() == state and np.random.get_state()[2] == np_drawn
    assert drawn is random.random and vars(converted).keys() == before
    assert type(converted) is cls and type(converted.bn) is reg_kernels.nn.BatchNorm2d
    assert chains(report) == {"inner.0": "0 → 1"}  # what is inside is looked at all the same
    ((name, _, why),) = report.apart
    assert name == "" and REFUSED[forward].replace("\\", "") in why, why
    assert "its forward cannot be traced: it " in why
    assert "converted one by one" in str(report)
    assert converted.seen == []
    x = images()
    torch.testing.assert_close(converted.train()(x), block.train()(x), rtol=1e-6, atol=1e-6)


def test_tracing_leaves_no_traces():
    names = ("__getattr__", "__call__", "__setattr__", "__delattr__")
    before = [getattr(nn.Module, name) for name in names]
    net = ResNet()
    net.layer1[1].bn2.eval()
    convert(net)
    convert(type("Block", (ResNet,), {"forward": branches})())
    assert [getattr(nn.Module, name) for name in names] == before
    assert "__getattribute__" not in vars(nn.Module)
    assert [m.training for m in net.modules()].count(False) == 1


def test_in_place_arithmetic_stays_in_place():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            y = x * 1
            z = y
            y *= 2
            y += x
            n = x.shape[1]
            m = n
            m += 1
            return F.relu(self.bn(x) + x) + z * n / m

    net = disturbed(Block())
    converted, report = convert(net)
    assert len(report.fused) == 1
    assert_same(net, converted, images())


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return -super().forward(input)


# Who else uses a layer


def named(report, name):
    return [why for n, _, why in report.apart if n == name]


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("which, passed", [(0, []), (1, []), (2, ["relu"])])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_layers_with_hooks_are_called_by_themselves(which, passed, hook, first):
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
    seen = []

    def add():
        return getattr(net[which], hook)(lambda *_: seen.append(1) and None)

    handle = add() if first else None
    _, report = convert(net, inplace=True)
    assert chains(report) == {"0": "0 → 1 → 2"}
    assert (
        named(report, "0") == [f"{which} has hooks: while it has, it is called by itself"] * first
    )
    handle = handle or add()
    x = images().float().requires_grad_()
    assert passes(net, x) == passed
    net(x).sum().backward()
    assert seen
    handle.remove()
    assert passes(net, x) == ["relu 0.1"]


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_see_each_layer(hook):
    net, _ = convert(Block().double())
    seen = []
    register = getattr(nn.modules.module, f"register_module_{hook}_hook")
    handle = register(lambda module, *_: seen.append(type(module)) and None)
    try:
        assert passes(net, images()) == []
        net(images().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert nn.ReLU in seen and reg_kernels.nn.BatchNorm2d in seen
    assert passes(net, images()) == ["relu", "+ relu"]


def test_a_layer_with_a_forward_on_the_object_is_called_by_itself():
    net = disturbed(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    convert(net, inplace=True)
    net[1].forward = lambda x: x * 3
    assert torch.equal(net(images().fill_(2)), net[0](images().fill_(2)) * 3)
    assert "forward of its own" in named(convert(reg_kernels.revert(net))[1], "0")[0]
    net.forward = lambda x: x
    ((_, _, why),) = convert(reg_kernels.revert(net))[1].apart
    assert why == "not fused: it has a forward of its own on the object"
    block = BasicBlock(4, 4)
    block.forward = lambda x: x
    assert convert(block)[1].apart[0][2].startswith("its forward cannot be traced: it was replaced")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.relu(self.bn2(self.relu(self.bn1(x))) + x))


class Frozen(nn.Module):
    """In the manner of torchvision's FrozenBatchNorm2d."""

    def __init__(self, bn):
        super().__init__()
        scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", (bn.bias.detach() - bn.running_mean * scale)[:, None, None])

    def forward(self, x):
        return x * self.scale + self.shift


def frozen(module):
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return Frozen(module)
    for name, child in module.named_children():
        module.add_module(name, frozen(child))
    return module


def replaced(path, layer):
    def change(net):
        owner, _, name = path.rpartition(".")
        setattr(net.get_submodule(owner), name, copy.deepcopy(layer))

    return change


def forced(net):
    net.relu.inplace = True


CHANGES = {
    "another norm": (replaced("bn2", nn.GroupNorm(2, 4).double()), ["relu"]),
    "an identity": (replaced("bn1", nn.Identity()), ["+ relu"]),
    "another activation": (replaced("relu", nn.Tanh()), ["+ None"]),
    "a slope": (replaced("relu", nn.LeakyReLU(0.3)), ["leaky_relu", "+ leaky_relu"]),
    "gelu by tanh": (replaced("relu", nn.GELU("tanh")), ["+ None"]),
    "no dropout": (replaced("drop", nn.Identity()), ["relu", "+ relu"]),
    "another dropout": (replaced("drop", nn.Dropout2d(0.0)), ["relu", "+ relu"]),
    "a subclass": (replaced("bn1", OwnNorm(4).double()), ["+ relu"]),
    "in place": (forced, ["relu", "+ relu"]),
    "frozen": (frozen, []),
    "parametrized": (
        lambda net: nn.utils.parametrize.register_parametrization(net.bn1, "weight", nn.Tanh()),
        ["+ relu"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_of_a_block_may_be_changed(change):
    make, passed = CHANGES[change]
    net = disturbed(Block())
    converted, _ = convert(net)
    for model in (net, converted):
        make(model)
    assert passes(converted, images()) == passed
    assert_same(net, converted, images())
    assert_same(net, reg_kernels.revert(converted, inplace=True), images())


def sequential(*layers):
    return disturbed(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), *layers))


SURGERY = {
    "replaced": (lambda m: m.__setitem__(2, nn.Identity()), ["relu"]),
    "copied norm": (lambda m: m.__setitem__(0, copy.deepcopy(m[0])), ["relu 0.5"]),
    "another norm": (lambda m: m.__setitem__(0, nn.GroupNorm(2, 4).double()), []),
    "deleted": (lambda m: m.__delitem__(1), ["None 0.5"]),
    "appended": (lambda m: m.append(nn.BatchNorm2d(4).double()).append(nn.SiLU()), ["relu 0.5"]),
    "inserted": (lambda m: m.insert(1, nn.Identity()), ["relu 0.5"]),
    "popped": (lambda m: m.pop(2), ["relu"]),
    "frozen": (frozen, []),
}


@pytest.mark.parametrize("change", SURGERY)
def test_a_sequential_may_be_rearranged(change):
    """As in the layers that were swapped one by one, the masks included."""
    make, passed = SURGERY[change]
    net = sequential()
    net, (converted, _) = reg_kernels.convert(net), convert(net)
    for model in (net, converted):
        make(model)
    if change == "appended":  # the new norm is torch's
        assert passes(reg_kernels.convert(converted), images()) == [*passed, "silu"]
    assert passes(converted.train(), images()) == passed
    for model in (net, converted):
        model.train()
    assert_same(net, converted, images())
    x = images()
    assert torch.equal(converted.eval()(x), converted(x))


def test_parts_of_a_sequential():
    converted, _ = convert(sequential(nn.Conv2d(4, 4, 1)))
    x = images()
    assert passes(converted[:2], x) == ["relu"]
    assert passes(converted[1:], x) == []
    assert torch.equal(converted[1](x), x.relu())  # a layer does its own work
    converted.eval()
    layers = [converted[0], *converted[1:]]
    y = x
    for layer in layers:
        y = layer(y)
    torch.testing.assert_close(converted(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((converted[:2] + converted[2:])(x), y, rtol=1e-12, atol=1e-12)


def test_sync_batch_norm_keeps_the_activation():
    net = disturbed(nn.Sequential(sequential(), Block()))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(convert(net)[0])
    assert type(converted[0][0]) is type(converted[1].bn1) is nn.SyncBatchNorm
    x = images()
    torch.testing.assert_close(converted.eval()(x), net.eval()(x), rtol=1e-9, atol=1e-9)


def test_a_subclass_of_sequential_stays_one():
    converted, report = convert(ConvNormActivation(4))
    assert chains(report) == {"1": "1 → 2"} and isinstance(converted, ConvNormActivation)
    assert type(converted).__qualname__ == ConvNormActivation.__qualname__
    for other in (pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        assert type(other) is type(converted) and other.channels == 4
        assert passes(other, images().float()) == ["relu"]
    assert type(reg_kernels.revert(converted)) is ConvNormActivation


class ConvNormActivation(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Conv2d(4, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.channels = channels


class CopiesItself(nn.Sequential):
    def __deepcopy__(self, memo):
        return CopiesItself(*copy.deepcopy(list(self), memo))


def test_a_class_that_copies_itself_is_left():
    net = CopiesItself(nn.BatchNorm2d(4), nn.ReLU())
    converted, report = convert(net)
    assert (
        report.fused == [] and report.apart[0][2] == "not fused: it has a class that copies itself"
    )
    assert type(converted) is CopiesItself and type(converted[0]) is reg_kernels.nn.BatchNorm2d
    block = type("Copies", (Block,), {"__deepcopy__": lambda self, memo: self})()
    _, report = convert(block)
    assert report.fused == [] and "copies itself" in report.apart[0][2]


def test_replicas_as_data_parallel_makes_them():
    net = disturbed(nn.Sequential(sequential(), Block())).eval()
    converted, _ = convert(net)
    with torch.no_grad():
        (replica,) = replicas(converted)
    assert passes(replica, images()) == ["relu", "relu", "+ relu"]
    x = images()
    torch.testing.assert_close(replica(x), net(x), rtol=1e-9, atol=1e-9)


def replicas(module):
    """torch.nn.parallel.replicate on one device: parameters become plain attributes."""
    made = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, replica in made.items():
        for name, child in m._modules.items():
            if child is not None:
                setattr(replica, name, made[child])
        for name, parameter in m._parameters.items():
            if parameter is not None:
                setattr(replica, name, parameter.detach())
    return [made[module]]


def test_checkpointing_of_a_fused_block():
    net = disturbed(nn.Sequential(sequential(), Block()))
    converted, _ = convert(net)

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    x = images()
    kept, recomputed = run(converted.train(), x), run(Checkpointed(converted), x)
    for name, value in kept.items():  # the buffers move twice, as torch's do
        if "." not in name or "bias" in name or "weight" in name:
            other = recomputed[name if name in recomputed else f"inner.{name}"]
            assert torch.equal(other, value), name


def test_a_batch_norm_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.bn(F.relu(self.bn(x)) + x))

    net = disturbed(Twice())
    converted, report = convert(net)
    assert [chain for _, chain, _ in report.fused] == ["bn → relu()"] * 2
    assert_same(net, converted, images())


def test_a_batch_norm_in_two_places():
    shared = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.SiLU()))
    disturbed(net)
    converted, _ = convert(net)
    assert passes(converted, images()) == ["relu", "silu"]
    assert_same(net, converted, images())


def test_a_batch_norm_that_another_forward_may_call():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(x) if x.sum() > 0 else x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return F.relu(self.inner.bn(x)) + self.inner(x.abs())

    net = disturbed(Outer())
    converted, _ = convert(net)
    assert passes(converted, images()) == ["relu"]
    assert_same(net, converted, images())

    shared = nn.BatchNorm2d(4)
    inner = Inner()
    inner.bn = shared
    net = disturbed(nn.Sequential(inner, nn.Sequential(shared, nn.ReLU())))
    converted, _ = convert(net)
    assert passes(converted, images().abs()) == ["relu"]
    assert_same(net, converted, images())


def test_a_shared_activation():
    act = nn.SiLU()
    first, second = BasicBlock(4, 4), BasicBlock(4, 4)
    first.relu = second.relu = act
    net = disturbed(nn.Sequential(first, second, nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), act))
    converted, report = convert(net)
    assert len(report.fused) == 5
    assert converted[3] is converted[5] is converted[0].relu and type(act) is nn.SiLU
    assert_same(net, converted, images())


def test_layers_of_a_sequential_that_are_called_from_outside():
    class Taps(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            taps = []
            for layer in self.features:
                x = layer(x)
                taps.append(x)
            return sum(taps)

    net = disturbed(Taps())
    converted, _ = convert(net)
    assert passes(converted, images()) == []
    assert passes(converted.features, images()) == ["relu"]
    assert_same(net, converted, images())


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.acts = nn.ModuleDict({"a": nn.ReLU()})
        self.downsample = None
        self.first = self.second = nn.Sequential(nn.ReLU())

    def forward(self, x):
        for norm in self.norms:
            x = self.acts["a"](norm(x) + x)
        for layer in self.first:
            x = layer(x)
        x = self.second(x)
        return x if self.downsample is None else self.downsample(x)


def test_layers_in_lists_and_of_inner_modules():
    net = disturbed(Lists())
    converted, report = convert(net)
    assert set(chains(report)) == {"norms.0", "norms.1"}
    assert_same(net, converted, images())
    for model in (net, converted):
        model.norms[1] = nn.GroupNorm(2, 4).double()
    assert passes(converted, images()) == ["+ relu"]
    assert_same(net, converted, images())


STRUCTURES = {
    "a longer list": lambda net: net.norms.append(nn.GroupNorm(2, 4).double()),
    "a shorter list": lambda net: net.norms.__delitem__(1),
    "other keys": lambda net: net.acts.update({"b": nn.SiLU()}),
    "one more": lambda net: setattr(net, "downsample", nn.SiLU()),
    "a longer sequential": lambda net: net.first.append(nn.Sigmoid()),
    "another class": lambda net: setattr(net, "first", nn.ModuleList([nn.Sigmoid()])),
    "an alias of its own": lambda net: setattr(net, "second", nn.Sigmoid()),
}


@pytest.mark.parametrize("change", STRUCTURES)
def test_a_block_that_gets_other_layers_notices(change):
    net = disturbed(Lists())
    converted, _ = convert(net)
    for model in (net, converted):
        STRUCTURES[change](model)
    with pytest.warns(UserWarning, match="Lists: a call differs"):
        converted.eval()(images())
    assert type(converted) is Lists
    assert_same(net, converted, images())


def test_a_layer_that_is_taken_away():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            x = self.bn(x) + x
            return x if self.act is None else self.act(x)

    net = disturbed(Optional())
    converted, _ = convert(net)
    net.act = converted.act = None
    with pytest.warns(UserWarning, match="a call differs"):
        converted.eval()(images())
    assert_same(net, converted, images())


def test_a_batch_norm_whose_values_are_read():
    net = around(lambda s, z, x: F.relu(z) * s.bn.running_mean[0])
    converted, report = convert(net)
    assert len(report.fused) == 1
    assert_same(net, converted, images())


# Chains that meet


class Meeting(nn.Module):
    def __init__(self):
        super().__init__()
        self.b1, self.b2, self.b3 = (nn.BatchNorm2d(4) for _ in range(3))


class Sum(Meeting):
    def forward(self, x):
        return torch.relu(self.b1(x) + self.b2(x))


class SumOfThree(Meeting):
    def forward(self, x):
        return torch.relu(self.b1(x) + self.b2(x) + self.b3(x))


class SumOfChains(Meeting):
    def forward(self, x):
        return F.silu(F.relu(self.b1(x)) + self.b2(F.relu(self.b3(x))))


class Crossed(Meeting):
    def forward(self, x):
        y = self.b1(x)
        z = self.b2(x)
        y += z
        return F.relu(y) * F.relu(self.b3(x) + x)


class SumOfOne(Meeting):
    def forward(self, x):
        y = self.b1(x)
        return F.relu(y + y) + F.relu(self.b2(x))


@pytest.mark.parametrize(
    "block, expected",
    [
        (Sum, ["+ relu"]),
        (SumOfThree, ["+ None", "+ relu"]),
        (SumOfChains, ["relu", "relu", "+ silu"]),
        (Crossed, ["+ relu", "+ relu"]),
        (SumOfOne, ["relu"]),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_chains_that_meet(block, expected, inplace):
    net = disturbed(block())
    converted, _ = convert(copy.deepcopy(net), inplace=inplace)
    assert sorted(passes(converted, images())) == sorted(expected)
    assert_same(net, converted, images())


def test_a_conversion_that_fails_changes_nothing():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), Block(), Block(), nn.Dropout(0.1))
    classes = [type(m) for m in net.modules()]
    for broken in ("block_class", "changes_its_input"):
        with (
            mock.patch(f"reg_kernels.convert._fuse.{broken}", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            convert(nn.Sequential(net, PureBranch()), inplace=True)
        assert [type(m) for m in net.modules()] == classes
    given = []

    def fails(module, cls):
        given.append(cls)
        if len(given) == 4:
            raise MemoryError
        object.__setattr__(module, "__class__", cls)

    for change in (convert, lambda m, inplace: reg_kernels.convert(m, inplace=inplace)):
        given.clear()
        with (
            mock.patch("reg_kernels.convert._layers.set_class", side_effect=fails),
            pytest.raises(MemoryError),
        ):
            change(net, inplace=True)
        assert [type(m) for m in net.modules()] == classes


# Modules that are left alone


OPAQUE = {
    "scripted": lambda: torch.jit.script(nn.ReLU()),
    "scripted chain": lambda: torch.jit.script(sequential()[:2]),
    "traced": lambda: torch.jit.trace(nn.Sequential(nn.Conv2d(4, 4, 1)).double(), images()),
    "lazy": lambda: nn.LazyConv2d(4, 1, dtype=torch.float64),
    "graph": lambda: torch.fx.symbolic_trace(sequential()[:2]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Lazy modules")
@pytest.mark.parametrize("kind", OPAQUE)
@pytest.mark.parametrize("where", ["sequential", "block"])
def test_opaque_modules_are_left_alone(kind, where):
    opaque = OPAQUE[kind]()
    if where == "sequential":
        net = disturbed(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), opaque))
    else:
        net = around(lambda s, z, x: s.inner(F.relu(z)), inner=opaque)
    plain = net if kind == "lazy" else copy.deepcopy(net)
    converted, report = convert(net, inplace=True)
    assert len(report.fused) == 1
    if kind in ("scripted", "scripted chain", "traced", "lazy"):
        name = "2" if where == "sequential" else "inner"
        assert [n for n, _, _ in report.left] == [name]
    if kind == "lazy":
        converted(images())
        plain = reg_kernels.revert(converted)
    assert_same(plain, converted, images())


def test_a_compiled_module_has_its_own_converted():
    for first in (True, False):  # its program may be there already
        net = disturbed(Block())
        compiled = torch.compile(copy.deepcopy(net), backend="eager")
        if first:
            compiled.eval()(images())
        converted, report = convert(nn.Sequential(compiled), inplace=True)
        assert len(report.fused) == 2
        assert_same(net, converted[0]._orig_mod, images())
        x = images()
        torch.testing.assert_close(converted.eval()(x), net.eval()(x), rtol=1e-9, atol=1e-9)


# Graphs of others


def test_fx_traces_to_layers_that_follow_the_flags():
    net = disturbed(nn.Sequential(sequential(), Block()))
    for converted in (reg_kernels.convert(net), convert(net)[0]):
        graph = torch.fx.symbolic_trace(converted)
        called = [graph.get_submodule(n.target) for n in graph.graph.nodes if n.op == "call_module"]
        expected = [reg_kernels.nn.BatchNorm2d, nn.ReLU, reg_kernels.nn.Dropout]
        assert [type(layer) for layer in called[:3]] == expected
        assert list(graph.state_dict()) == list(net.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(converted, graph, images())
        assert isinstance(converted[0], Fused) == isinstance(converted[1], Fused)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torch_jit_trace():
    net = disturbed(nn.Sequential(sequential(), Block())).eval()
    converted, _ = convert(net)
    with torch.no_grad():
        traced = torch.jit.trace(converted.requires_grad_(False), images(), check_trace=False)
        x = images()
        torch.testing.assert_close(traced(x), net(x), rtol=1e-9, atol=1e-9)


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
        "1 chains fused, 2 swapped, 0 left as they were\n"
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
