"""What torch makes of every op: programs, batches, other ways to differentiate, shapes alone."""

import contextlib

import pytest
import torch
from case_runs import (
    DIFFERENTIABLE,
    IMPLEMENTATIONS,
    IN_PLACE,
    Recorder,
    described,
    gradients,
    inputs_of,
    kinds_of,
    leaves_of,
    of,
    on_each,
    one_an_op,
    results,
    same,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._ops import OpOverload

from reg_kernels.ops._registry import implementation_of

from support import DEVICE

GRAPH = torch.autograd.graph
KINDS = kinds_of(DIFFERENTIABLE)
assert_close = torch.testing.assert_close


# Programs


@pytest.fixture
def compiled():
    """torch.compile(fullgraph=True), by what needs no compiler of C++, and the programs it made."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter.graphs
    torch._dynamo.reset()


@of(KINDS)
def test_compiled_is_as_eager(compiled, case):
    function = compiled[0](lambda *x: case.function(*x))
    for _ in range(2):
        leaves = leaves_of(case, torch.float32)
        y, expected = function(*leaves), results(case, leaves, None)
        assert described(y) == described(expected[0])
        assert_close([y, *gradients(case, y, leaves)], expected, equal_nan=True)


@of(one_an_op(DIFFERENTIABLE))
@pytest.mark.parametrize("backend", IMPLEMENTATIONS[1:])
def test_compiled_it_runs_where_it_is_told(compiled, case, backend):
    leaves = leaves_of(case, torch.float32)
    expected = results(case, leaves, backend)
    function, programs = compiled[0](lambda *x: case.function(*x, backend=backend)), compiled[1]
    y = function(*leaves)
    assert_close([y, *gradients(case, y, leaves)], expected, equal_nan=True)
    called = [node.target for program in programs for node in program.graph.nodes]
    ours = [f for f in called if isinstance(f, OpOverload) and f.namespace == "reg_kernels"]
    assert {implementation_of(f) for f in ours} == {backend}


@of(kinds_of(IN_PLACE))
def test_compiled_in_place(compiled, case):
    inputs = inputs_of(case, torch.float32)
    expected = case.fresh(*inputs)
    assert compiled[0](lambda *x: case.over(*x))(*inputs) is inputs[0]
    assert_close(inputs[0], expected)


@of([case for case in KINDS if case.traced])
def test_shapes_alone(case):
    leaves = leaves_of(case, torch.float16)
    expected = results(case, leaves, None)
    alone = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=True)
        for x in leaves
    ]
    y = case.function(*alone)
    assert described([y, *gradients(case, y, alone)]) == described(expected)


# Differentiation


@of(one_an_op(DIFFERENTIABLE))
@on_each
def test_no_graph_where_none_is_wanted(case, backend):
    leaves = leaves_of(case, torch.float32)
    y = case.function(*leaves, backend=backend)
    assert y.requires_grad
    with torch.no_grad(), Recorder() as unwanted:
        assert not case.function(*leaves, backend=backend).requires_grad
    with Recorder() as impossible:
        detached = [x.detach() for x in leaves]
        assert not case.function(*detached, backend=backend).requires_grad
    # Nor is anything kept for it.
    assert [call.kind for call in unwanted.calls] == [call.kind for call in impossible.calls]
    with torch.inference_mode():
        assert same([case.function(*leaves, backend=backend)], [y.detach()])


def both_gradients(case, y, leaves):
    """Those of a backward, which may have been made before, and those of the one after it."""
    return [*gradients(case, y, leaves, retain_graph=True), *gradients(case, y, leaves)]


@of(KINDS)
def test_hooks_on_what_is_saved(case):
    leaves = leaves_of(case, torch.float64)
    expected = both_gradients(case, case.function(*leaves), leaves)
    moved = (lambda t: t.contiguous().clone(), lambda t: t)
    for context in (
        GRAPH.saved_tensors_hooks(*moved),
        GRAPH.save_on_cpu(),
        GRAPH.disable_saved_tensors_hooks("none here"),
    ):
        with context:
            assert same(both_gradients(case, case.function(*leaves), leaves), expected)
    # All that counts comes from them: nothing is kept beside, which they would not move.
    with GRAPH.saved_tensors_hooks(lambda t: t, torch.zeros_like):
        try:
            lost = both_gradients(case, case.function(*leaves), leaves)
        except RuntimeError as error:
            assert " must be " in str(error)  # of what is zeros now
            return
    if case.keeps != 0:
        assert not same(lost[len(leaves) :], expected[len(leaves) :])


@of(KINDS)
def test_mutation_of_what_is_saved(case):
    """Is made up for where autograd is told to, and else an error, if it could be seen."""
    leaves = leaves_of(case, torch.float64)
    expected = both_gradients(case, case.function(*leaves), leaves)[: len(leaves)]
    for context in (GRAPH.allow_mutation_on_saved_tensors(), contextlib.nullcontext()):
        with context as allowed:
            copies = [x * 1 for x in leaves]
            y = case.function(*copies)
            gradients(case, y, leaves, retain_graph=True)
            for x in copies:
                x.detach().mul_(0)
            try:
                assert same(gradients(case, y, leaves), expected)
            except RuntimeError as error:
                assert allowed is None and "modified by an inplace operation" in str(error)


@of(KINDS)
def test_batched_gradients_and_torch_func(case):
    leaves = leaves_of(case, torch.float64)
    y = case.function(*leaves)
    g = torch.randn(2, *y.shape, dtype=y.dtype, device=DEVICE)

    def by(g, **options):
        return torch.autograd.grad(y, leaves, g, retain_graph=True, **options)

    one, two = by(g[0]), by(g[1])
    stacked = tuple(torch.stack(pair) for pair in zip(one, two, strict=True))
    for create_graph in (False, True):
        batched = by(g, is_grads_batched=True, create_graph=create_graph)
        assert_close(batched, stacked)
    assert_close(torch.vmap(by)(g), stacked)
    inputs = tuple(x.detach() for x in leaves)
    output, pullback = torch.func.vjp(case.function, *inputs)
    assert_close(output, y.detach())
    assert_close(pullback(g[0]), one)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, tangent = torch.func.jvp(case.function, inputs, tangents)
    product = sum((t * d).sum() for t, d in zip(tangents, one, strict=True))
    assert_close((tangent * g[0]).sum(), product)
    with torch.autograd.forward_ad.dual_level():
        dual = map(torch.autograd.forward_ad.make_dual, inputs, tangents)
        unpacked = torch.autograd.forward_ad.unpack_dual(case.function(*dual))
    assert_close(unpacked.tangent, tangent)
    # A batch of calls, and of gradients: contiguous, as a stack is. What is no batch cannot be
    # written over by one.
    inputs = tuple(x.contiguous() for x in inputs)
    others = tuple(1.5 * x for x in inputs)
    batch = tuple(torch.stack(pair) for pair in zip(inputs, others, strict=True))
    function = case.fresh or case.function
    gradient = torch.func.grad(lambda *x: function(*x).sin().sum(), tuple(range(len(inputs))))
    for each in (lambda *x: (function(*x),), gradient):
        mapped = torch.func.vmap(each, randomness="same")(*batch)
        expected = zip(each(*inputs), each(*others), strict=True)
        assert_close(mapped, tuple(map(torch.stack, expected)))


@of(KINDS)
def test_second_derivatives_of_every_kind(case):
    """Times a vector; of the formula they are the same."""
    inputs = inputs_of(case, torch.float64)
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def gradient(function):
        return torch.func.grad(lambda *x: function(*x).sin().sum(), tuple(range(len(inputs))))

    _, ours = torch.func.jvp(gradient(case.function), inputs, tangents)
    _, theirs = torch.func.jvp(gradient(case.oracle), inputs, tangents)
    assert_close(ours, theirs)
    leaves = leaves_of(case, torch.float64)
    first = torch.autograd.grad(case.function(*leaves).sin().sum(), leaves, create_graph=True)
    product = sum((t * d).sum() for t, d in zip(tangents, first, strict=True))
    assert_close(torch.autograd.grad(product, leaves), ours)
