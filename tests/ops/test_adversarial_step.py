"""Adversarial steps: what they alone have. All else their cases hold them to."""

import math

import numpy as np
import pytest
import torch

from reg_kernels import functional as F
from reg_kernels.ops._registry import OPS

from support import DEVICE, implementations

NORMS = ("linf", "l1", "l2")
on_each = pytest.mark.parametrize("backend", implementations())
each_norm = pytest.mark.parametrize("norm", NORMS)


def batch(*shape, dtype=torch.float32, seed=0):
    """adv, grad, clean: images and what is near them."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=generator)
    adv = clean + 0.1 * torch.randn(shape, generator=generator)
    grad = torch.randn(shape, generator=generator)
    return tuple(x.to(DEVICE, dtype) for x in (adv, grad, clean))


def projected(way, eps, norm):
    """The nearest point of the ball, in float64, of each row; of the L1 ball by bisection."""
    if norm == "linf":
        return np.clip(way, -eps, eps)
    if norm == "l2":
        length = np.linalg.norm(way, axis=1, keepdims=True)
        return way * np.minimum(1.0, eps / np.maximum(length, 1e-300))
    least, most = np.zeros((len(way), 1)), np.abs(way).max(1, keepdims=True)
    for _ in range(200):
        level = (least + most) / 2
        above = np.maximum(np.abs(way) - level, 0).sum(1, keepdims=True) > eps
        least, most = np.where(above, level, least), np.where(above, most, level)
    inside = np.abs(way).sum(1, keepdims=True) <= eps
    return np.where(inside, way, np.sign(way) * np.maximum(np.abs(way) - most, 0))


@each_norm
@on_each
def test_it_is_the_projection(norm, backend):
    adv, grad, clean = batch(4, 3, 6, 7, dtype=torch.float64)
    x, g, origin = (t.cpu().numpy().reshape(4, -1) for t in (adv, grad, clean))
    order = {"linf": np.inf, "l1": 1, "l2": 2}[norm]
    length = 1.0 if norm == "linf" else np.linalg.norm(g, order, 1, keepdims=True)
    step = np.sign(g) if norm == "linf" else g / length
    for eps, step_size in ((0.5, 0.1), (2.0, -0.3), (8.0, 1.0), (100.0, 0.0)):
        y = adv.clone()
        F.adversarial_step_(y, grad, clean, step_size, eps, norm, 0.1, 0.9, backend=backend)
        truth = np.clip(origin + projected(x + step_size * step - origin, eps, norm), 0.1, 0.9)
        np.testing.assert_allclose(y.cpu().numpy().reshape(4, -1), truth, rtol=0, atol=1e-12)


@each_norm
@on_each
def test_a_threshold_that_takes_many_turns(norm, backend):
    """Magnitudes that halve: Newton's method leaves out a few of them at a time."""
    way = 2.0 ** -torch.arange(40, dtype=torch.float64, device=DEVICE).repeat(2, 1)
    clean = torch.zeros_like(way)
    for eps in (1.9, 1.0, 1e-3):
        y = way.clone()
        F.adversarial_step_(y, clean, clean.clone(), 0.0, eps, norm, backend=backend)
        truth = projected(way.cpu().numpy(), eps, norm)
        np.testing.assert_allclose(y.cpu().numpy(), truth, rtol=0, atol=1e-14)


@each_norm
@on_each
def test_what_does_not_move(norm, backend):
    adv, grad, clean = batch(3, 5, 4)
    near = clean + (adv - clean) * 0.01
    for nothing in (torch.zeros_like(grad), torch.full_like(grad, math.nan)):
        y = near.clone()
        F.adversarial_step_(y, nothing, clean, 0.5, 100.0, norm, backend=backend)
        assert torch.equal(y, near)
    y = adv.clone()
    F.adversarial_step_(y, grad, clean, 0.5, 0.0, norm, backend=backend)
    assert torch.equal(y, clean)
    # NaN gradients move none of theirs, and the others as if they were not there.
    grad[0, 0] = math.nan
    grad[0, 1, 0] = math.nan if norm == "linf" else math.inf
    y, z = near.clone(), near.clone()
    F.adversarial_step_(y, grad, clean, 0.5, 100.0, norm, backend=backend)
    F.adversarial_step_(z, grad.nan_to_num(0, 0), clean, 0.5, 100.0, norm, backend=backend)
    assert torch.equal(y, z) and torch.equal(y[0, 0], near[0, 0])


