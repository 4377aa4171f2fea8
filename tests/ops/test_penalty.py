"""Penalties over lists: values, gradients of both orders, transforms, compilation, bad input."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from reg_kernels import backends
from reg_kernels import functional as F
from reg_kernels.reference import penalty as reference

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas

INTERPRETED = DEVICE == "cpu"
IMPLEMENTATIONS = implementations()
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
native = pytest.mark.skipif(not isas(), reason="the native library was not built")
PENALTIES = {1: F.l1_penalty, 2: F.l2_penalty}
powers = pytest.mark.parametrize("power", PENALTIES)

SIZES = (0, 1, 3, 7, 8, 31, 32, 33, 63, 64, 65, 511, 512, 513, 8191, 8192, 8193, 16385, 100_003)


pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def too_large(backend, size=2100, limit=2000):
    return backend == "triton" and INTERPRETED and size > limit


def exact(tensors, power):
    """The sum, rounded once."""
    values = [Fraction(v) for x in tensors for v in x.detach().double().flatten().tolist()]
    return float(sum((abs(v) ** power for v in values), Fraction(0)))


def slope(x, power, g=1.0):
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    return ((wide.sgn() if power == 1 else 2 * wide) * g).to(x.dtype)


# Values


@dtypes
@powers
@on_each
@pytest.mark.parametrize("size", SIZES)
def test_each_size_alone(size, power, dtype, backend):
    if too_large(backend, size):
        pytest.skip("too large for Triton's interpreter")
    x = randn(size, dtype=dtype)
    value = PENALTIES[power](x, backend=backend)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = x.double()
    truth = float((wide.abs() if power == 1 else wide.square()).sum())
    unit = 64 * 2**-53 if dtype == torch.float64 else 2**-24
    assert abs(float(value) - truth) <= unit * 1.001 * truth


@dtypes
@powers
@on_each
def test_a_list_is_summed_to_the_last_place(power, dtype, backend):
    tensors = [randn(n, dtype=dtype) for n in (1, 33, 0, 65, 513)]
    value = float(PENALTIES[power](tensors, backend=backend))
    truth = exact(tensors, power)
    assert abs(value - truth) <= (8 * 2**-53 if dtype == torch.float64 else 2**-24) * truth


@powers
@on_each
def test_single_precision_sums_lose_nothing(power, backend):
    # A float32 sum of these would stay at 2^24; half an ulp of the result is the whole error.
    n = 1500 if backend == "triton" and INTERPRETED else 200_000
    tensors = [torch.full((1,), 2.0**12 if power == 2 else 2.0**24, device=DEVICE)]
    tensors.append(torch.full((n,), 0.5, device=DEVICE))
    value = PENALTIES[power](tensors, backend=backend)
    truth = 2.0**24 + n * (0.5 if power == 1 else 0.25)
    assert abs(float(value) - truth) <= 1


@powers
@on_each
def test_half_precision_neither_overflows_nor_vanishes(power, backend):
    big = torch.full((200,), 60000.0, dtype=torch.float16, device=DEVICE)
    small = torch.full((200,), 2.0**-24, dtype=torch.float16, device=DEVICE)
    for x in (big, small):
        value = PENALTIES[power](x, backend=backend)
        torch.testing.assert_close(float(value), 200 * float(x[0]) ** power, rtol=1e-6, atol=0)


@powers
@on_each
def test_mixed_dtypes(power, backend):
    tensors = [randn(n, dtype=d) for d, n in zip(DTYPES, (3, 65, 33, 1), strict=True)]
    value = PENALTIES[power](tensors, backend=backend)
    assert value.dtype == torch.float64
    torch.testing.assert_close(float(value), exact(tensors, power), rtol=1e-14, atol=0)
    value = PENALTIES[power](tensors[1:], backend=backend)
    assert value.dtype == torch.float32
    torch.testing.assert_close(float(value), exact(tensors[1:], power), rtol=1e-7, atol=0)


LAYOUTS = {
    "channels_last": lambda x: x.view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda x: x.view(10, 12).t(),
    "permuted": lambda x: x.view(4, 5, 6).permute(2, 0, 1),
    "strided": lambda x: torch.stack([x, x * 7], -1)[..., 0],
    "strided and transposed": lambda x: (
        torch.stack([x, x * 7], -1)[..., 0].view(10, 12).t()[1:, ::2]
    ),
    "expanded": lambda x: x[:10].view(10, 1).expand(10, 3),
    "misaligned": lambda x: torch.cat([x[:1], x])[1:],
    "negated": lambda x: torch._neg_view(x),
    "scalar": lambda x: x[5],
    "overlapping": lambda x: x.as_strided((20, 5), (3, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@powers
@on_each
def test_layouts(layout, power, backend):
    x = LAYOUTS[layout](randn(120)).detach().requires_grad_()
    value = PENALTIES[power]([randn(3), x], backend=backend)
    torch.manual_seed(0)
    randn(120)
    truth = exact([randn(3), x.detach()], power)
    torch.testing.assert_close(float(value.detach()), truth, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(value, x)
    assert torch.equal(gradient, slope(x.detach(), power))


@powers
@on_each
def test_special_values(power, backend):
    penalty = PENALTIES[power]
    for dtype in DTYPES:
        x = torch.tensor([1.0, -math.inf, 2.0], dtype=dtype, device=DEVICE)
        assert float(penalty(x, backend=backend)) == math.inf
        x[2] = math.nan
        assert math.isnan(float(penalty(x, backend=backend)))
        zero = torch.tensor([0.0, -0.0], dtype=dtype, device=DEVICE)
        value = penalty(zero, backend=backend)
        assert float(value) == 0
        assert not torch.signbit(value)
    large = torch.tensor([1e30], device=DEVICE)
    assert float(F.l2_penalty(large, backend=backend)) == math.inf  # float32, as the result is


@powers
@on_each
def test_what_may_be_given(power, backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(DEVICE)
    expected = reference.penalty(list(model.parameters()), power)
    for params in (
        model.parameters(),
        list(model.parameters()),
        tuple(model.parameters()),
        dict(model.named_parameters()).values(),
        (p for p in model.parameters()),
    ):
        torch.testing.assert_close(PENALTIES[power](params, backend=backend), expected)
    x = randn(4, 5)
    one = PENALTIES[power](x, backend=backend)
    torch.testing.assert_close(one, PENALTIES[power]([x], backend=backend), rtol=0, atol=0)
    twice = PENALTIES[power]([x, x], backend=backend)
    torch.testing.assert_close(twice, 2 * one)


# Gradients


@dtypes
@powers
@on_each
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_gradient(factor, power, dtype, backend):
    sizes = (3, 0, 65) if backend == "triton" and INTERPRETED else (3, 0, 65, 8193, 40_001)
    leaves = [randn(n, dtype=dtype).requires_grad_() for n in sizes]
    leaves[0].data[1] = 0.0
    value = PENALTIES[power](leaves, backend=backend)
    gradients = torch.autograd.grad(factor * value, leaves)
    g = torch.tensor(factor, dtype=value.dtype, device=DEVICE)
    for x, gradient in zip(leaves, gradients, strict=True):
        assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
        expected = slope(x.detach(), power, g)
        if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
            # The interpreter truncates where it should round: one ulp, 2^-8 of the value.
            torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(gradient, expected)
    assert float(gradients[0][1]) == 0


@powers
@on_each
def test_gradients_of_mixed_dtypes_and_of_some(power, backend):
    tensors = [randn(9, dtype=d) for d in (*DTYPES, torch.float32)]
    for i in (0, 1, 3):
        tensors[i].requires_grad_()
    PENALTIES[power](tensors, backend=backend).backward()
    for i, x in enumerate(tensors):
        if i in (0, 1, 3):
            assert torch.equal(x.grad, slope(x.detach(), power))
        else:
            assert x.grad is None


@powers
@on_each
def test_gradient_of_a_tensor_given_twice(power, backend):
    x = randn(9).requires_grad_()
    PENALTIES[power]([x, randn(2), x], backend=backend).backward()
    torch.testing.assert_close(x.grad, 2 * slope(x.detach(), power))


def test_lasso_by_gradient_is_what_it_says():
    x = randn(9).requires_grad_()
    (0.1 * F.l1_penalty([x]) + 0.5 * 0.2 * F.l2_penalty([x])).backward()
    torch.testing.assert_close(x.grad, 0.1 * x.detach().sign() + 0.2 * x.detach())


def test_autocast_leaves_dtypes_alone():
    x = randn(9, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert F.l2_penalty(x).dtype == torch.float32
        assert torch.equal(F.l2_penalty(x), F.l2_penalty(x))


# Registration, compilation, transforms


@pytest.fixture
def counted():
    """torch.compile(fullgraph=True) by inductor, and how many programs that made."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


