"""BatchNorm's arithmetic: ill-conditioned channels, long ones, special values, and the same bits.

The truth is computed by numpy in long double, of the very inputs, by the two-pass formulas.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reg_kernels import functional as F

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas, rng_state

INTERPRETED = DEVICE == "cpu"
IMPLEMENTATIONS = implementations()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
KERNELS = IMPLEMENTATIONS[:2]  # native and triton
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
native = pytest.mark.skipif(not isas(), reason="the native library was not built")

EPS = 1e-5
C = 3
# (N, L) and whether channels come last: one for each way that the CPU cuts a tensor, several units
# of each; and what Triton's interpreter has the time for.
CUTS = {
    "planes": (2, 3001, False),
    "short planes": (240, 49, False),
    "channels last": (3, 2001, True),
    "one value a sample": (6001, 1, False),
}
SMALL_CUTS = {"planes": (2, 260, False), "channels last": (5, 13, True)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def all_threads(one_thread):
    torch.set_num_threads(os.cpu_count() or 1)


def cuts(backend):
    return SMALL_CUTS if backend == "triton" and INTERPRETED else CUTS


def arranged(values, channels_last, dtype):
    """[N, C, L] as a tensor of this layout and dtype; (N, C) where L is 1."""
    x = torch.as_tensor(values, dtype=torch.float64).to(dtype).to(DEVICE)
    if x.shape[2] == 1:
        return x.squeeze(2).contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def parameter_dtype(dtype):
    """As autocast leaves them: beside 16-bit inputs float32."""
    return torch.promote_types(dtype, torch.float32)


def exact(x, weight, bias, g):
    """What `results` returns, in long double."""
    x, weight, bias, g = (
        t.double().cpu().numpy().astype(np.longdouble) for t in (x, weight, bias, g)
    )
    axes = tuple(d for d in range(x.ndim) if d != 1)
    m = x.size // x.shape[1]

    def wide(values):
        return values.reshape(1, -1, *[1] * (x.ndim - 2))

    mean = x.mean(axes)
    m2 = ((x - wide(mean)) ** 2).sum(axes)
    invstd = 1 / np.sqrt(m2 / m + np.longdouble(EPS))
    normalised = (x - wide(mean)) * wide(invstd)
    d_bias, d_weight = g.sum(axes), (g * normalised).sum(axes)
    d_x = wide(weight * invstd) * (g - wide(d_bias / m) - normalised * wide(d_weight / m))
    return {
        "output": normalised * wide(weight) + wide(bias),
        "running_mean": mean,
        "running_var": m2 / (m - 1),
        "grad_input": d_x,
        "grad_weight": d_weight,
        "grad_bias": d_bias,
    }


def results(function, x, weight, bias, g, **options):
    """Output, statistics of a momentum of 1, gradients."""
    mean, var = (torch.zeros_like(weight) for _ in range(2))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(leaves[0], mean, var, *leaves[1:], True, 1.0, EPS, **options)
    gradients = torch.autograd.grad(y, leaves, g)
    names = ("output", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")
    return dict(zip(names, (y.detach(), mean, var, *gradients), strict=True))


def distance(value, truth):
    """The largest difference, and the largest true value; past the dtype's numbers Inf is right."""
    fits = np.abs(truth) <= torch.finfo(value.dtype).max
    value = value.double().cpu().numpy().astype(np.longdouble)
    if not np.isinf(value[~fits]).all():
        return float("inf"), float("inf")
    error = np.abs(value - truth)[fits].max(initial=0)
    return float(error), float(np.abs(truth[fits]).max(initial=0))


# Ill-conditioned channels


def _drawn(n, length):
    return np.random.default_rng(n + length).standard_normal((n, C, length))


def _by_channel(x):
    """[N, C, L] as [C, M], which can be written to, and as a view of its own again."""
    flat = np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(C, -1)
    return flat, flat.reshape(C, x.shape[0], x.shape[2]).transpose(1, 0, 2)