@each_norm
@on_each
def test_nan_stays_where_it_is(norm, backend):
    adv, grad, clean = batch(2, 12)
    adv[0, 3] = clean[1, 4] = math.nan
    for eps in (100.0, 0.2):  # where nothing has to be brought back, and where it has
        y = adv.clone()
        F.adversarial_step_(y, grad, clean, 0.1, eps, norm, 0.0, 1.0, backend=backend)
        assert y.isnan().nonzero().tolist() == [[0, 3], [1, 4]]
    if norm != "linf":
        order = 1 if norm == "l1" else 2
        way = (y - clean).nan_to_num(0)
        assert (torch.linalg.vector_norm(way, order, 1) <= 0.2 + 1e-6).all()


@each_norm
@on_each
def test_a_radius_that_nobody_has_looked_at(norm, backend):
    """As a tensor on a GPU."""
    adv, grad, clean = batch(3, 9)
    step = OPS["adversarial_step_"].overloads[backend]
    radii = torch.tensor([-1.0, math.nan, 0.0], dtype=torch.float64, device=DEVICE)
    step(adv, grad, clean, None, 0.1, radii, 1.0, NORMS.index(norm), -math.inf, math.inf, None)
    torch.testing.assert_close(adv, clean, rtol=0, atol=1e-7)


def test_an_infinite_gradient_has_a_sign():
    _, _, clean = batch(1, 2)
    grad = torch.tensor([[math.inf, -math.inf]], device=DEVICE)
    y = F.adversarial_step_(clean.clone(), grad, clean, 0.1, 1.0)
    torch.testing.assert_close(y, clean + 0.1 * grad.sgn())


@each_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_each
def test_16_bits_do_not_leave_the_ball(norm, dtype, backend):
    adv, grad, clean = batch(2, 400, dtype=dtype)
    clean = (clean - 0.5) * 8  # of both signs, and larger than pixels
    adv = clean.clone()
    adv[:, ::3] = 0.0
    unit = {"linf": 1, "l1": 400, "l2": 20}[norm]
    for eps in (8 / 255 * unit, 1e-3 * unit):
        y = adv.clone()
        F.adversarial_step_(y, grad, clean, 0.7 * eps, eps, norm, backend=backend)
        way = (y.double() - clean.double()).abs()
        found = {"linf": way.amax(1), "l1": way.sum(1), "l2": way.square().sum(1).sqrt()}[norm]
        assert (found <= torch.tensor(eps) * (1 + 1e-6)).all(), found
        if norm == "linf" and eps > 0.01:
            assert (found > 0.5 * eps).all()


@each_norm
def test_each_sample_as_if_alone(norm):
    adv, grad, clean = batch(5, 3, 8)
    steps, radii = torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE).double()
    y = F.adversarial_step_(adv.clone(), grad, clean, steps, radii, norm, 0, 1)
    for n in range(5):
        own = slice(n, n + 1)
        z = adv[own].clone()
        F.adversarial_step_(z, grad[own], clean[own], float(steps[n]), radii[n].item(), norm, 0, 1)
        torch.testing.assert_close(y[own], z, rtol=0, atol=1e-7)
    one = F.adversarial_step_(adv.clone(), grad, clean, steps[:1], radii[0], norm, 0, 1)
    assert torch.equal(one[0], y[0])


def test_pixels_of_a_normalised_input():
    adv, grad, clean = batch(4, 3, 5, 5, dtype=torch.float64)
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.25, 0.5)
    m, s = (torch.tensor(v, dtype=torch.float64, device=DEVICE).view(3, 1, 1) for v in (mean, std))
    for norm, eps in (("linf", 8 / 255), ("l2", 0.5), ("l1", 3.0)):
        # The gradient by pixels v, where the input is (v - mean) / std.
        pixels = F.adversarial_step_(adv.clone(), grad / s, clean, eps / 4, eps, norm, 0, 1)
        y, origin = (adv - m) / s, (clean - m) / s
        F.adversarial_step_(y, grad, origin, eps / 4, eps, norm, 0, 1, mean=mean, std=std)
        torch.testing.assert_close(y * s + m, pixels, rtol=0, atol=1e-12)
        z = (adv - m) / s
        given = {"mean": m.flatten(), "std": s.flatten().float()}
        F.adversarial_step_(z, grad, origin, eps / 4, eps, norm, 0, 1, **given)
        torch.testing.assert_close(z, y, rtol=0, atol=1e-7)


def test_it_writes_where_it_is_told():
    adv, grad, clean = batch(3, 4)
    expected = F.adversarial_step_(adv.clone(), grad, clean, 0.1, 0.2)
    leaf = adv.clone().requires_grad_()
    saved, version = (leaf * leaf).sum(), leaf._version
    assert F.adversarial_step_(leaf, grad, clean, 0.1, 0.2) is leaf
    assert torch.equal(leaf, expected) and leaf._version > version and leaf.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    wide = torch.stack((adv, adv + 9), -1)
    F.adversarial_step_(wide[..., 0], grad, clean, 0.1, 0.2)
    assert torch.equal(wide[..., 0], expected) and torch.equal(wide[..., 1], adv + 9)
    with torch.inference_mode():
        assert torch.equal(F.adversarial_step_(adv.clone(), grad, clean, 0.1, 0.2), expected)
    empty = adv[:0].clone()
    assert F.adversarial_step_(empty, grad[:0], clean[:0], 0.1, 0.2, "l1") is empty


