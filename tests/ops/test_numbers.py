"""Numbers that are no Python floats, as torch's own operators take and refuse them, and numbers
that vary in a compiled program."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

from reg_kernels import functional as F
from reg_kernels import nn

from support import DEVICE, implementations

C = 3
X = torch.randn(4, C, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def statistics():
    return torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)


def with_dropout(function):
    def call(p):
        torch.manual_seed(0)
        return function(p)

    return call


def layer(cls, attribute, *arguments):
    def call(value):
        module = cls(*arguments).to(DEVICE)
        setattr(module, attribute, value)
        torch.manual_seed(0)
        return module(X), *module.buffers()

    return call


def of_chain(**options):
    return F.batch_norm_act(X, *statistics(), training=True, **options)


def of_momentum(value):
    mean, var = statistics()
    F.batch_norm(X, mean, var, training=True, momentum=value)
    return mean, var


# What is called with a number, and what of torch's takes the same one.
CALLS = {
    "p": (with_dropout(lambda p: F.dropout(X, p)), lambda p: TF.dropout(X, p)),
    "p of channels": (with_dropout(lambda p: F.dropout1d(X, p)), lambda p: TF.dropout1d(X, p)),
    "p of a layer": (layer(nn.Dropout, "p"), layer(torch.nn.Dropout, "p")),
    "momentum": (of_momentum, lambda m: TF.batch_norm(X, *statistics(), training=True, momentum=m)),
    "momentum of a layer": (
        layer(nn.BatchNorm1d, "momentum", C),
        layer(torch.nn.BatchNorm1d, "momentum", C),
    ),
    "eps": (
        lambda eps: F.batch_norm(X, *statistics(), training=True, eps=eps),
        lambda eps: TF.batch_norm(X, *statistics(), training=True, eps=eps),
    ),
    "eps in evaluation": (
        lambda eps: F.batch_norm(X, *statistics(), eps=eps),
        lambda eps: TF.batch_norm(X, *statistics(), eps=eps),
    ),
    "negative_slope": (
        lambda slope: of_chain(activation="leaky_relu", negative_slope=slope),
        lambda slope: TF.leaky_relu(X, slope),
    ),
    "drop": (with_dropout(lambda p: of_chain(drop=p)), lambda p: TF.dropout(X, p)),
    "drop of a layer": (layer(nn.BatchNormAct1d, "drop", C), layer(torch.nn.Dropout, "p")),
}
SAME = {  # as a float
    "numpy's float32": (np.float32(0.25), 0.25),
    "numpy's float64": (np.float64(0.25), 0.25),
    "numpy's float16": (np.float16(0.25), 0.25),
    "numpy's integer": (np.int64(1), 1.0),
    "numpy's bool": (np.bool_(True), 1.0),
    "a tensor": (torch.tensor(0.25), 0.25),
    "a tensor of float64": (torch.tensor(0.25, dtype=torch.float64), 0.25),
    "a tensor of an integer": (torch.tensor(1), 1.0),
    "an integer": (1, 1.0),
    "a bool": (True, 1.0),
}
REFUSED = {
    "a string": "0.25",
    "a vector": torch.tensor([0.25]),
    "numpy's vector": np.array([0.25]),
    "what requires grad": torch.tensor(0.25, requires_grad=True),
    "a list": [0.25],
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("argument", CALLS)
def test_numbers_that_torch_takes(argument, kind):
    ours, theirs = CALLS[argument]
    value, as_float = SAME[kind]
    theirs(value)
    torch.testing.assert_close(ours(value), ours(as_float), rtol=0, atol=0)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("argument", CALLS)
def test_what_torch_refuses(argument, kind):
    for call in CALLS[argument]:
        with pytest.raises(TypeError):
            call(REFUSED[kind])


def test_a_refusal_names_the_argument():
    with pytest.raises(TypeError, match=r"^batch_norm: momentum must be a float or None, got str$"):
        of_momentum("0.1")
    with pytest.raises(TypeError, match="dropout: p must be a number, got a Tensor of float32"):
        F.dropout(X, torch.tensor(0.5, requires_grad=True))
    assert torch.equal(of_chain(drop=Fraction(1)), torch.zeros_like(X))


@pytest.mark.parametrize("value", [np.int64(3), np.int32(3), torch.tensor(3)])
def test_an_offset_of_any_integer(value):
    state = torch.tensor([1, 2])
    expected = F.dropout(X, rng_state=state, element_offset=3)
    assert torch.equal(F.dropout(X, rng_state=state, element_offset=value), expected)


@pytest.mark.parametrize("value", [3.0, "3", torch.tensor(3.0), np.float64(3)])
def test_an_offset_that_is_no_integer(value):
    with pytest.raises(TypeError, match="dropout: element_offset must be an integer, got"):
        F.dropout(X, element_offset=value)


# Numbers that vary under torch.compile


@pytest.fixture
def counted():
    """torch.compile(fullgraph=True), and how many programs that made."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


