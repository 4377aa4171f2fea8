"""Calls that go by the checks of an earlier one: which ones may, and that no other does."""

import contextlib

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reg_kernels
import reg_kernels.functional as F
from reg_kernels.ops import _signature
from reg_kernels.ops._signature import signature

pytestmark = [
    pytest.mark.skipif(signature(1) is None, reason="the native library was not built"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


X, STATE, LABELS = torch.randn(8, 4), torch.tensor([3, 5]), torch.randint(4, (8,))


def dropout(x, p=0.5, **kwargs):
    return F.dropout(x, p, rng_state=STATE, **kwargs)


def cross_entropy(x, labels=LABELS, **kwargs):
    return F.cross_entropy(x, labels, **kwargs)


def batch_norm(x, momentum=0.1, **kwargs):
    return F.batch_norm(x, None, None, None, None, True, momentum, **kwargs)


OPS = pytest.mark.parametrize("op", [dropout, cross_entropy, batch_norm])


@pytest.fixture(autouse=True)
def known():
    """Each op's plain call is known, with and without a gradient."""
    for op in (dropout, cross_entropy, batch_norm):
        op(X), op(X.clone().requires_grad_())


@contextlib.contextmanager
def nothing_asked(monkeypatch):
    """Fails where a call is looked at."""
    for name in ("dropout", "batch_norm"):
        module = __import__(f"reg_kernels.ops.{name}", fromlist=["watcher"])
        monkeypatch.setattr(module, "watcher", lambda: pytest.fail("a call was looked at"))
    loss = __import__("reg_kernels.ops.cross_entropy", fromlist=["checked_call"])
    monkeypatch.setattr(loss, "checked_call", lambda *a: pytest.fail("a call was looked at"))
    yield
    monkeypatch.undo()


@OPS
@pytest.mark.parametrize("gradient", [False, True])
def test_a_call_like_an_earlier_one_is_not_looked_at(op, gradient, monkeypatch):
    x = torch.randn(8, 4, requires_grad=gradient)
    with nothing_asked(monkeypatch):
        y = op(x)
    assert y.requires_grad == gradient
    with reg_kernels.backend("reference"):
        torch.testing.assert_close(y, op(x))


def test_what_a_signature_tells_apart():
    weight = torch.nn.Parameter(X.clone())
    calls = [
        *((None,), (True,), (False,), (0,), (1,), (0.0,), (-0.0,), (1.0,), ("",), ("a",), ("b",)),
        *((X,), (X.double(),), (X.half(),), (X.bfloat16(),), (X.long(),), (X.t(),), (X[0],)),
        *((X[::2],), (X[:, ::2],), (X.reshape(4, 8),), (X.clone().requires_grad_(),), (X, None)),
        *((None, X), (X, X), (), (X[:0],), (1, 2), (2, 1), (X.reshape(8, 4, 1),)),
    ]
    found = [signature(*call) for call in calls]
    with torch.no_grad():
        found += [signature(X), signature(weight)]
    assert None not in found
    assert len(set(found)) == len(found)
    assert signature(weight, 2.0) == signature(X.clone().requires_grad_(), 2.0)


@pytest.mark.parametrize(
    "value",
    [
        *(X.as_subclass(Subclass), X.to_sparse(), torch.empty(2, device="meta"), 2**70, [X], (1,)),
        *(numpy.float64(1), numpy.bool_(True), torch.ones(1).untyped_storage(), "a" * 2000),
        torch.zeros([1] * 64),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_signature(value):
    assert signature(X, value, 1.0) is None
    assert signature(X, 1.0) is not None


def test_freed_memory_has_no_signature():
    x = X.clone()
    x.untyped_storage().resize_(0)
    found = signature(x)
    assert found is None  # a message must not show x


def under(name, op, x):
    """(what op(x) is under someone who looks at it, its signature there)"""
    found = []

    def call(x):
        found.extend((signature(x), signature(X)))  # a tensor of those around, too
        return op(x)

    match name:
        case "dispatch mode":
            with Seen() as mode:
                y = call(x)
            assert any(n.startswith(f"reg_kernels.{op.__name__}") for n in mode.names), mode.names
        case "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                y = call(x)
            assert type(y).__name__ == "FakeTensor"
            y = None
        case "vmap":
            y = torch.func.vmap(call, randomness="same")(x[None])[0]
        case "grad":
            torch.func.grad(lambda x: call(x).sum())(x)
            y = None
        case "dual level":
            with forward_ad.dual_level():
                call(x)
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                y = op(dual)
                assert forward_ad.unpack_dual(y).tangent is not None
                y = forward_ad.unpack_dual(y).primal
        case "trace":
            traced = torch.jit.trace(call, (x,), check_trace=False)
            assert f"reg_kernels::{op.__name__}" in str(traced.inlined_graph)
            y = traced(x)
    return y, found


@OPS
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["dispatch mode", "fake", "vmap", "grad", "dual level", "trace"])
def test_who_looks_at_a_call_sees_it(op, gradient, name):
    x = X.clone().requires_grad_(gradient)
    y, found = under(name, op, x)
    assert found and set(found) == {None}
    if y is not None:
        torch.testing.assert_close(y, op(x))


@OPS
def test_a_function_mode_and_a_subclass_see_a_call(op):
    with Calls() as mode:
        y = op(X)
    assert op.__name__ in mode.names
    torch.testing.assert_close(y, op(X))
    assert type(op(X.as_subclass(Subclass))) is Subclass


@OPS
def test_a_call_is_compiled_whole(op):
    y = torch.compile(op, backend="eager", fullgraph=True)(X)
    torch.testing.assert_close(y, op(X))


@OPS
def test_inference_mode_and_no_grad(op):
    x = X.clone().requires_grad_()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert not op(x).requires_grad
            assert op(x).is_inference() == (mode is torch.inference_mode)
        assert op(x).requires_grad


@OPS
def test_another_layout_and_a_negative_view(op):
    wide = torch.randn(8, 8)
    for x in (X.t().contiguous().t(), wide[:, ::2], wide.t()[:, ::2], torch._neg_view(-X)):
        plain = x.resolve_neg().contiguous()
        for _ in range(2):
            y = op(x)
            if op is not dropout or x.t().is_contiguous() or x.is_contiguous():
                torch.testing.assert_close(y, op(plain if op is not dropout else x.resolve_neg()))
            else:  # what is not dense is drawn for in contiguous order
                assert torch.equal(y, op(plain)) and y.stride() == torch.empty_like(x).stride()


def test_what_a_call_makes_of_its_arguments_is_its_own():
    for labels in (LABELS, (LABELS + 1) % 4):
        expected = torch.nn.functional.cross_entropy(X, labels)
        torch.testing.assert_close(cross_entropy(X, labels.byte()), expected)


@OPS
def test_another_backend(op):
    x = X.clone().requires_grad_()
    for name, suffix in ((None, "default"), ("reference", "reference"), (None, "default")):
        with reg_kernels.backend(name):
            overload = op(x).grad_fn.call[0]
        assert overload._overloadname == suffix
        assert op(x, backend=name).grad_fn.call[0] is overload
    with pytest.raises(ValueError, match="backend"):
        op(X, backend="nobody's")


@OPS
def test_a_wrong_dtype_and_wrong_numbers_are_refused(op):
    for _ in range(2):
        with pytest.raises((RuntimeError, NotImplementedError), match=f"{op.__name__}: input must"):
            op(X.int())
    for _ in range(2):
        with pytest.raises(ValueError, match="p must be in"):
            dropout(X, 1.5)
        with pytest.raises(IndexError, match="labels must be in"):
            cross_entropy(X, LABELS + 10)
        with pytest.raises(TypeError, match="momentum must be"):
            batch_norm(X, "0.1")


def test_what_only_looks_like_the_same_number():
    """1 and True are equal to 1.0, as keys of a dictionary as well; a p of 1 draws nothing."""
    for p in (1.0, 1, True, numpy.float32(1.0), torch.tensor(1.0)):
        assert torch.equal(dropout(X, p), X * 0)
    for p in (0.5, numpy.float32(0.5), torch.tensor(0.5)):
        assert torch.equal(dropout(X, p), dropout(X))


def test_a_state_that_is_not_contiguous():
    state = torch.tensor([3, 0, 5, 0])[::2]
    for _ in range(2):
        assert torch.equal(F.dropout(X, 0.5, rng_state=state), dropout(X))


def test_autocast_gives_the_loss_another_type():
    x = X.bfloat16()
    for _ in range(2):
        assert cross_entropy(x).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert cross_entropy(x).dtype == torch.float32


def test_running_statistics_are_those_of_this_call():
    for _ in range(2):
        mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
        F.batch_norm(X, mean, var, training=True, momentum=1.0, num_batches_tracked=count)
        torch.testing.assert_close(mean, X.mean(0))
        assert count == 1 and mean._version == 1
    with pytest.raises(RuntimeError, match="running_mean must not require grad"):
        F.batch_norm(X, mean.requires_grad_(), var, training=True, momentum=1.0)


def test_no_more_is_kept_than_there_is_room_for():
    known = _signature.Known()
    known.keep(None, 1)
    for i in range(known._MOST + 1):
        known.keep(signature(i), i)
    assert len(known) == 1 and known.get(None) is None
