"""Every case of every op: errors beside PyTorch's, gradients of both orders, the same bits."""

import pytest
import torch
from case_runs import (
    CASES,
    IMPLEMENTATIONS,
    SMALL,
    cells,
    inputs_of,
    is_interpreted,
    leaves_of,
    of,
    on_each,
    one_dtype,
    results,
    same,
    taken,
)

from reg_kernels.cli.check import gradcheck, measure

from support import DEVICE, DTYPES, isas

ON_CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@cells(CASES, *DTYPES)
def test_error_against_fp64(case, backend, dtype):
    error, allowed = measure(case, backend, torch.device(DEVICE), dtype)
    assert error <= allowed


@of([case for case in SMALL if case.differentiable])
@on_each
def test_gradcheck(case, backend):
    if not taken(case.op, backend, torch.float64):
        pytest.skip("float64 is the reference's alone")
    size = sum(x.numel() for x in inputs_of(case, torch.float64))
    if is_interpreted(backend) and size > 10:
        pytest.skip("takes Triton's interpreter minutes")
    assert gradcheck(case, backend, torch.device(DEVICE))


@cells([case for case in CASES if case.draws], *DTYPES)
def test_bits_of_what_is_drawn_are_the_references(case, backend, dtype):
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
@pytest.mark.skipif(not isas(), reason="the native library was not built")
def test_bits_of_each_instruction_set_and_number_of_threads(case):
    from reg_kernels import _C

    for dtype in DTYPES:
        if not taken(case.op, "native", dtype):
            continue

        def found(dtype=dtype):
            leaves = [x.requires_grad_(case.differentiable) for x in case.inputs(ON_CPU, dtype)]
            return results(case, leaves, "native")

        expected, count = found(), torch.get_num_threads()
        try:
            for isa in isas():
                _C.set_isa(isa)
                assert same(found(), expected), (isa, dtype)
        finally:
            _C.set_isa(isas()[-1])
        try:
            for threads in (2, 3) if not case.small else ():
                torch.set_num_threads(threads)
                assert same(found(), expected), (threads, dtype)
        finally:
            torch.set_num_threads(count)


@of(CASES if DEVICE == "cuda" else SMALL[::3])
@pytest.mark.parametrize("backend", IMPLEMENTATIONS[:2])
def test_two_runs_give_the_same_bits(case, backend):
    dtype = one_dtype(case)
    leaves = leaves_of(case, dtype if taken(case.op, backend, dtype) else torch.float32)
    assert same(results(case, leaves, backend), results(case, leaves, backend))
