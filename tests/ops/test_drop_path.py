"""Stochastic depth: what it alone has. All else its cases hold it to."""

import math

import pytest
import torch

from reg_kernels import functional as F

from support import DEVICE, implementations


@pytest.mark.parametrize("backend", implementations())
def test_the_ends(backend):
    x = torch.full((5, 3), math.nan, device=DEVICE, requires_grad=True)
    r = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    before = torch.get_rng_state()
    y = F.drop_path(x, 1.0, residual=r, backend=backend)
    assert torch.equal(y, r)
    assert [g.sum().item() for g in torch.autograd.grad(y.sum(), (x, r))] == [0, 15]
    assert (F.drop_path(x, 1.0, backend=backend) == 0).all()
    assert F.drop_path(x, 0.0) is x
    assert torch.equal(F.drop_path(r, 0.5, False, residual=r), r + r)
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals():
    with pytest.raises(RuntimeError, match="drop_path: input must be a batch"):
        F.drop_path(torch.ones(()), 0.5)
    with pytest.raises(RuntimeError, match="drop_path: residual must be like the input"):
        F.drop_path(torch.ones(2), 0.5, residual=torch.ones(3))
    with pytest.raises(TypeError, match="drop_path: scale_by_keep must be True or False, got str"):
        F.drop_path(torch.ones(2), 0.5, scale_by_keep="no")
