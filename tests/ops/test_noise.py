"""Noise: its distribution, images of bytes, layers, and what is refused."""

import copy
import math

import pytest
import torch
from torch.nn.utils import parametrize

from reg_kernels import functional as F
from reg_kernels import nn, optim
from reg_kernels.reference._philox import normals, tag

from support import DEVICE, implementations, rng_state

on_each = pytest.mark.parametrize("backend", implementations())
NOISES = {
    "gaussian": lambda x, **options: F.gaussian_noise(x, 20.0, **options),
    "uniform": lambda x, **options: F.uniform_noise(x, 20.0, **options),
    "salt_and_pepper": lambda x, **options: F.salt_and_pepper(x, 0.3, **options),
}


def drawn(count, part=0):
    """Normal numbers from a place of their own for each part."""
    zeros = torch.zeros(count, device=DEVICE)
    return F.gaussian_noise(zeros, 1.0, rng_state=rng_state(), element_offset=part * count).double()


def normal_tail(x):
    """The share of a normal distribution further out than x, on either side."""
    return math.erfc(x / math.sqrt(2))


# The distribution


def test_moments_and_tails_of_a_hundred_million_draws():
    part, parts = 2**22, 24
    count = part * parts
    sums = torch.zeros(6, dtype=torch.float64, device=DEVICE)
    tails = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    bounds = torch.arange(1.0, 6.0, device=DEVICE)
    for number in range(parts):
        z = drawn(part, number)
        power = torch.ones_like(z)
        for k in range(6):
            power *= z
            sums[k] += power.sum()
        z.abs_()
        tails += torch.stack([(z > bound).sum() for bound in bounds])
    # Each moment, and the variance of that power, which says how far off its mean may be.
    moments = [(0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)]
    for k, (moment, variance) in enumerate(moments):
        assert abs(sums[k].item() / count - moment) < 4 * math.sqrt(variance / count), k + 1
    for bound, beyond in zip(bounds.tolist(), tails.tolist(), strict=True):
        expected = count * normal_tail(bound)
        assert abs(beyond - expected) < 4 * math.sqrt(expected), bound


def test_the_distribution_function():
    count = 2**22
    ordered = drawn(count).sort().values
    places = torch.arange(1, count + 1, dtype=torch.float64, device=DEVICE) / count
    # Kolmogorov and Smirnov's statistic passes 1.95 / sqrt(n) once in a thousand times.
    distance = (torch.special.ndtr(ordered) - places).abs().max()
    assert distance < 1.95 / math.sqrt(count)


def test_draws_are_independent():
    count = 2**20
    z = drawn(count)
    bound = 4 / math.sqrt(count)
    for lag in (1, 2, 3, 4, 5, 8, 64, 256, 512, 4096):
        a, b = z[:-lag], z[lag:]
        # Values, sizes and signs: a pair's radius and angle are told by none of them.
        for f in (torch.Tensor.clone, torch.abs, torch.sign):
            x, y = f(a), f(b)
            correlation = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
            assert abs(correlation) < bound, (lag, f)
    assert abs((z * drawn(count, part=3)).mean()) < bound


def test_the_ends_of_a_pair():
    # The steps in float64, at words whose radius is the smallest, the largest and, of 0, beyond it.
    words = torch.tensor([1, 5, 0xFFFFFFFF, 7, 0x80000001, 2**31, 2**31, 0, 3, 0x7FFFFFFF, 0, 9])
    from reg_kernels.reference._philox import _normal_pair

    first, second = _normal_pair(words[::2], words[1::2])
    k, angle = (torch.where(w >= 2**31, w - 2**32, w).double() for w in (words[::2], words[1::2]))
    r = (-2 * (k.abs() / 2**31).log()).sqrt()
    r[-1] = 6.857
    turn = angle / 2**32 * math.pi
    truth = r * turn.cos() * torch.where(k < 0, -1, 1), r * turn.sin()
    # A float has the radius' integer of 31 bits rounded: the smallest radius, 3e-5, is 0.
    torch.testing.assert_close(first[:-1].double(), truth[0][:-1], rtol=1e-6, atol=4e-5)
    torch.testing.assert_close(second[:-1].double(), truth[1][:-1], rtol=1e-6, atol=4e-5)
    torch.testing.assert_close(first[-1].double(), truth[0][-1], rtol=1e-3, atol=0)
    assert 6.5 < torch.stack([first, second])[:, :-1].abs().max() < 6.6


