"""What a subset's residual branch alone has: how many passes it makes, and what is no subset."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reg_kernels import nn
from reg_kernels.ops.subset import Subset, add_of_subset

from support import DEVICE, implementations

OPS = torch.ops.reg_kernels
SUBSET = Subset(torch.tensor([4, 0]), torch.tensor([1, 3, 2]))


class Passes(TorchDispatchMode):
    """The names of the operations that write memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function._opname != "detach":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", implementations())
@pytest.mark.parametrize("last", [False, True])
def test_it_is_one_kernel_each_way_at_either_end(backend, last):
    subset = Subset(*(rows.to(DEVICE) for rows in SUBSET))
    x = torch.randn(5, 3, 2, 2, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    g = torch.randn_like(x)
    with Passes() as forward:
        y = add_of_subset(x, torch.neg, subset, 2.5, backend)
    with Passes() as backward:
        (gradient,) = torch.autograd.grad(y, x, g)
    if backend != "reference":
        assert forward.names == ["subset", "neg", "subset_add"]
        assert backward.names == ["subset", "neg", "subset_add"]
    factors = torch.ones(5, 1, 1, 1, device=DEVICE)
    factors[subset.kept] = -1.5
    torch.testing.assert_close(y, x * factors)
    torch.testing.assert_close(gradient, g * factors)
    assert y.stride() == gradient.stride() == x.stride()


def test_a_gradient_is_made_where_it_is_wanted_alone():
    layer = torch.nn.Linear(3, 3, device=DEVICE)
    subset = Subset(*(rows.to(DEVICE) for rows in SUBSET))
    x = torch.randn(5, 3, device=DEVICE)
    y = add_of_subset(x, layer, subset, 2.5)
    with Passes() as passes:
        y.sum().backward()
    assert [name for name in passes.names if name.startswith("subset")] == ["subset"]
    (expected,) = torch.autograd.grad(2.5 * layer(x[subset.kept]).sum(), layer.weight)
    torch.testing.assert_close(layer.weight.grad, expected)
    x.requires_grad_()
    y = add_of_subset(x, lambda gathered: gathered.detach(), subset, 2.5)
    g = torch.randn_like(y)
    with Passes() as passes:
        (gradient,) = torch.autograd.grad(y, x, g)
    assert passes.names == []
    assert torch.equal(gradient, g)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("samples", [0, 1, 4])
def test_blocks_of_any_batch_whose_branch_writes_over_its_input(samples, p):
    branch = torch.nn.Sequential(torch.nn.ReLU(inplace=p > 0), torch.nn.Linear(3, 3))
    block = nn.StochasticDepthBlock(branch.to(DEVICE), p, "subset")
    x = torch.randn(samples, 3, device=DEVICE, requires_grad=True)
    before = x.detach().clone()
    y = block(x)
    assert torch.equal(x, before)
    kept = round((1 - p) * samples)
    assert (y != x).any(1).sum() == kept
    (y * 1).sum().backward()
    assert x.grad.shape == x.shape
    assert (branch[1].weight.grad is None) == (kept == 0 and p > 0)


def calls(**changed):
    """Of both ops, valid but for what is changed."""
    kept, dropped = changed.get("subset", SUBSET)
    x = changed.get("batch", torch.ones(5, 3))
    part = changed.get("part", torch.ones(2, 3))
    return {"subset": (x, kept, dropped, 1.0), "subset_add": (part, x, kept, dropped, 1.0)}


WRONG = [
    *(("subset", {"batch": torch.ones(4, 3)}), ("subset_add", {"batch": torch.ones(4, 3)})),
    *(("subset_add", {"part": torch.ones(3, 3)}), ("subset_add", {"part": torch.ones(2, 4)})),
    *(
        ("subset_add", {"part": torch.ones(2, 3).double()}),
        ("subset", {"batch": torch.ones(5).int()}),
    ),
    *((op, {"batch": torch.ones(3, 5).T}) for op in ("subset", "subset_add")),
    ("subset_add", {"part": torch.ones(3, 2).T}),
    ("subset", {"subset": (torch.ones(2), SUBSET.dropped)}),
    ("subset", {"subset": (SUBSET.kept, torch.arange(6)[::2])}),
    ("subset_add", {"batch": torch.ones(5, 2, 3), "part": torch.ones(2, 3, 2).transpose(1, 2)}),
]


@pytest.mark.parametrize(("op", "changed"), WRONG)
def test_bad_calls_are_refused_alike(op, changed):
    messages = set()
    for overload in ("default", "triton", "reference"):
        with pytest.raises(RuntimeError, match=f"^{op}: ") as error:
            getattr(getattr(OPS, op), overload)(*calls(**changed)[op])
        messages.add(str(error.value).replace(",)", ")"))
    assert len(messages) == 1, messages


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU asserts")
@pytest.mark.parametrize("kept", [(4, 5), (-1, 0), (4, 4), (4, 1)])
@pytest.mark.parametrize("op", ["subset", "subset_add"])
def test_a_subset_has_each_sample_once(op, kept):
    arguments = calls(subset=(torch.tensor(kept), SUBSET.dropped))[op]
    with pytest.raises(RuntimeError, match=f"^{op}: kept and dropped must be such that they have"):
        getattr(OPS, op).default(*arguments)


def test_what_is_no_float_is_refused():
    block = nn.StochasticDepthBlock(torch.nn.Identity(), 0.5, "subset")
    with pytest.raises(RuntimeError, match=r"^subset_add: input must be one of float64"):
        block(torch.ones(4, 2, dtype=torch.complex64))