RESIDUAL = X.cos()
STATE = torch.tensor([3, 4])
VALUES = (0.1, 0.2, 0.35, 0.5)
VARYING = {
    "p": lambda x, mean, var, v: F.dropout(x, v, rng_state=STATE),
    "p of channels": lambda x, mean, var, v: F.dropout1d(x, v, rng_state=STATE),
    "momentum": lambda x, mean, var, v: F.batch_norm(x, mean, var, training=True, momentum=v),
    "eps": lambda x, mean, var, v: F.batch_norm(x, mean, var, training=True, eps=v),
    "eps in evaluation": lambda x, mean, var, v: F.batch_norm(x, mean, var, eps=v),
    "drop": lambda x, mean, var, v: F.batch_norm_act(
        x, mean, var, residual=RESIDUAL, training=True, drop=v, rng_state=STATE
    ),
    "negative_slope": lambda x, mean, var, v: F.batch_norm_act(
        x, mean, var, training=True, activation="leaky_relu", negative_slope=v
    ),
    "slope in evaluation": lambda x, mean, var, v: F.batch_norm_act(
        x, mean, var, residual=RESIDUAL, activation="leaky_relu", negative_slope=v
    ),
    "all": lambda x, mean, var, v: F.batch_norm_act(
        *(x, mean, var, None, None, RESIDUAL, True, v, v),
        activation="leaky_relu",
        negative_slope=v / 2,
        drop=v,
        rng_state=STATE,
    ),
}


def results(function, value):
    x = X.clone().requires_grad_()
    mean, var = statistics()
    y = function(x, mean, var, value)
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    return y, gradient, mean, var


@pytest.mark.parametrize("name", VARYING)
def test_two_programs_for_any_number_of_values(counted, name):
    compiled, counter = counted
    function = compiled(VARYING[name])
    for value in VALUES:
        found, expected = results(function, value), results(VARYING[name], value)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", implementations())
def test_varying_numbers_in_each_implementation(counted, backend):
    def function(x, mean, var, value):
        return F.batch_norm_act(
            *(x, mean, var, None, None, None, True, value),
            drop=value,
            rng_state=STATE,
            backend=backend,
        )

    compiled = counted[0](function)
    for value in VALUES[:2]:
        found, expected = results(compiled, value), results(function, value)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        (lambda: nn.Dropout(), "p"),
        (lambda: nn.BatchNorm1d(C), "momentum"),
        (lambda: nn.BatchNorm1d(C), "eps"),
        (lambda: nn.BatchNormAct1d(C, drop=0.4), "drop"),
        (lambda: nn.BatchNormAct1d(C, activation="leaky_relu"), "negative_slope"),
    ],
)
def test_two_programs_for_any_number_of_values_of_a_layer(counted, module, attribute):
    compiled, counter = counted
    module = module().to(DEVICE)
    function = compiled(module)
    for value in VALUES:
        setattr(module, attribute, value)
        function(X)
    assert counter.frame_count == 2