def test_uniform_noise_and_impulses():
    count = 10**6
    x = torch.zeros(count, device=DEVICE)
    u = F.uniform_noise(x, 2.0, rng_state=rng_state()).double()
    assert u.abs().max() <= 2.0
    assert abs(u.mean()) < 4 * 2 / math.sqrt(3 * count)
    assert abs(u.square().mean() - 4 / 3) < 4 * 4 * math.sqrt(4 / 45 / count)
    y = F.salt_and_pepper(x + 0.5, 0.1, salt_vs_pepper=0.25, rng_state=rng_state())
    for value, share in ((1.0, 0.025), (0.0, 0.075)):
        found = (y == value).double().mean().item()
        assert abs(found - share) < 4 * math.sqrt(share / count) + 2**-16


@on_each
def test_the_ends_of_impulses(backend):
    x = torch.full((1000,), math.nan, device=DEVICE)
    y = F.salt_and_pepper(x, 1.0, salt_vs_pepper=1.0, backend=backend)
    assert (y == 1).all()
    assert (F.salt_and_pepper(x, 1.0, salt_vs_pepper=0.0, low=-2, backend=backend) == -2).all()
    assert F.salt_and_pepper(x, 0.0) is x


# Images of bytes


@pytest.mark.parametrize("name", NOISES)
@on_each
def test_bytes_are_rounded_and_saturate(name, backend):
    noise = NOISES[name]
    x = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(8)
    options = {"rng_state": rng_state(), "backend": backend}
    y = noise(x, **options)
    high = {"high": 255.0} if name == "salt_and_pepper" else {}
    values = noise(x.float(), **options, **high)
    assert y.dtype == torch.uint8
    assert torch.equal(y, values.round().clamp(0, 255).to(torch.uint8))
    assert y.max() == 255
    assert y.min() == 0
    over = x.clone()
    assert noise(over, inplace=True, **options) is over
    assert torch.equal(over, y)
    # In storage order, or as any other layout.
    assert torch.equal(noise(x.view(64, 32).t(), **options).t().flatten(), y)
    assert torch.equal(noise(torch.stack((x, x), 1)[:, 0], **options), y)
    assert torch.equal(noise(x[5:], element_offset=5, **options), y[5:])


@on_each
def test_bytes_at_the_edges(backend):
    """Ties go to the even byte, what is no number is 0, and no noise on a byte is none."""
    zeros = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    values = {-0.5: 0, 0.5: 0, 1.5: 2, 2.5: 2, 254.5: 254, 255.5: 255, math.inf: 255, -math.inf: 0}
    for value, expected in values.items():
        y = F.salt_and_pepper(zeros, 1.0, low=value, high=value, backend=backend)
        assert (y == expected).all(), value
    wide = {"std": 3e38, "multiplicative": True, "backend": backend}
    assert F.gaussian_noise(zeros, **wide).eq(0).all()  # where it overflows, 0 times infinity
    y = F.gaussian_noise(zeros + 1, **wide)
    assert set(y.tolist()) == {0, 255}
    assert F.gaussian_noise(zeros[:0], 1.0, backend=backend).dtype == torch.uint8


@pytest.mark.parametrize("name", NOISES)
def test_bytes_under_compile_vmap_and_threads(name):
    noise, x = NOISES[name], torch.arange(256, dtype=torch.uint8).repeat(300)
    y = noise(x, rng_state=rng_state())
    with torch.no_grad():
        compiled = torch.compile(noise, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, rng_state=rng_state()), y)
    mapped = torch.vmap(lambda x: noise(x, rng_state=rng_state()))(x.view(3, -1))
    assert torch.equal(mapped[0], y[: mapped.shape[1]])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(noise(x, rng_state=rng_state()), y)
    finally:
        torch.set_num_threads(threads)


# What is asked for


