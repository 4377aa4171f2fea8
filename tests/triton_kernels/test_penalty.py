"""The penalties' Triton kernels: values and gradients in every way of loading."""

import math

import pytest
import torch

from reg_kernels import functional as F
from reg_kernels._tensor_table import CHUNK, TensorTable, addresses, dtype_number

from support import DEVICE, DTYPE_IDS, DTYPES

pytest.importorskip("triton")

from reg_kernels.triton import penalty as kernels

INTERPRETED = DEVICE == "cpu"
POWERS = [1, 2]
# Elements that fill no vector, no block, several of them, a chunk and more; of none as well.
SIZES = (5, 0, 48, 2051, CHUNK + 1)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
powers = pytest.mark.parametrize("power", POWERS)


def values(sizes, dtype, misaligned=False):
    """Random tensors, 16-byte aligned or one element past it."""
    made = [torch.randn(n + misaligned).to(DEVICE, dtype)[int(misaligned) :] for n in sizes]
    assert all((x.data_ptr() % 16 != 0) == misaligned for x in made if x.numel())
    return made


def table_of(tensors, **rows):
    sizes = [x.numel() for x in tensors]
    device = tensors[0].device
    return TensorTable(sizes, device, (tensors[0].dtype,), grad=addresses(tensors), **rows)


def sum_of(tensors, power, sums=None, slot=0, table=None):
    """What penalty_table makes of them, and the table it has used."""
    table = table or table_of(tensors)
    sums = torch.full((1,), math.nan, dtype=torch.float64, device=DEVICE) if sums is None else sums
    number = dtype_number(tensors[0].dtype)
    where = (table.data, table.count, table.seal)
    kernels.penalty_table(*where, number, power, sums, slot, table.scratch)
    return float(sums[slot]), table


@powers
@pytest.mark.parametrize("misaligned", [False, True])
@dtypes
def test_sums(dtype, misaligned, power):
    tensors = values(SIZES, dtype, misaligned)
    truth = sum(float(x.double().abs().pow(power).sum()) for x in tensors)
    assert sum_of(tensors, power)[0] == pytest.approx(truth, rel=1e-14)


@powers
@dtypes
def test_gradients(dtype, power):
    tensors = [x.requires_grad_() for x in values((5, 0, 2051), dtype)]
    penalty = F.l1_penalty if power == 1 else F.l2_penalty
    factor = torch.tensor(0.75, device=DEVICE)
    ours, theirs = (
        torch.autograd.grad(penalty(tensors, backend=backend), tensors, factor)
        for backend in ("triton", "reference")
    )
    # The interpreter truncates to bfloat16: up to one unit below what is rounded to nearest.
    truncates = INTERPRETED and dtype == torch.bfloat16
    rtol = torch.finfo(dtype).eps if truncates else 0.0
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=0.0)


@powers
@pytest.mark.parametrize("misaligned", [(True, False), (False, True)], ids=["from", "to"])
def test_gradients_of_which_one_side_is_misaligned(misaligned, power):
    (x,), (y,) = (values((100,), torch.float32, m) for m in misaligned)
    memory = torch.full((120,), 9.0, device=DEVICE)
    y = memory[4 + misaligned[1] :][: y.numel()]
    table = table_of([x], param=addresses([y]))
    g = torch.tensor([0.5], dtype=torch.float64, device=DEVICE)
    kernels.penalty_backward_table(table.data, 1, table.seal, dtype_number(x.dtype), power, g)
    torch.testing.assert_close(y, (x.sgn() if power == 1 else 2 * x) * 0.5, rtol=0, atol=0)
    assert int((memory == 9.0).sum()) == 20  # nothing before it, nothing behind


@powers
def test_what_is_not_finite(power):
    x = torch.tensor([math.nan, 0.0, -0.0, math.inf, -math.inf, -2.0], device=DEVICE)
    assert math.isnan(sum_of([x], power)[0])
    assert sum_of([x[1:].clone()], power)[0] == math.inf
    x.requires_grad_()
    penalty = F.l1_penalty if power == 1 else F.l2_penalty
    (ours,) = torch.autograd.grad(penalty(x, backend="triton"), x)
    (theirs,) = torch.autograd.grad(penalty(x, backend="reference"), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_sum_survives_cancellation_and_float16s_range():
    # Squares of 300 are past float16; a thousand and a millionth are not of one float32.
    assert sum_of([torch.full((40,), 300.0, dtype=torch.float16, device=DEVICE)], 2)[0] == 3.6e6
    x = torch.tensor([1e3, 1e-6], device=DEVICE)
    assert sum_of([x], 1)[0] == pytest.approx(float(x.double().sum()), rel=1e-16)


def test_the_same_bits_however_it_is_loaded():
    (x,), (y,) = (values((2100,), torch.float32, m) for m in (False, True))
    y.copy_(x)
    assert sum_of([x], 2)[0] == sum_of([y], 2)[0]


def test_a_slot_of_several_and_a_table_used_again():
    sums = torch.arange(3.0, dtype=torch.float64, device=DEVICE)
    tensors = values((3, CHUNK + 3), torch.float32)
    first, table = sum_of(tensors, 1, sums, 1)
    assert sums[0] == 0 and sums[2] == 2
    assert table.scratch[0] == 0  # the ticket is back
    assert sum_of(tensors, 1, sums, 1, table)[0] == first
    tensors[0].mul_(2)
    assert sum_of(tensors, 1, sums, 2, table)[0] > first


def test_nothing_to_sum():
    assert sum_of(values((0, 0), torch.float32), 1)[0] == 0.0


def test_partial_sums_that_one_go_does_not_take(monkeypatch):
    monkeypatch.setattr(kernels, "PARTIALS", 2)
    x = values((3, 4, 5, 6, 7), torch.float64)
    truth = sum(float(t.abs().sum()) for t in x)
    assert sum_of(x, 1)[0] == pytest.approx(truth, rel=1e-15)