def _outlier(place, value):
    def values(n, length):
        flat, x = _by_channel(_drawn(n, length))
        at = {"first": 0, "middle": n * length // 2, "last": -1}[place]
        flat[0, at], flat[1, at] = value, -value  # and a channel without
        return x

    return values


def _first(value, mean, deviation):
    """Values that are like no other in the channel stand where it begins."""

    def values(n, length):
        flat, x = _by_channel(mean + deviation * _drawn(n, length))
        flat[:, :3] = value
        return x

    return values


def _constant(n, length):
    return np.tile(np.array([0.1, -3.0, 12345.678])[None, :, None], (n, 1, length))


def _ramp(n, length):
    """Parts of the channel whose means differ."""
    return np.tile(np.linspace(1e4, 1e4 + 1, n * length).reshape(n, 1, length), (1, C, 1))


ILL = {
    "plain": _drawn,
    "mean 1e4, deviation 1e-2": lambda n, length: 1e4 + 1e-2 * _drawn(n, length),
    "mean 100": lambda n, length: 100 + _drawn(n, length),
    **{
        f"{place} value {value:.0e}": _outlier(place, value)
        for place in ("first", "middle", "last")
        for value in (6e4, 1e6, 1e20)
    },
    "constant": _constant,
    "subnormal float16": lambda n, length: 1e-7 * _drawn(n, length),
    "subnormal float32": lambda n, length: 1e-40 * _drawn(n, length),
    "subnormal float64": lambda n, length: 1e-310 * _drawn(n, length),
    "deviation 1e18": lambda n, length: 1e18 * _drawn(n, length),
    "deviation 1e30": lambda n, length: 1e30 * _drawn(n, length),
    "zeros first": _first(0, 1e4, 1e-2),
    "huge values first": _first(1e20, 0, 1),
    "ramp": _ramp,
}
PAST_FLOAT32 = ("1e+20", "1e30", "huge")  # whose squares are


@pytest.mark.parametrize("values", ILL)
@dtypes
@on_each
def test_ill_conditioned_channels(values, dtype, backend):
    if backend == "triton" and dtype != torch.float64:
        if any(word in values for word in PAST_FLOAT32):
            pytest.skip("sums squares in float32, as torch does on a GPU")
        if INTERPRETED and dtype == torch.bfloat16 and "subnormal" in values:
            pytest.skip("the interpreter has no subnormal bfloat16")
    weight, bias = (
        torch.tensor(v, dtype=parameter_dtype(dtype), device=DEVICE)
        for v in ([1.5, -0.7, 1.0], [0.3, 0.0, -1.0])
    )
    for cut, (n, length, last) in cuts(backend).items():
        x = arranged(ILL[values](n, length), last, dtype)
        if not x.isfinite().all():
            pytest.skip(f"no values of {dtype}")
        g = arranged(_drawn(n, length)[::-1] + 0.1, last, dtype)
        truth = exact(x, weight, bias, g)
        ours = results(F.batch_norm, x, weight, bias, g, backend=backend)
        theirs = results(TF.batch_norm, x, weight, bias, g)
        deviation = float(np.sqrt(truth["running_var"].max()))
        # What roundings of a float64 mean make of deviations that are small beside it: a sum of
        # gradients times that of the mean for the weight's.
        shift = 4 * 2**-52 * np.abs(truth["running_mean"]) / np.sqrt(truth["running_var"] + EPS)
        shifts = {
            "output": float(shift.max()) * 2,
            # Parts are merged by their means, each of which is rounded so.
            "running_var": float((shift * truth["running_var"]).max()),
            "grad_input": float(shift.max() * np.abs(truth["grad_input"]).max()),
            "grad_weight": float((shift * np.abs(truth["grad_bias"])).max()),
        }
        for name, true in truth.items():
            own = torch.finfo(ours[name].dtype)
            error, scale = distance(ours[name], true)
            baseline, _ = distance(theirs[name], true)
            if name == "running_mean":
                scale += deviation  # a mean can be known to no less
            # As `reg-kernels check` has it: half an ulp, in float64 256. Triton sums in float32.
            ulps = 256 if dtype == torch.float64 else 8 if backend == "triton" else 0.5
            floor = own.smallest_normal * own.eps + x.numel() * 5e-324 / EPS
            floor += shifts.get(name, 0.0)
            allowed = 2 * baseline + ulps * own.eps * scale + floor
            assert error <= allowed, f"{name}, {cut}: {error:.2e}, PyTorch's {baseline:.2e}"
            # Where PyTorch loses digits these do not: all but grad_input, which may cancel.
            if backend != "triton" and dtype != torch.float64 and name != "grad_input":
                assert error <= (own.eps / 2 + 2**-21) * scale + floor, f"{name}, {cut}"


@native
@pytest.mark.parametrize("mean", [0.0, 1e4, -1e8, 1e12])
@pytest.mark.parametrize("cut", CUTS)
def test_a_large_mean_costs_the_float64_variance_no_digits(cut, mean):
    n, length, last = CUTS[cut]
    x = arranged(mean + _drawn(n, length), last, torch.float64)
    running_mean, running_var = (torch.zeros(C, dtype=torch.float64) for _ in range(2))
    F.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, backend="native")
    # Less that mean, which is exact: a sum of such values in long double loses its last digits.
    flat = (x - mean).movedim(1, 0).reshape(C, -1).numpy().astype(np.longdouble)
    error = np.abs(running_mean.numpy() - mean - flat.mean(1))
    assert error.max() <= 4 * 2**-53 * (abs(mean) + 1)
    assert np.abs(running_var.numpy() / flat.var(1, ddof=1) - 1).max() <= 16 * 2**-52


