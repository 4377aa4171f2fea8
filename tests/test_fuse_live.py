"""convert(fuse=True): a fused model whose layers are changed, hooked, shared or opaque."""

import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fuse_models import (
    BasicBlock,
    Block,
    OwnNorm,
    PureBranch,
    around,
    assert_same,
    chains,
    convert,
    disturbed,
    images,
    passes,
    run,
    sequential,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import reg_kernels
from reg_kernels.convert._fused import Fused


@pytest.fixture(autouse=True)
def _reference():
    # These are about graphs: one implementation of the ops is as good as another.
    with reg_kernels.backend("reference"):
        yield


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


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Lazy modules", "ignore:The .grad")
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


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
class Marked(torch.Tensor):
    """A tensor that overrides torch's functions, by what a subclass inherits."""


def test_a_mode_leaves_chains_fused_and_a_subclass_sees_the_layers():
    x = images()
    for net in (sequential(), disturbed(Block())):
        converted, _ = convert(net)
        fused = passes(converted, x)
        assert fused
        with torch.device("cpu"):  # a mode of torch's functions, as torch.export has one
            assert passes(converted, x) == fused
        assert passes(converted, x.as_subclass(Marked)) == []


def test_torch_jit_trace():
    net = disturbed(nn.Sequential(sequential(), Block())).eval()
    converted, _ = convert(net)
    with torch.no_grad():
        traced = torch.jit.trace(converted.requires_grad_(False), images(), check_trace=False)
        x = images()
        torch.testing.assert_close(traced(x), net(x), rtol=1e-9, atol=1e-9)
