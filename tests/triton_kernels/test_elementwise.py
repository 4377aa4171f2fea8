"""The random elementwise family in Triton: what no op of it has."""

import pytest
import torch

from reg_kernels._rng import GROUP, tag
from reg_kernels.reference import dropout as reference
from reg_kernels.reference._philox import half_words

from support import DEVICE

pytest.importorskip("triton")

import triton
import triton.language as tl

from reg_kernels.triton._elementwise import DrawnBy, Element, launch_elements, launch_rows
from reg_kernels.triton.dropout import DROPOUT


@pytest.mark.parametrize("reads_dropped", [False, True])
def test_a_residual_beside_a_draw_for_each_element(reads_dropped):
    x, residual = torch.randn(2, 3001, device=DEVICE)
    drawn = (0.3, torch.tensor([5, 7]), GROUP + 3)
    kept = reference.dropout(torch.ones_like(x), *drawn) != 0
    if not reads_dropped:
        x[~kept] = torch.nan
    y = torch.empty_like(x)
    op = DROPOUT._replace(READS_DROPPED=reads_dropped)
    launch_elements(op, x, y, DrawnBy(*drawn), residual)
    scaled = reference.dropout(x.nan_to_num(), *drawn)
    torch.testing.assert_close(y, torch.where(kept, residual + scaled, residual))


@triton.jit
def number_values(x, drawn, threshold, scale):
    return x + scale.to(x.dtype) * drawn.to(tl.float64).to(x.dtype)


@pytest.mark.parametrize("residual", [None, -3.0])
@pytest.mark.parametrize("bits", [16, 32])
def test_draws_that_are_numbers(bits, residual):
    op = Element(number_values, tag("anumbers"), DROPS=False, BITS=bits)
    width, offset, numel = 2.0, 2**33 + 5, 5000
    state = torch.tensor([2**62 + 1, -9])
    if bits == 16:
        numbers = half_words(state, op.TAG, offset, numel)
    else:
        low, high = half_words(state, op.TAG, 2 * offset, 2 * numel).view(-1, 2).unbind(1)
        numbers = low + (high << 16)
    x = torch.ones(numel, dtype=torch.float64, device=DEVICE)
    beside = None if residual is None else x * residual
    expected = (width * numbers.double() + 1 + (residual or 0)).to(DEVICE)
    by_value = DrawnBy(width, state, offset)
    by_pointer = DrawnBy(0.0, state.to(DEVICE), offset, x[:1] * width)
    for draw in by_value, by_pointer:
        y = torch.empty_like(x)
        launch_elements(op, x, y, draw, beside)
        assert torch.equal(y, expected)
    y = torch.empty_like(x)
    launch_rows(op, x, y, by_value, samples=5, rows=numel // 5, residual=beside)
    assert torch.equal(y, expected)
