"""Every case of every op: errors beside PyTorch's, gradients of both orders, the same bits."""

import pytest
import torch
from case_runs import (
    CASES,
    SMALL,
    dtypes,
    inputs_of,
    is_interpreted,
    leaves_of,
    of,
    on_each,
    one_dtype,
    results,
    same,
)

from reg_kernels.cli.check import gradcheck, measure

from support import DEVICE, isas

ON_CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    """torch shares out even small inputs, and its threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@of(CASES)
@dtypes
@on_each
def test_error_against_fp64(case, backend, dtype):
    if is_interpreted(backend) and not (case.small and dtype == one_dtype(case)):
        pytest.skip("too large for Triton's interpreter, which runs each case in one dtype")
    error, allowed = measure(case, backend, torch.device(DEVICE), dtype)
    assert error <= allowed


@of([case for case in SMALL if case.differentiable])
@on_each
def test_gradcheck(case, backend):
    size = sum(x.numel() for x in inputs_of(case, torch.float64))
    if size > (20 if is_interpreted(backend) else 200):
        pytest.skip("numerical gradients of so many elements take minutes")
    assert gradcheck(case, backend, torch.device(DEVICE))


@of([case for case in CASES if case.draws])
@dtypes
@on_each
def test_bits_of_what_is_drawn_are_the_references(case, backend, dtype):
    if is_interpreted(backend) and not case.small:
        pytest.skip("too large for Triton's interpreter")
    inputs = case.inputs(ON_CPU, dtype)
    here = [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=DEVICE) for x in inputs]
    here = [x.copy_(y) for x, y in zip(here, inputs, strict=True)]
    ours = case.function(*here, backend=backend).cpu()
    theirs = case.function(*inputs, backend="reference")
    assert torch.equal(ours == 0, theirs == 0)
    if is_interpreted(backend) and dtype == torch.bfloat16:
        # The interpreter truncates where it should round: one ulp, 2^-8 of the value.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
    else:
        assert torch.equal(ours, theirs)


@of([case for case in SMALL if case.shard])
@on_each
def test_a_shard_gets_its_part_of_the_whole_mask(case, backend):
    inputs = inputs_of(case, torch.float32)
    rows = len(inputs[0])
    whole = case.function(*inputs, backend=backend)
    for first, end in ((0, rows // 2), (rows // 2, rows), (rows // 3, rows // 3 + 1)):
        parts = [x[first:end] for x in inputs]
        assert torch.equal(case.shard(*parts, first=first, backend=backend), whole[first:end])


@of(CASES)
@dtypes
@pytest.mark.skipif(not isas(), reason="the native library was not built")
def test_bits_of_each_instruction_set_and_number_of_threads(case, dtype):
    from reg_kernels import _C

    def found():
        leaves = [x.requires_grad_(case.differentiable) for x in case.inputs(ON_CPU, dtype)]
        return results(case, leaves, "native")

    expected = found()
    try:
        for isa in isas():
            _C.set_isa(isa)
            assert same(found(), expected), isa
    finally:
        _C.set_isa(isas()[-1])
    for threads in (2, 3) if not case.small else ():
        torch.set_num_threads(threads)
        assert same(found(), expected), threads


@of(CASES)
@on_each
def test_two_runs_give_the_same_bits(case, backend):
    if DEVICE == "cpu" and (backend == "native" or not case.small):
        pytest.skip("by instruction sets and threads; too large for an interpreter")
    leaves = leaves_of(case, one_dtype(case))
    assert same(results(case, leaves, backend), results(case, leaves, backend))