@each_norm
def test_under_compile_and_vmap(norm):
    adv, grad, clean = batch(3, 4, 5)
    torch._dynamo.reset()
    step = torch.compile(F.adversarial_step_, fullgraph=True, backend="aot_eager")
    for eps in (0.1, 0.2, 0.3):
        y = adv.clone()
        assert step(y, grad, clean, 0.05, eps, norm, 0.0, 1.0, mean=0.1, std=0.5) is y
        z = adv.clone()
        F.adversarial_step_(z, grad, clean, 0.05, eps, norm, 0.0, 1.0, mean=0.1, std=0.5)
        torch.testing.assert_close(y, z)
    y = adv.clone()
    each = torch.vmap(lambda *x: F.adversarial_step_(*x, 0.05, 0.1, norm))
    each(y, grad, clean)
    z = adv.clone()
    for n in range(3):
        F.adversarial_step_(z[n], grad[n], clean[n], 0.05, 0.1, norm)
    torch.testing.assert_close(y, z)


WORDS = {"l2": "L2", "l1": 1, "linf": math.inf}


@pytest.mark.parametrize("norm", WORDS)
def test_other_names_of_a_norm(norm):
    adv, grad, clean = batch(2, 3)
    one, two = adv.clone(), adv.clone()
    F.adversarial_step_(one, grad, clean, 0.1, 0.2, norm)
    assert torch.equal(F.adversarial_step_(two, grad, clean, 0.1, 0.2, WORDS[norm]), one)


def refusals():
    x = torch.ones(2, 3)
    ok = {"adv": x, "grad": x + 1, "clean": x * 1, "step_size": 0.1, "eps": 0.2}
    leaf = torch.ones(2, 3, requires_grad=True)
    with torch.inference_mode():
        inference = torch.ones(2, 3)
    for error, message, changes in (
        (TypeError, "adv must be a Tensor, got int", {"adv": 3}),
        (RuntimeError, r"adv must be a batch \(N, ...\), got no dim", {"adv": torch.ones(())}),
        (RuntimeError, "adv must be one of float64, .*, got int64", {"adv": x.long()}),
        (RuntimeError, "grad must be like the input", {"grad": x.double()}),
        (RuntimeError, "clean must be like the input", {"clean": torch.ones(2, 1)}),
        (RuntimeError, "clean must be apart in memory", {"clean": x}),
        (RuntimeError, "adv must be a leaf, or without a gradient", {"adv": leaf * 1}),
        (RuntimeError, "an inference tensor cannot be changed", {"adv": inference}),
        (ValueError, "step_size must be finite, got inf", {"step_size": math.inf}),
        (TypeError, "step_size must be a number or a Tensor, got str", {"step_size": "a"}),
        (ValueError, "eps must be at least 0, got -1", {"eps": -1}),
        (ValueError, "eps must be at least 0, got nan", {"eps": math.nan}),
        (ValueError, "eps must be at least 0, got -1", {"eps": torch.tensor([1.0, -1.0])}),
        (ValueError, "eps must be one number, or one for each of the 2", {"eps": torch.ones(3)}),
        (TypeError, "eps must be of a floating-point type", {"eps": torch.ones(2).long()}),
        (ValueError, "norm must be 'linf', 'l1' or 'l2', got 'l3'", {"norm": "l3"}),
        (ValueError, "lower must be at most upper, got 1.0 and 0", {"lower": 1, "upper": 0.0}),
        (ValueError, "lower must be below inf, got inf", {"lower": math.inf, "upper": math.inf}),
        (ValueError, "upper must be above -inf, got -inf", {"upper": -math.inf}),
        (RuntimeError, "grad must be a dense tensor, got sparse_coo", {"grad": x.to_sparse()}),
        (ValueError, "std must be above 0", {"std": (1.0, 0.0, 1.0)}),
        (ValueError, "mean must be one number for each of the 3", {"mean": (1.0, 0.0)}),
    ):
        yield pytest.param(error, message, ok | changes, id=message[:40])


@pytest.mark.parametrize(("error", "message", "arguments"), [*refusals()])
def test_refusals_change_nothing(error, message, arguments):
    adv = arguments["adv"]
    before = adv.clone() if isinstance(adv, torch.Tensor) else adv
    with pytest.raises(error, match=f"adversarial_step_: {message}"):
        F.adversarial_step_(**arguments)
    assert not isinstance(adv, torch.Tensor) or torch.equal(adv, before)
