"""The layers beside torch's."""

import copy
import pickle

import pytest
import torch

from reg_kernels import nn

from support import implementations

NAMES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]
SHAPES = {
    "Dropout": (6, 7),
    "Dropout1d": (4, 8, 9),
    "Dropout2d": (4, 8, 3, 3),
    "Dropout3d": (4, 8, 2, 3, 3),
}
each = pytest.mark.parametrize("name", NAMES)


@each
def test_repr_constructor_and_state_are_torchs(name):
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    for arguments in ({}, {"p": 0.25}, {"p": 1, "inplace": True}):
        a, b = ours(**arguments), theirs(**arguments)
        assert repr(a) == repr(b)
        assert isinstance(a, theirs)
        assert a.state_dict() == b.state_dict() == {}
        assert (a.p, a.inplace, a.training) == (b.p, b.inplace, b.training)
    assert repr(ours(0.3)) == repr(theirs(0.3))
    a.load_state_dict(b.state_dict())


@each
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bad_probability(name, p):
    with pytest.raises(ValueError, match=rf"{name}: p must be in \[0, 1\]"):
        getattr(nn, name)(p)


@each
def test_bad_backend(name):
    with pytest.raises(ValueError, match="backend must be one of"):
        getattr(nn, name)(backend="cuda")


@each
def test_train_and_eval(name):
    layer = getattr(nn, name)(0.5)
    x = torch.ones(SHAPES[name])
    assert set(layer(x).unique().tolist()) == {0.0, 2.0}
    layer.eval()
    assert layer(x) is x
    layer.train()
    assert layer(x) is not x


@each
def test_in_place(name):
    x = torch.ones(SHAPES[name])
    assert getattr(nn, name)(0.5, inplace=True)(x) is x
    assert set(x.unique().tolist()) == {0.0, 2.0}


@each
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(name, copier):
    layer = getattr(nn, name)(0.25, backend="reference").eval()
    twin = copier(layer)
    assert type(twin) is type(layer)
    assert (twin.p, twin.backend, twin.training) == (0.25, "reference", False)


@pytest.mark.parametrize("backend", implementations())
def test_the_layer_forces_its_backend(backend):
    layer = nn.Dropout(0.5, backend=backend)
    y = layer(torch.ones(10, requires_grad=True, device="cpu"))
    suffix = "default" if backend == "native" else backend
    assert y.grad_fn.call[0] is getattr(torch.ops.reg_kernels.dropout, suffix)


def test_a_layer_with_no_grad_input_is_not_in_the_graph():
    assert not nn.Dropout()(torch.ones(3)).requires_grad
