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
    for shape in ((2,), (3, 1), (4, 1, 1), (1, 1, 1, 3), (2, 1, 1), (5, 3), (0,)):
        with pytest.raises(RuntimeError, match="drop_path: layer_scale must broadcast against"):
            F.drop_path(torch.ones(4, 5, 3), 0.5, layer_scale=torch.ones(shape))
    with pytest.raises(RuntimeError, match="drop_path: layer_scale must broadcast against"):
        F.drop_path(torch.ones(4), 0.5, layer_scale=torch.ones(4))
    with pytest.raises(RuntimeError, match=r"layer_scale must be one of float64.*, got int64"):
        F.drop_path(torch.ones(2, 3), 0.5, layer_scale=torch.ones(3).long())
    with pytest.raises(TypeError, match="layer_scale must be a Tensor or None, got float"):
        F.drop_path(torch.ones(2, 3), 0.5, layer_scale=0.1)
    with pytest.raises(TypeError, match="drop_path: scale_by_keep must be True or False, got str"):
        F.drop_path(torch.ones(2), 0.5, scale_by_keep="no")


@pytest.mark.parametrize("backend", implementations())
def test_a_layer_scale_of_another_dtype(backend):
    """Is computed in float32 whatever the input is: a gradient is its own dtype's."""
    x, r = torch.randn(2, 9, 6, 4, device=DEVICE).to(torch.float16).requires_grad_()
    state = torch.tensor([3, 4])
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        own = torch.randn(6, 1, device=DEVICE).to(dtype).requires_grad_()
        found = []
        for scale in (own, own.detach().float().requires_grad_()):
            y = F.drop_path(x, 0.5, residual=r, layer_scale=scale, rng_state=state, backend=backend)
            found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, r, scale))))
        assert found[0][-1].dtype == dtype
        assert all(torch.equal(a.to(b), b.to(a).to(b)) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", implementations())
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("length", [5, 2**13])
def test_a_layer_scales_gradient_is_without_what_was_dropped(length, p, backend):
    state = torch.tensor([3, 4])
    kept = F.drop_path(torch.ones(9, device=DEVICE), p, rng_state=state) != 0
    x, g = torch.randn(2, 9, length, 3, device=DEVICE, dtype=torch.float64)
    scale = torch.randn(3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    expected = (x * g)[kept].sum((0, 1)) * 2
    for t in (x, g):
        t[~kept] = torch.nan
    y = F.drop_path(x, p, layer_scale=scale, rng_state=state, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y, scale, g)[0], expected)


def test_a_layer_scale_where_nothing_is_dropped():
    """One number for all, and one a channel; the generator stays as it is."""
    x, r = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=DEVICE)
    one, each = torch.full((), 0.1).to(x), torch.rand(6, 1).to(x)
    half, single = x.half(), one.float()
    before = torch.get_rng_state()
    for scale in (one, each):
        for p, training in ((0.0, True), (0.7, False)):
            y = F.drop_path(x, p, training, residual=r, layer_scale=scale)
            assert torch.equal(y, r + x * scale)
    assert F.drop_path(half, 0.0, layer_scale=single).dtype == torch.half
    assert torch.equal(torch.get_rng_state(), before)
    nothing = torch.ones(0, 5, device=DEVICE, requires_grad=True)
    scale = torch.rand(5, device=DEVICE, requires_grad=True)
    y = F.drop_path(nothing, 0.5, layer_scale=scale)
    assert torch.equal(torch.autograd.grad(y.sum(), scale)[0], torch.zeros_like(scale))


def test_what_a_layer_scale_keeps():
    """The input, and only where the layer scale has a gradient."""
    x, scale = torch.randn(4, 5, requires_grad=True), torch.rand(5)
    for wanted in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            F.drop_path(x, 0.5, layer_scale=scale.clone().requires_grad_(wanted))
        assert sum(t.nbytes for t in kept) == 16 + 20 + 80 * wanted
