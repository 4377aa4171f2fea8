"""The random elementwise family in Triton: what no op of it has."""

import pytest
import torch

from reg_kernels._rng import GROUP
from reg_kernels.reference import dropout as reference

from support import DEVICE

pytest.importorskip("triton")

from reg_kernels.triton._elementwise import DrawnBy, launch_elements
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
