"""convert(fuse=True): forwards that are no graph, and what a graph takes for granted."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fuse_models import (
    FunctionalDropout,
    OwnDropout,
    ResNet,
    assert_same,
    chains,
    convert,
    disturbed,
    images,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import reg_kernels


@pytest.fixture(autouse=True)
def _reference():
    # These are about graphs: one implementation of the ops is as good as another.
    with reg_kernels.backend("reference"):
        yield


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
    assert any(w.category is UserWarning for w in caught) == changes
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
