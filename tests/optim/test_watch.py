"""What an optimizer's step asks of its tensors, in C and in Python: whether anything has moved."""

import subprocess
import sys

import pytest
import torch

from reg_kernels.optim import AdamW, _launch, _plan, _watch

WAYS = {"C": _watch.IN_C, "Python": _watch.IN_PYTHON}
on_each = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=pytest.mark.skipif(way is None, reason="not built"))
        for name, way in WAYS.items()
    ],
)
NAMES = ("exp_avg", "step")


class Watched:
    """Four parameters as a plan watches them: one of two dimensions, one of a single element, one
    that is not dense, beside the dense tensor that stands for it, and one of no elements."""

    def __init__(self, way):
        self.describe, self.look_at, _ = way
        strided, empty = torch.randn(5, 8)[:, ::2], torch.randn(0, 3)
        self.params = [torch.randn(4, 4), torch.randn(1, 1), strided, empty]
        self.dense = [*self.params[:2], strided.contiguous(), empty]
        self.states = [
            {"step": torch.zeros(()), "note": "a word", "exp_avg": torch.zeros_like(dense)}
            for dense in self.dense
        ]
        self.give(*map(torch.randn_like, self.dense))
        self.grads = [None] * 4
        self.row = torch.zeros(4, dtype=torch.int64)
        self.known = [
            x
            for p, dense, state in zip(self.params, self.dense, self.states, strict=True)
            for x in (p, dense, *(state[name] for name in NAMES))
        ]
        self.facts = self.describe(self.known)

    def give(self, *grads):
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

    def look(self, grads=True):
        row = memoryview(self.row.numpy()) if grads else memoryview(bytearray())
        taken = self.grads if grads else []
        return self.look_at(self.known, self.facts, self.states, NAMES, taken, row)


@on_each
def test_gradients_are_taken_in_wherever_they_lie(way):
    w = Watched(way)
    for _ in range(2):
        assert w.look() == []
        assert all(grad is p.grad for grad, p in zip(w.grads, w.params, strict=True))
        assert w.row.tolist() == [p.grad.data_ptr() for p in w.params]
        w.give(*map(torch.randn_like, w.dense))


def _set(param, tensor):
    param.data = tensor


def _free(tensor):
    tensor.untyped_storage().resize_(0)


CHANGES = {
    "no gradient": lambda w: w.give(None, *(p.grad for p in w.params[1:])),
    "a parameter elsewhere": lambda w: _set(w.params[0], w.params[0].clone()),
    "a parameter transposed": lambda w: _set(w.params[0], w.params[0].t()),
    "a parameter of another shape": lambda w: _set(w.params[0], w.params[0].view(2, 8)),
    "a parameter of another dtype": lambda w: _set(w.params[0], w.params[0].view(torch.int32)),
    "a parameter freed": lambda w: _free(w.params[0]),
    "a parameter swapped": lambda w: torch.utils.swap_tensors(w.params[0], torch.eye(4)),
    "a strided parameter elsewhere": lambda w: _set(w.params[2], torch.ones(5, 8)[:, ::2]),
    "a state replaced": lambda w: w.states[1].update(exp_avg=torch.zeros(1, 1)),
    "a state that is no tensor": lambda w: w.states[1].update(step=3.0),
    "a state taken away": lambda w: w.states[2].pop("exp_avg"),
    "a state elsewhere": lambda w: _set(w.states[2]["exp_avg"], torch.zeros(5, 4)),
    "a state freed": lambda w: _free(w.states[2]["exp_avg"]),
    "a state that shrinks": lambda w: w.states[0]["exp_avg"].resize_(2, 4),
}


@on_each
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_has_changed_is_seen(way, change):
    w = Watched(way)
    assert w.look() == []
    CHANGES[change](w)
    try:
        assert w.look() is None
    except (RuntimeError, TypeError):
        # From Python an address that is not there raises, which Launches takes for the same.
        assert way is _watch.IN_PYTHON


@on_each
def test_what_is_the_users_own_in_a_state_may_change(way):
    w = Watched(way)
    w.states[0]["note"] = torch.ones(3)
    w.states[0] |= {"exp_avg": w.states[0].pop("exp_avg")}  # the order does not matter
    w.states[0]["exp_avg"].fill_(3.0)
    assert w.look() == []