def test_compiled_loss_with_penalties(counted):
    compiled, counter = counted
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DEVICE, torch.float64)
    model[0].weight.data = model[0].weight.data.t().contiguous().t()

    def loss(x):
        params = list(model.parameters())
        return model(x).square().mean() + 0.1 * F.l1_penalty(params) + F.l2_penalty(params[:1])

    function = compiled(loss)
    for _ in range(3):
        x = randn(5, 3)
        value, expected = function(x), loss(x)
        torch.testing.assert_close(value, expected)
        params = list(model.parameters())
        gradients = torch.autograd.grad(value, params)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, params))
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p -= 0.1 * g
    assert counter.frame_count == 1
    targets = {str(n.target) for n in counter.graphs[0].graph.nodes}
    assert "reg_kernels.penalty.default" in targets or not isas()


def test_compiled_with_sizes_that_change(counted):
    compiled, counter = counted
    function = compiled(lambda x: F.l1_penalty([x, x * 2]))
    for n in (8, 9, 10, 33):
        x = randn(n)
        torch.testing.assert_close(function(x), 3 * x.abs().sum())
    assert counter.frame_count <= 2


def test_functional_call():
    model = nn.Linear(3, 2).to(DEVICE, torch.float64)
    params = {name: p.detach() for name, p in model.named_parameters()}
    g = torch.func.grad(lambda params: F.l2_penalty(params.values()))(params)
    for name, p in params.items():
        torch.testing.assert_close(g[name], 2 * p)