@pytest.mark.parametrize("name", NOISES)
def test_without_training_or_noise_it_is_the_input(name):
    x = torch.ones(5)
    before = torch.get_rng_state()
    assert NOISES[name](x, training=False) is x
    assert F.gaussian_noise(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(NOISES[name](torch.ones(500)), torch.ones(500))


def test_the_gradient_of_added_noise_is_the_outputs():
    x = torch.randn(100, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.gaussian_noise(x, 0.3).sum(), x)
    assert (gradient == 1).all()
    y = F.gaussian_noise(x, 0.3, multiplicative=True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (y / x).detach())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: F.gaussian_noise(x, -1.0), ValueError, "std must be finite and at least 0"),
        (lambda x: F.gaussian_noise(x, math.nan), ValueError, "std must be finite"),
        (lambda x: F.gaussian_noise(x, math.inf), ValueError, "std must be finite"),
        (lambda x: F.gaussian_noise(x, "1"), TypeError, "std must be a number, got str"),
        (lambda x: F.gaussian_noise(x.int(), 1.0), RuntimeError, "bfloat16 or uint8, got int32"),
        (lambda x: F.gaussian_noise([1.0], 1.0), TypeError, "input must be a Tensor, got list"),
        (
            lambda x: F.gaussian_noise(x, 1.0, multiplicative=1),
            TypeError,
            "multiplicative must be True or False",
        ),
        (lambda x: F.uniform_noise(x, -1.0), ValueError, "amplitude must be finite"),
        (lambda x: F.salt_and_pepper(x, 1.5), ValueError, r"p must be in \[0, 1\]"),
        (
            lambda x: F.salt_and_pepper(x, 0.5, salt_vs_pepper=-0.1),
            ValueError,
            "salt_vs_pepper must be in",
        ),
        (lambda x: F.salt_and_pepper(x, 0.5, high=math.nan), ValueError, "high must be a number"),
        (lambda x: nn.GaussianDropout(1.0), ValueError, r"GaussianDropout: p must be in \[0, 1\)"),
        (lambda x: nn.GaussianDropout(-0.1), ValueError, r"GaussianDropout: p must be in \[0, 1\)"),
        (lambda x: nn.weight_noise(3, 0.1), TypeError, "module must be an nn.Module, got int"),
        (
            lambda x: nn.weight_noise(nn.weight_noise(torch.nn.PReLU(), 0.1), 0.1),
            ValueError,
            "weight_noise: name must be one without a parametrization",
        ),
        (lambda x: nn.GaussianNoise(-0.1), ValueError, "GaussianNoise: std must be finite"),
        (lambda x: nn.NoisyLinear(3, 2, std_init=-1.0), ValueError, "std_init must be finite"),
        (lambda x: nn.WeightNoise(0.1, "yes"), TypeError, "relative must be True or False"),
        (
            lambda x: nn.weight_noise(torch.nn.Identity(), 0.1, "weights"),
            ValueError,
            "weight_noise: name must be that of a parameter of Identity, got 'weights'",
        ),
    ],
)
def test_refusals(call, kind, message):
    before = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        call(torch.ones(4))
    assert torch.equal(torch.get_rng_state(), before)


# Layers


def test_layers():
    x = torch.randn(200_000)
    noise = nn.GaussianNoise(0.5)
    assert abs((noise(x) - x).std() - 0.5) < 0.01
    assert noise.eval()(x) is x
    dropout = nn.GaussianDropout(0.2)
    assert abs((dropout(x) / x - 1).std() - 0.5) < 0.01
    assert str(noise) == "GaussianNoise(std=0.5, multiplicative=False, inplace=False)"
    assert str(dropout) == "GaussianDropout(p=0.2, inplace=False)"
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(noise, dropout)).graph
    assert sum(node.op == "call_module" for node in graph.nodes) == 2