ODD = {
    "transposed": lambda: torch.randn(4, 4).t(),
    "double": lambda: torch.randn(4, 4, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(4, 4, dtype=torch.bfloat16),
    "negated": lambda: torch._neg_view(torch.randn(4, 4)),
    "zeros without memory": lambda: torch._efficientzerotensor(4, 4),
    "of another shape": lambda: torch.randn(4, 4).view(2, 8),
    "of fewer dimensions": lambda: torch.randn(16),
}


@on_each
@pytest.mark.parametrize("odd", ODD)
def test_gradients_that_kernels_cannot_take_are_named(way, odd):
    w = Watched(way)
    grad = torch.randn(4, 4)
    w.params[0].grad = grad
    grad.data = ODD[odd]()
    assert w.look() == [0]
    assert w.grads[0] is grad
    assert w.row.tolist()[1:] == [p.grad.data_ptr() for p in w.params[1:]]


@on_each
def test_a_sparse_or_freed_gradient_is_named(way):
    w = Watched(way)
    w.params[0].grad = torch.eye(4).to_sparse()
    _free(w.params[2].grad)
    assert w.look() == [0, 2]


@on_each
def test_strides_of_a_single_element_do_not_matter(way):
    w = Watched(way)
    w.params[1].grad = torch.randn(3, 3)[1:2, 1:2]
    assert w.look() == []


@on_each
def test_a_gradient_that_lies_as_a_strided_parameter_is_odd(way):
    # The kernels take the dense tensor in its place.
    w = Watched(way)
    w.params[2].grad = torch.randn(5, 8)[:, ::2]
    assert w.look() == [2]


@on_each
def test_where_no_gradient_is_wanted_none_is_looked_at(way):
    w = Watched(way)
    w.give(None, None, None, None)
    assert w.look(grads=False) == []
    _set(w.params[1], torch.ones(1, 1))
    assert w.look(grads=False) is None


@on_each
def test_holds_goes_by_the_objects(way):
    holds = way[2]
    a, b = torch.ones(2), torch.ones(2)
    assert holds([a, b], [a, b]) and holds({1: a, "x": b}, [a, b]) and holds([], [])
    for other in ([b, a], [a], [a, b, b], [a, a.clone()], {1: b, 2: a}, {1: a}, {}):
        assert not holds(other, [a, b])


@pytest.mark.skipif(_watch.IN_C is None, reason="not built")
def test_lists_of_other_lengths_are_refused():
    w = Watched(_watch.IN_C)
    row = memoryview(w.row.numpy())
    for known, facts, states, grads, room in (
        (w.known[1:], w.facts, w.states, w.grads, row),
        (w.known, w.facts, w.states[1:], w.grads, row),
        (w.known, w.facts, w.states, w.grads[1:], row),
        (w.known, w.facts, w.states, w.grads, row[1:]),
    ):
        with pytest.raises(ValueError, match="of one length"):
            w.look_at(known, facts, states, NAMES, grads, room)
    assert w.look_at(w.known, w.facts[:-8], w.states, NAMES, w.grads, row) is None


def test_steps_are_the_same_by_python(monkeypatch):
    def run():
        torch.manual_seed(0)
        params = [torch.randn(4, 4), torch.randn(5, 8)[:, ::2], torch.randn(3)]
        optimizer = AdamW([{"params": params, "ema_decay": 0.9}], lr=0.1)
        for i in range(5):
            for p in params[: 2 + i % 2]:
                grad = torch.randn_like(p)
                p.grad = torch._neg_view(grad) if i == 3 else grad
            if i == 2:
                params[0].data = params[0].data.clone()
            optimizer.step()
            optimizer.zero_grad()
        return [x for p in params for x in (p, *optimizer.state[p].values())]

    expected = run()
    describe, look, holds = _watch.IN_PYTHON
    monkeypatch.setattr(_launch, "describe", describe)
    monkeypatch.setattr(_launch, "look", look)
    monkeypatch.setattr(_plan, "holds", holds)
    for x, y in zip(run(), expected, strict=True):
        assert torch.equal(x, y)


def run(program: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]


STEP = """
import collections, torch
from reg_kernels.optim import AdamW, _watch
p = torch.nn.Parameter(torch.ones(8))
optimizer = AdamW([p])
for _ in range(3):
    p.grad = torch.ones(8)
    optimizer.step()
    optimizer.state[p] = collections.UserDict(optimizer.state[p])
assert (p < 1).all()
"""


def test_a_state_may_be_any_mapping():
    run(STEP)


@pytest.mark.skipif(_watch.IN_C is None, reason="not built")
@pytest.mark.parametrize("exchange", ["3", "None"])
def test_a_torch_without_the_exchange_is_asked_in_python(exchange):
    run(
        f"import torch\ntorch.Tensor.__dlpack_c_exchange_api__ = {exchange}\n{STEP}"
        "assert _watch.IN_C is None\n"
    )


def test_threads_that_step_at_once_do_not_read_freed_gradients():
    run("""
import sys, threading, time, torch
from reg_kernels.optim import AdamW
torch.set_num_threads(1)
sys.setswitchinterval(1e-6)
params = [torch.nn.Parameter(torch.randn(64)) for _ in range(200)]
optimizer = AdamW(params)
end = time.monotonic() + 2

def give():
    for p in params:
        p.grad = torch.ones(64)

def repeat(f):
    while time.monotonic() < end:
        try:
            f()
        except (RuntimeError, IndexError):  # they get into each other's way, which is their affair
            pass

give()
threads = [threading.Thread(target=repeat, args=(f,)) for f in [optimizer.step] * 3 + [give]]
for t in threads:
    t.start()
for t in threads:
    t.join()
""")
