"""What every op is to torch: registered, faked, captured, recorded by autograd, written over."""

import pytest
import torch
from case_runs import (
    CASES,
    IMPLEMENTATIONS,
    IN_PLACE,
    SMALL,
    copied,
    described,
    gradients,
    inputs_of,
    is_interpreted,
    kinds_of_calls,
    leaves_of,
    of,
    on_each,
    one_an_op,
    recorded,
    same,
    tensors,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_flatten, tree_map_only

from reg_kernels.ops._registry import OPS

from support import DEVICE, captured, no_waiting

GRAPH = torch.autograd.graph
SCHEMA = "test_schema"
each_op = pytest.mark.parametrize("op", OPS)


# Registration


@of(SMALL)
@on_each
def test_it_runs_where_it_is_told_and_fakes_are_as_what_is_real(case, backend):
    """Backwards, too, which run where their forward did."""
    if is_interpreted(backend) and SMALL.index(case) % 3:
        pytest.skip("takes Triton's interpreter minutes")
    found, calls = recorded(case, backend, torch.float32)
    inputs = leaves_of(case, torch.float32)
    assert {call.backend for call in calls} <= {backend}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for call in calls:
            with torch.no_grad():  # with gradients of its own a backward is made of torch's ops
                fake = call.overload(*tree_map_only(torch.Tensor, mode.from_tensor, call.args))
            assert described(fake) == described(call.returned), call.overload
        if case.traced:
            leaves = [mode.from_tensor(x) for x in inputs]
            y = case.function(*leaves, backend=backend)
            assert described([y, *gradients(case, y, leaves)]) == described(found)


@of([case for case in SMALL if case.differentiable])
@on_each
def test_what_it_returns_may_be_written(case, backend):
    """It is no view that an op made, which autograd would let nobody write to."""
    if is_interpreted(backend) and SMALL.index(case) % 3:
        pytest.skip("takes Triton's interpreter minutes")
    leaves = leaves_of(case, torch.float32)
    y = case.function(*leaves, backend=backend)
    expected = torch.autograd.grad(y.sum() * 2, leaves, retain_graph=True, allow_unused=True)
    y.mul_(2)
    found = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _written(results):
    """Without a chain's gates, of bytes, which end in some that nobody reads or writes."""
    return [x for x in results if x.dtype != torch.uint8]


@each_op
@on_each
def test_opcheck(op, backend):
    """The schema of all; the rest, which implementations share, of five calls of the native one."""
    calls = kinds_of_calls(op, backend)
    plain = [c for c in calls if len(_written(tensors(c.returned))) == len(tensors(c.returned))]
    whole = plain[:: -(-len(plain) // 5) or 1] if backend == "native" else ()
    for call in calls:
        opcheck(call.overload, copied(call), **({} if call in whole else {"test_utils": SCHEMA}))


# A backward's gradients are the second ones of gradgradcheck: it may be given sums of the input.
@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_backward")])
@pytest.mark.parametrize("backend", IMPLEMENTATIONS[::2])
def test_the_registered_op_has_gradients(op, backend):
    for call in kinds_of_calls(op, backend, torch.float64):
        flat, spec = tree_flatten(copied(call))
        places = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.requires_grad]
        if op.removesuffix("_") in OPS and op.endswith("_"):
            places = [0]  # what is written over; its calls are made without a gradient

        def function(*leaves, call=call, flat=flat, spec=spec, places=places):
            values = {i: leaf * 1 for i, leaf in zip(places, leaves, strict=True)}
            args = spec.unflatten([values.get(i, x) for i, x in enumerate(flat)])
            returned = call.overload(*args)
            return args[0] if returned is None else returned

        if places and sum(flat[i].numel() for i in places) < 300:
            leaves = [flat[i].detach().requires_grad_() for i in places]
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True), call.kind


@of(one_an_op(SMALL))
def test_a_backend_that_is_none(case):
    with pytest.raises(ValueError, match="backend must be one of native, triton, reference"):
        case.function(*inputs_of(case, torch.float32), backend="cuda")


# On a GPU. Without one they go through the same steps on the CPU: a graph's replay is the call
# itself, and what is large is not.

KERNELS = pytest.mark.parametrize("backend", IMPLEMENTATIONS[:2])
LARGE = 2**31 if DEVICE == "cuda" else 2**11
# A table of addresses is made at each call, and not while a graph is captured.
BY_TABLES = ("optimizer_step_", "penalty", "penalty_backward")


@of([c for c in (CASES if DEVICE == "cuda" else SMALL[::10]) if c.op not in BY_TABLES])
@KERNELS
def test_capture(case, backend):
    """Nothing waits for the device, and a graph's replays are what eager calls give of what lies
    there by then."""
    _, calls = recorded(case, backend, torch.float32)
    with torch.no_grad():  # with gradients of its own a backward is made of torch's ops
        for call in calls:
            with no_waiting():
                call.overload(*copied(call))
            args = copied(call)
            replay, found = captured(lambda call=call, args=args: call.overload(*args))
            for _ in range(2):
                # Each number stays such as its argument takes: what a backward is given of the
                # forward belongs together.
                for x in tensors(args[:1] if call.op.endswith("_backward") else args):
                    if x.device.type == DEVICE and x.dim():
                        x.copy_(x.roll(1, 0))
                eager = copied(call, args)
                returned = call.overload(*eager)
                replay()
                ours, theirs = tensors((args, found)), tensors((eager, returned))
                assert same(*(_written(results) for results in (ours, theirs))), call.kind


@of(one_an_op([case for case in SMALL if case.shard and case.differentiable]))
@KERNELS
def test_more_than_2_to_the_31_elements(case, backend):
    x = inputs_of(case, torch.float32 if DEVICE == "cpu" else torch.bfloat16)[0]
    rows = LARGE // x[0].numel() + 3
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 7 * LARGE:
        pytest.skip("not enough free GPU memory")
    x = x.repeat(-(-rows // len(x)), *[1] * (x.dim() - 1))[:rows]
    y = case.function(x, backend=backend)
    for first in (0, rows // 2, rows - 3):
        part = slice(first, first + 3)
        expected = case.shard(x[part].cpu(), first=first, backend="reference")
        assert torch.equal(y[part].cpu(), expected)


# Autograd


@of([case for case in CASES if case.keeps is not None and case.differentiable])
@on_each
def test_it_keeps_no_more_than_it_says(case, backend):
    if is_interpreted(backend) and not case.small:
        pytest.skip("too large for Triton's interpreter")
    kept = []
    with GRAPH.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        case.function(*leaves_of(case, torch.float32), backend=backend)
    assert sum(x.untyped_storage().nbytes() for x in kept if x is not None) <= case.keeps


# In place


@of(IN_PLACE)
@on_each
def test_in_place_is_as_fresh(case, backend):
    if is_interpreted(backend) and IN_PLACE.index(case) % 3:
        pytest.skip("takes Triton's interpreter minutes")
    inputs = inputs_of(case, torch.float32)
    expected, version = case.fresh(*inputs, backend=backend), inputs[0]._version
    assert case.over(*inputs, backend=backend) is inputs[0]
    assert inputs[0]._version > version
    assert same([inputs[0]], [expected])
    leaves = leaves_of(case, torch.float32)
    products = [x * 1 for x in leaves]
    ours, theirs = case.function(*leaves, backend=backend), case.over(*products, backend=backend)
    assert theirs is products[0]
    assert same(gradients(case, ours, leaves), gradients(case, theirs, leaves))


@of(one_an_op(IN_PLACE))
@on_each
def test_in_place_on_a_part_and_on_what_autograd_saved(case, backend):
    x, *others = leaves_of(case, torch.float32)
    whole = torch.stack([x, x]) * 1
    expected = case.fresh(x, *others, backend=backend).detach()
    part = case.over(whole[1], *others, backend=backend)
    assert same([whole[0].detach(), whole[1].detach()], [x.detach(), expected])
    (ours,) = torch.autograd.grad(part, x, torch.ones_like(part), retain_graph=True)
    y = case.fresh(x, *others, backend=backend)
    assert same([ours], torch.autograd.grad(y, x, torch.ones_like(y)))
    saved = x.exp()
    y = saved * 1
    case.over(saved, *others, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    negated = torch._neg_view(x.detach().clone())
    expected = case.fresh(-x, *others, backend=backend).detach()
    assert same([case.over(negated, *others, backend=backend).clone()], [expected])


@of(one_an_op(IN_PLACE))
def test_in_place_where_it_is_forbidden_raises_and_changes_nothing(case):
    leaf, *others = leaves_of(case, torch.float32)
    others = [x.detach() for x in others]
    with torch.inference_mode():
        inference = leaf.detach().clone()
    random = torch.get_rng_state()
    for x, message in (
        (leaf, "leaf"),
        (leaf[:], "leaf"),
        ((torch.stack([leaf, leaf]) * 1).unbind(0)[0], "view"),
        (inference, "inference"),
        (leaf.detach()[:1].expand(leaf.shape), "single memory location"),
    ):
        before = x.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            case.over(x, *others)
        assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.inference_mode():
        assert case.over(inference, *others) is inference
