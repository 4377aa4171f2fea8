"""What the random elementwise family makes of an op that neither drops nor multiplies."""

import subprocess
import sys

import pytest
import torch

from support import implementations

# In a process of its own, since an op is registered for good.
PROGRAM = """
import torch
from reg_kernels.ops._modes import watcher
from reg_kernels.ops._draw import DRAWN, draw
from reg_kernels.ops._route import Linear

def reference(input, width, rng_state, element_offset=0, traced=None):
    return input + (width if traced is None else float(traced))

op = Linear(
    "shifted", f"float width, {DRAWN}", reference=reference, triton="none",
    check=lambda *arguments, in_place: None, keeps=("rng_state", "traced_p"), drops=False,
    adjoint=lambda overload, gradient, *arguments: gradient,
    by_torch=lambda overload, input, *arguments: reference(input, *arguments),
)

def shifted(x, width, inplace=False):
    return draw(op, watcher(), x, width, None, 0, "reference", inplace)

x = torch.arange(6.0, requires_grad=True)
for width in (0.0, 0.5, 1.0, 3.0):  # a probability of 1 would leave zeros
    y = shifted(x, width)
    assert torch.equal(y, x + width), (width, y)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(6))
    assert torch.equal(shifted(x * 1, width, inplace=True), x + width)
    assert torch.equal(torch.func.grad(lambda x: shifted(x, width).sum())(x), torch.ones(6))
    assert torch.equal(torch.compile(shifted, backend="eager", fullgraph=True)(x, width), x + width)
state = torch.random.get_rng_state()
shifted(x, 1.0)
assert not torch.equal(state, torch.random.get_rng_state())
"""


def test_an_op_of_a_number_that_is_no_probability():
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], check=True, timeout=300)


@pytest.mark.parametrize("backend", implementations())
def test_views_that_negate(backend):
    suffix = "default" if backend == "native" else backend
    op = getattr(torch.ops.reg_kernels.dropout_, suffix)
    state, x = torch.tensor([1, 2]), torch.ones(2, 3, 40)
    with pytest.raises(RuntimeError, match=r"^dropout_: input must hold its own values"):
        op(x._neg_view(), 0.5, state)
    assert x.equal(torch.ones_like(x))
    step = getattr(torch.ops.reg_kernels.adversarial_step_, suffix)
    rest = (x.clone(), None, 0.1, None, 0.2, 0, 0.0, 2.0, None)
    ours, theirs = x.clone(), x.clone()
    step(ours, x._neg_view(), *rest)  # what is only read may negate
    step(theirs, -x, *rest)
    assert ours.equal(theirs) and not ours.equal(x)