@pytest.mark.parametrize("backend", KERNELS)
@dtypes
def test_a_constant_channel_is_the_bias(backend, dtype):
    for n, length, last in cuts(backend).values():
        x = arranged(_constant(n, length), last, dtype)
        weight, bias = (torch.randn(C, device=DEVICE).to(parameter_dtype(dtype)) for _ in range(2))
        found = results(F.batch_norm, x, weight, bias, torch.ones_like(x), backend=backend)
        first = (0, slice(None), *[0] * (x.dim() - 2))
        wide = [1, C] + [1] * (x.dim() - 2)
        output = bias.to(dtype).view(wide).expand(x.shape)
        # Triton's interpreter truncates bfloat16.
        truncated = backend == "triton" and INTERPRETED and dtype == torch.bfloat16
        torch.testing.assert_close(found["output"], output, rtol=2**-7 * truncated, atol=0)
        assert torch.equal(found["running_mean"].to(dtype), x[first])
        for name in ("running_var", "grad_weight"):
            assert (found[name] == 0).all()
        assert (found["grad_bias"] == x.numel() // C).all()
        # d - mean(d), each of them times weight / sqrt(eps)
        assert found["grad_input"].abs().max() <= torch.finfo(weight.dtype).eps * 1000


# NaN and Inf

SPECIAL = {
    "NaN": [np.nan],
    "Inf": [np.inf],
    "-Inf": [-np.inf],
    "Inf, -Inf": [np.inf, -np.inf],
    "Inf, Inf": [np.inf, np.inf],
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("place", ["first", "last", "spread"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@on_each
def test_nan_and_inf_stay_in_their_channel(special, place, dtype, backend):
    values = SPECIAL[special]
    weight, bias = (torch.ones(C, dtype=parameter_dtype(dtype), device=DEVICE) for _ in range(2))
    for cut, (n, length, last) in cuts(backend).items():
        flat, x = _by_channel(_drawn(n, length))
        clean = arranged(x.copy(), last, dtype)
        where = {
            "first": np.arange(len(values)),
            "last": -1 - np.arange(len(values)),
            "spread": np.linspace(n * length // 3, n * length - 2, len(values)).astype(int),
        }[place]
        flat[1, where] = values
        spoilt, g = arranged(x, last, dtype), arranged(_drawn(n, length)[::-1] + 0.1, last, dtype)
        ours = results(F.batch_norm, spoilt, weight, bias, g, backend=backend)
        theirs = results(TF.batch_norm, spoilt, weight, bias, g)
        without = results(F.batch_norm, clean, weight, bias, g, backend=backend)
        for name, found in ours.items():
            what = f"{name}, {cut}"
            channel = [slice(None)] * min(1, found.dim() - 1)
            others, mine = (*channel, [0, 2]), (*channel, 1)
            assert torch.equal(found[others], without[name][others]), what
            if name != "grad_bias":  # in which there is no input
                assert not found[mine].isfinite().all(), what
            assert torch.equal(found[mine].isnan(), theirs[name][mine].isnan()), what
        assert torch.equal(ours["running_mean"].isinf(), theirs["running_mean"].isinf())
        if "NaN" not in special and len(set(values)) == 1:
            assert ours["running_mean"][1] == values[0], cut


@on_each
def test_a_fused_chain_keeps_nan_as_torch_does(backend):
    n, length, last = cuts(backend)["channels last"]
    flat, x = _by_channel(_drawn(n, length))
    flat[1, 5] = np.nan
    r = _drawn(n, length) * 1.0
    r[0, 2, 1], r[1, 2, 2], r[2, 2, 3] = np.nan, np.inf, -np.inf
    x, r = (arranged(t, last, torch.float64) for t in (x, r))
    z = TF.batch_norm(x, None, None, training=True) + r
    mask = F.dropout(torch.ones_like(x), 0.3, rng_state=rng_state())
    for activation, function in (("relu", TF.relu), ("silu", TF.silu), (None, lambda z: z)):
        y = F.batch_norm_act(
            *(x, None, None, None, None, r, True),
            activation=activation,
            drop=0.3,
            rng_state=rng_state(),
            backend=backend,
        )
        torch.testing.assert_close(y, function(z) * mask, equal_nan=True)


# Long channels


def available_memory():
    """Bytes that can be had without swapping, or None where the system does not say. A container
    may have less than the machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(v.split()[1]) * 1024 for v in lines if v.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            found.append(int((group / most).read_text()) - int((group / used).read_text()))
    return min(found, default=None)


@native
def test_a_channel_of_more_than_2_to_the_31_values(all_threads):
    if (available_memory() or 0) < 12e9:
        pytest.skip("needs 12 GB of free memory")
    tail = 8
    m = 2**31 + tail
    x = torch.empty(m, dtype=torch.bfloat16)
    x[: 2**30], x[2**30 : 2**31], x[2**31 :] = -1.0, 1.0, 2.0**20
    mean = tail * 2.0**20 / m
    m2 = 2.0**31 + tail * 2.0**40 - m * mean**2
    invstd = (m2 / m + EPS) ** -0.5
    ones = torch.ones(1)
    for shape in ((1, 1, m), (m, 1)):  # in planes and in rows
        tracked_mean, tracked_var, counter = torch.zeros(1), torch.ones(1), torch.tensor(0)
        y, *found, _ = torch.ops.reg_kernels.batch_norm(
            *(x.view(shape), None, None, None, [tracked_mean, tracked_var, counter], 1.0, EPS),
            *(0, 0.0, 0.0, None, 0, False, None, None),
        )
        assert found[0].item() == pytest.approx(mean, rel=1e-12)
        assert found[1].item() == pytest.approx(invstd, rel=1e-12)
        assert tracked_mean.item() == pytest.approx(mean, rel=2**-23)
        assert tracked_var.item() == pytest.approx(m2 / (m - 1), rel=2**-23)
        y = y.view(-1)
        for begin, end, value in ((0, 2**30, -1), (2**30, 2**31, 1), (2**31, m, 2**20)):
            expected = torch.tensor((value - mean) * invstd).bfloat16()
            for at in (begin, (begin + end) // 2, end - 1):
                assert y[at] == expected
        del y

        # The input as the gradient: that of the weight is sum x xhat = m2 invstd.
        wants_input = len(shape) == 3  # once: most of the time goes into new pages
        gradient, of_weight, of_bias, _ = torch.ops.reg_kernels.batch_norm_backward(
            *(x.view(shape), x.view(shape), ones, ones, None, *found, None, None, 0, True),
            *(0, 0.0, 0.0, wants_input, True, False, None),
        )
        assert of_bias.item() == pytest.approx(tail * 2.0**20, rel=2**-23)
        assert of_weight.item() == pytest.approx(m2 * invstd, rel=2**-22)
        if wants_input:
            # (x - mean) (1 - var / (var + eps)): what is left of 1 - 1 in float32
            gradient = gradient.view(-1)
            for at, value in ((0, -1), (2**31 - 1, 1), (m - 1, 2**20)):
                expected = invstd * (value - mean) * EPS / (m2 / m + EPS)
                error = abs(gradient[at].item() - expected)
                assert error <= 2**-22 * abs(value - mean) * invstd


def test_the_unbiased_variance_of_few_and_of_many():
    for m in (2, 3, 10, 65_536, 65_537, 1_000_000):
        x = (
            torch.arange(2 * m, dtype=torch.float64, device=DEVICE)
            .remainder(2)
            .view(m, 2)
            .cumsum(1)
        )
        x[: m // 2] += 1  # two values a channel, in halves
        mean, var = (torch.zeros(2, dtype=torch.float64, device=DEVICE) for _ in range(2))
        F.batch_norm(x, mean, var, training=True, momentum=1.0)
        share = (m // 2) / m
        expected = share * (1 - share) * m / (m - 1)
        torch.testing.assert_close(var, torch.full_like(var, expected), rtol=1e-14, atol=0)


# Gates, across the edges of what the CPU works on at a time

# N, C, L, channels last: planes that units and gates of 16384 elements cut, strips of columns,
# rows that are folded and the rest of one.
GATED = [
    (1, 1, 32_771, False),
    (2, 3, 16_389, False),
    (3, 5, 40_001, False),
    (2, 300, 257, False),
    (9, 3, 256, False),
    (1003, 7, 5, False),
    (70, 2050, 3, False),
    (65, 9, 255, False),
    (129, 3, 250, False),
    (301, 1030, 1, False),
    (64, 130, 1, False),
    (87, 255, 1, False),
    (95, 129, 1, False),
    (41, 511, 1, False),
    (7, 255, 13, True),
    (1, 19, 1003, True),
    (3, 3, 1667, True),
    (1, 1, 4099, True),
    (70, 2050, 3, True),
    (7, 1030, 11, True),
    (5, 64, 4001, True),
]


@native
@pytest.mark.parametrize("shape", GATED, ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", None])
def test_gates_drop_what_dropout_drops(shape, activation):
    n, c, length, last = shape
    p, scale = 0.3, torch.tensor(65536 / round(0.7 * 65536), dtype=torch.float32)
    generator = torch.Generator().manual_seed(n + c + length)

    def draw():
        x = torch.randn(n, c, length, generator=generator)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        return (x.squeeze(2) if length == 1 else x).to(DEVICE)

    x, r, g = draw(), draw(), draw()
    g = torch.where(g == 0, 1, g)
    bias = torch.where(torch.arange(c, device=DEVICE) % 2 == 0, 0.0, 1000.0)  # half never below 0
    leaves = [t.clone().requires_grad_() for t in (x, r)]

    def call(backend):
        y = F.batch_norm_act(
            *(leaves[0], None, None, None, bias, leaves[1], True),
            activation=activation,
            drop=p,
            rng_state=rng_state(),
            backend=backend,
        )
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    y, d_x, d = call("native")
    kept = F.dropout(torch.ones_like(x), p, rng_state=rng_state()) != 0
    assert y.stride() == x.stride()
    assert torch.equal((d != 0)[:, 1::2], kept[:, 1::2])
    assert torch.equal((y != 0)[:, 1::2], kept[:, 1::2])
    if activation == "relu":
        assert torch.equal(d, torch.where(y > 0, g * scale.to(DEVICE), 0.0))
        assert not (y[~kept] != 0).any()
        assert (y[kept] > 0).float().mean() > 0.4
    elif activation != "gelu":  # which is 0 far below 0
        assert torch.equal(y != 0, kept)
        assert torch.equal(d != 0, kept)
    for ours, true in zip((y, d_x, d), call("reference"), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("shape", GATED, ids=str)
def test_gates_without_dropout(shape):
    n, c, length, last = shape
    x, r, g = (
        arranged(np.random.default_rng(s).standard_normal((n, c, length)), last, torch.float64)
        for s in range(3)
    )
    for activation in ("relu", "leaky_relu"):
        found = []
        for backend in ("native", "reference"):
            leaves = [t.clone().requires_grad_() for t in (x, r)]
            y = F.batch_norm_act(
                *(leaves[0], None, None, None, None, leaves[1], True),
                activation=activation,
                negative_slope=0.25,
                backend=backend,
            )
            found.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
        for ours, true in zip(*found, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)
        below = 0.0 if activation == "relu" else 0.25
        assert torch.equal(found[0][2], torch.where(found[0][0] > 0, g, g * below))


# Anything


@st.composite
def calls(draw, largest):
    """A call of batch_norm_act: shape, layout, dtype, options."""
    rank = draw(st.integers(0, 3))
    c = draw(st.one_of(st.integers(1, 9), st.integers(1, largest)))
    spatial = [draw(st.one_of(st.integers(1, 7), st.integers(1, 60))) for _ in range(rank)]
    room = max(2, 20 * largest // (c * int(np.prod(spatial))))
    n = draw(st.integers(1, min(room, 400)))
    if n * int(np.prod(spatial)) == 1:
        n = 2
    return {
        "shape": (n, c, *spatial),
        "layouts": draw(
            st.tuples(*[st.sampled_from(["first", "last", "strided", "odd", "expanded"])] * 3)
        ),
        "dtype": draw(st.sampled_from(DTYPES)),
        "activation": draw(st.sampled_from([None, "relu", "leaky_relu", "silu", "gelu"])),
        "residual": draw(st.booleans()),
        "drop": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        "training": draw(st.sampled_from([True, True, False])),
        "momentum": draw(st.sampled_from([0.1, None, 1.0])),
        "tracks": draw(st.booleans()),
        "weight": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "own_dtype": draw(st.booleans()),
    }


def laid_out(x, layout):
    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "odd":
        return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape)
    if layout == "expanded" and x.shape[0] > 1:
        return (
            x[:1].expand(x.shape)
            if x.dim() == 2 or x[0, 0].numel() == 1
            else x[:, :1].expand(x.shape)
        )
    return x


def run(call, backend):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    shape, dtype = call["shape"], call["dtype"]
    inner = dtype if call["own_dtype"] else parameter_dtype(dtype)
    x, r, g = (
        laid_out(draw(*shape, dtype=dtype), layout)
        if layout != "expanded" or i
        else draw(*shape, dtype=dtype)
        for i, layout in enumerate(call["layouts"])
    )
    weight, bias, mean = (draw(shape[1], dtype=inner) for _ in range(3))
    var = mean.abs() + 0.5
    weight, bias = (t if call[n] else None for n, t in (("weight", weight), ("bias", bias)))
    tracks = call["tracks"] or not call["training"]
    mean, var = (mean, var) if tracks else (None, None)
    counter = torch.tensor(3, device=DEVICE)
    r = r if call["residual"] else None
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, r)]
    y = F.batch_norm_act(
        *(leaves[0], mean, var, *leaves[1:], call["training"], call["momentum"]),
        activation=call["activation"],
        drop=call["drop"],
        num_batches_tracked=counter,
        rng_state=rng_state(),
        backend=backend,
    )
    given = [t for t in leaves if t is not None]
    found = [y.detach(), *torch.autograd.grad(y, given, g)]
    return found + ([mean, var] if tracks else []) + [counter.double()]


def check(call, backend):
    for i, (ours, true) in enumerate(zip(run(call, backend), run(call, "reference"), strict=True)):
        assert ours.dtype == true.dtype
        assert i > 0 or ours.numel() <= 1 or ours.stride() == true.stride()
        own = torch.finfo(true.dtype)
        # A rounding of what is stored, and those of what it is computed in.
        compute = torch.finfo(torch.promote_types(call["dtype"], torch.float32)).eps
        scale = max(1.0, float(true.double().abs().max()))
        bound = (own.eps + 64 * compute) * scale
        assert float((ours.double() - true.double()).abs().max()) <= bound, i


@native
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls(largest=2200))
def test_any_call_is_the_references(call):
    check(call, "native")


@pytest.mark.parametrize("backend", IMPLEMENTATIONS[1:2])
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls(largest=24))
def test_any_small_call_is_the_references(backend, call):
    check(call, backend)