@pytest.mark.parametrize("relative", [False, True])
def test_weight_noise_leaves_the_weight_clean(relative):
    layer = torch.nn.Linear(8, 4)
    clean = copy.deepcopy(layer)
    assert nn.weight_noise(layer, 0.1, relative=relative) is layer
    x = torch.randn(3, 8)
    assert not torch.equal(layer(x), clean(x))
    assert not torch.equal(layer(x), layer(x))  # each call draws
    assert torch.equal(copy.deepcopy(layer).eval()(x), clean(x))
    # The gradient goes straight to the clean weight, which weight decay sees.
    layer(x).sum().backward()
    clean(x).sum().backward()
    parameter = layer.parametrizations.weight.original
    assert torch.equal(parameter.grad, clean.weight.grad)
    for module in (layer, clean):
        optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1).step()
    assert torch.equal(parameter, clean.weight)
    # Saved with the noise, loaded without it, and the other way round.
    assert set(layer.state_dict()) == {"weight", "bias"}
    other = torch.nn.Linear(8, 4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, parameter)
    torch.nn.init.zeros_(other.weight)
    torch.nn.Sequential(layer).load_state_dict(torch.nn.Sequential(other).state_dict())
    assert (layer.parametrizations.weight.original == 0).all()
    parametrize.remove_parametrizations(layer.eval(), "weight")
    assert torch.equal(layer.weight, other.weight)
    layer.load_state_dict(clean.state_dict())


def test_a_copy_of_a_layer_with_weight_noise_has_its_own():
    layer = nn.weight_noise(torch.nn.Linear(8, 4), 0.1)
    clean, other = copy.deepcopy(layer), copy.deepcopy(layer)
    x = torch.randn(3, 8)
    assert not torch.equal(other(x), other(x))
    other(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is None
    # Where the noise is taken off one of them, the others' keys stay as they are.
    parametrize.remove_parametrizations(clean.eval(), "weight")
    with torch.no_grad():
        clean.weight.zero_()
    layer.load_state_dict(clean.state_dict())
    assert (layer.parametrizations.weight.original == 0).all()
    clean.load_state_dict(other.state_dict())
    assert torch.equal(clean.weight, other.parametrizations.weight.original)


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_weight_noise_of_a_recurrent_layer(kind):
    layer = kind(3, 4)
    clean = copy.deepcopy(layer)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        nn.weight_noise(layer, 0.1, name)
    x = torch.randn(5, 2, 3)
    y = layer(x)[0]
    assert not torch.equal(layer(x)[0], y) and not torch.equal(clean(x)[0], y)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    draws = []
    layer.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *_: draws.append(1))
    with parametrize.cached():
        layer(x)
    assert draws == [1]
    assert torch.equal(layer.eval()(x)[0], clean(x)[0])
    copy.deepcopy(layer).load_state_dict(clean.state_dict())


def test_noisy_linear_under_autocast():
    layer = nn.NoisyLinear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16


def test_weight_noise_by_parametrize_and_in_a_compiled_program():
    layer = torch.nn.Linear(8, 4)
    parametrize.register_parametrization(layer, "weight", nn.WeightNoise(0.1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None
    layer.eval()
    assert torch.equal(compiled(x), compiled(x))


def test_noisy_linear_is_the_one_with_a_matrix_of_noise():
    layer, x = nn.NoisyLinear(5, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    matrix = torch.outer(layer.noise_out, layer.noise_in)
    weight = layer.weight_mu + layer.weight_sigma * matrix
    bias = layer.bias_mu + layer.bias_sigma * layer.noise_out
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias))
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))
    before = layer(x)
    assert torch.equal(layer(x), before)
    layer.reset_noise()
    assert not torch.equal(layer(x), before)
    layer.eval()
    expected = torch.nn.functional.linear(x, layer.weight_mu, layer.bias_mu)
    assert torch.equal(layer(x), expected)
    saved = layer.state_dict()
    assert set(saved) == {"weight_mu", "weight_sigma", "bias_mu", "bias_sigma"}
    saved |= {"weight_epsilon": matrix, "bias_epsilon": layer.noise_out}
    nn.NoisyLinear(5, 3).load_state_dict(saved)
    assert nn.NoisyLinear(5, 3, bias=False)(torch.ones(5)).shape == (3,)
    assert layer.weight_sigma[0, 0].item() == pytest.approx(0.1 / math.sqrt(5))
    assert "std_init=0.1" in str(layer)


def test_normal_numbers_of_a_part_are_part_of_the_whole():
    whole = normals(rng_state(), tag("gaussian"), 0, 100)
    for first in (0, 1, 3, 4, 5, 50):
        assert torch.equal(normals(rng_state(), tag("gaussian"), first, 30), whole[first:][:30])