# Bad input


@powers
def test_bad_input(power):
    penalty = PENALTIES[power]
    name = penalty.__name__
    with pytest.raises(
        ValueError, match=f"^{name}: params must hold at least one tensor, got none"
    ):
        penalty([])
    with pytest.raises(ValueError, match=r"^backend must be one of native, triton, reference"):
        penalty(randn(3), backend="cuda")
    with pytest.raises(TypeError, match=f"^{name}: params must be tensors, got float at 1"):
        penalty([randn(3), 1.0])
    for dtype in (torch.int64, torch.bool, torch.complex64):
        got = str(dtype).removeprefix("torch.")
        words = f"^{name}: params must be one of float64, float32, .*, got {got} at 1"
        with pytest.raises(RuntimeError, match=words):
            penalty([randn(3), torch.ones(3, device=DEVICE).to(dtype)])
    with pytest.raises(RuntimeError, match=f"^{name}: params must be dense tensors, got .*sparse"):
        penalty(torch.eye(3, device=DEVICE).to_sparse())


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton runs there")
def test_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        backends.BackendUnavailable, match="l1_penalty: backend 'triton' cannot run"
    ):
        F.l1_penalty(torch.ones(3), backend="triton")


@native
def test_bad_arguments_of_the_parts():
    from reg_kernels._tensor_table import TensorTable

    x = torch.ones(9000)
    table = TensorTable([9000], x.device, (x.dtype,), grad=[x.data_ptr()])
    sums = torch.zeros(1, dtype=torch.float64)
    part = torch.ops.reg_kernels.penalty_table.default
    good = [table.data, 1, table.seal, 1, 1, sums, 0, table.scratch]
    part(*good)
    assert float(sums) == 9000
    for place, bad, message in (
        (0, table.data[:5], "table must be int64 of 15 rows of 1, got int64"),
        (0, table.data.clone(), "table must be a TensorTable of this process"),
        (1, 2**62, "table must be int64 of 15 rows of 4611686018427387904"),
        (2, table.seal + 1, "table must be a TensorTable of this process"),
        (3, 4, "dtype must be the table's, 1, got 4"),
        (3, 0, "dtype must be the table's, 1, got 0"),
        (4, 3, "power must be 1 or 2, got 3"),
        (5, sums.float(), "sums must be contiguous float64"),
        (6, 1, "room for number 1"),
        (6, -1, "room for number -1"),
        (7, table.scratch[:2], "scratch must be contiguous float64 for 2 chunks"),
        (7, table.data.view(torch.float64), "table must be apart in memory from what is written"),
    ):
        with pytest.raises(RuntimeError, match=message):
            part(*good[:place], bad, *good[place + 1 :])
