"""The optimizers' arithmetic: errors over a thousand steps, torch's bits, roundings that keep what
is small, the same bits however it is run, and no allocation."""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch

from reg_kernels.bench._memory import cpu_memory
from reg_kernels.optim import SGD, SGDW, Adam, AdamW

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas

IMPLEMENTATIONS = implementations()
KERNELS = IMPLEMENTATIONS[::2]  # native and the reference: Triton's interpreter takes minutes
on_kernels = pytest.mark.parametrize("backend", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
native = pytest.mark.skipif(not isas(), reason="the native library was not built")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's kernels")

SIZES = (1, 3, 63, 64, 65, 511, 512, 513, 8191, 8192, 8193, 20_001)


pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def trajectory(make, tensors, grads, seed=5):
    """The parameters after one step for each list of gradients, and the optimizer."""
    params = [x.detach().clone().requires_grad_() for x in tensors]
    optimizer = make(params)
    torch.manual_seed(seed)
    for of_step in grads:
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def all_bits(params, optimizer):
    """All that a run leaves, in one list."""
    state = [
        value
        for group in optimizer.param_groups
        for p in group["params"]
        for _, value in sorted(optimizer.state[p].items())
    ]
    return [*params, *state]


def assert_same_bits(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


# A thousand steps

STEPS, ELEMENTS = 1000, 777
LONG_RUNS = {
    "AdamW": (AdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "amsgrad": (AdamW, torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "Adam": (Adam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
    "SGD": (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
    "Nesterov": (
        SGD,
        torch.optim.SGD,
        {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    ),
    "plain": (SGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.01}),
}
long_runs = pytest.mark.parametrize("run", LONG_RUNS)


def long_run(run, dtype):
    """Start, gradients and options: 16-bit moments lose eps=1e-8, and torch divides by zero."""
    ours, theirs, options = LONG_RUNS[run]
    options = options | ({} if theirs is torch.optim.SGD else {"eps": 1e-3})
    x = randn(ELEMENTS).to(dtype)
    drift = randn(ELEMENTS) * 0.3
    grads = [[(randn(ELEMENTS) + drift).to(dtype)] for _ in range(STEPS)]
    return ours, theirs, options, x, grads


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
@long_runs
def test_a_thousand_steps_are_at_most_twice_as_wrong_as_torchs(run, dtype, backend):
    ours, theirs, options, x, grads = long_run(run, dtype)

    def loop(params):
        return theirs(params, foreach=False, **options)

    (truth,), _ = trajectory(loop, [x.double()], grads)
    (their,), _ = trajectory(loop, [x], grads)
    (own,), _ = trajectory(lambda p: ours(p, backend=backend, **options), [x], grads)
    own_error, their_error = ((y.double() - truth).abs() for y in (own, their))
    assert own_error.isfinite().all()
    floor = torch.finfo(dtype).eps
    assert own_error.max() <= 2 * their_error.max() + floor
    assert own_error.square().mean() <= 4 * their_error.square().mean() + floor**2


def in_long_double(run, x, grads, options):
    """The formulas once more, in numpy's long double."""
    option = {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0} | options
    wide = np.longdouble
    p = x.cpu().numpy().astype(wide)
    lr, decay = wide(option["lr"]), wide(option["weight_decay"])
    m, v, v_max = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, (g,) in enumerate(grads, 1):
        g = g.cpu().numpy().astype(wide)
        if run in ("AdamW", "amsgrad"):
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
        if "momentum" in options:
            rest = 1 if t == 1 else 1 - wide(option["dampening"])
            m = wide(option["momentum"]) * m + rest * g
            g = g + wide(option["momentum"]) * m if "nesterov" in options else m
        elif "eps" in options:
            b1, b2 = (wide(b) for b in option.get("betas", (0.9, 0.999)))
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            v_max = np.maximum(v_max, v)
            second = v_max if "amsgrad" in options else v
            g = m / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + wide(option["eps"]))
        p = p - lr * g
    return p


@on_kernels
@long_runs
def test_a_thousand_steps_in_double(run, backend):
    ours, theirs, options, x, grads = long_run(run, torch.float64)
    if "amsgrad" not in options and "eps" in options:
        options["weight_decay"] = options.get("weight_decay", 0.01)
    elif "amsgrad" in options:
        options["weight_decay"] = 0.01
    truth = in_long_double(run, x, grads, options)
    (own,), _ = trajectory(lambda p: ours(p, backend=backend, **options), [x], grads)
    (their,), _ = trajectory(lambda p: theirs(p, foreach=False, **options), [x], grads)
    own_error, their_error = (np.abs(y.cpu().numpy() - truth) for y in (own, their))
    assert own_error.max() <= 2 * their_error.max() + 1e-15
    assert own_error.max() < 1e-10  # it is the same thing, above all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", ["AdamW", "SGD"])
def test_single_precision_state_is_better_than_the_parameters_own(run, dtype):
    ours, theirs, options, x, grads = long_run(run, dtype)
    (truth,), _ = trajectory(lambda p: theirs(p, foreach=False, **options), [x.double()], grads)
    errors = {}
    for kept in (None, torch.float32):
        options |= {"rounding": "kahan", "state_dtype": kept}
        (own,), optimizer = trajectory(partial(ours, **options), [x], grads)
        (state,) = optimizer.state.values()
        moments = ("exp_avg", "exp_avg_sq") if run == "AdamW" else ("momentum_buffer",)
        assert {state[name].dtype for name in moments} == {kept or dtype}
        together = own.double() + state["compensation"].double()
        errors[kept] = float((together - truth).square().mean().sqrt())
    assert errors[torch.float32] < 0.5 * errors[None]


def test_bfloat16_state_of_single_precision_parameters():
    ours, theirs, options, x, grads = long_run("AdamW", torch.float32)
    (truth,), _ = trajectory(lambda p: theirs(p, foreach=False, **options), [x.double()], grads)
    (own,), optimizer = trajectory(
        lambda p: ours(p, state_dtype=torch.bfloat16, **options), [x], grads
    )
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    moved = (truth - x).square().mean().sqrt()
    # exp_avg_sq stalls where its steps of 1/1000 are below half an ulp.
    assert (own - truth).square().mean().sqrt() < 0.5 * moved


# torch's bits


def ulps(a, b):
    def ordered(x):
        bits = x.view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((ordered(a) - ordered(b)).abs().max())


@native
@on_cpu
@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "weight_decay": 0.3},
        {"amsgrad": True, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.0},
        {"betas": (0.8, 0.95), "eps": 1e-4},
    ],
    ids=str,
)
def test_ten_steps_are_those_of_torchs_fused(kind, options):
    ours, theirs = {
        "AdamW": (AdamW, torch.optim.AdamW),
        "Adam": (Adam, torch.optim.Adam),
    }[kind]
    tensors = [randn(n, dtype=torch.float32) for n in SIZES]
    grads = [[randn(n, dtype=torch.float32) for n in SIZES] for _ in range(10)]
    own, o = trajectory(lambda p: ours(p, backend="native", **options), tensors, grads)
    their, t = trajectory(lambda p: theirs(p, fused=True, **options), tensors, grads)
    for a, b in zip(own, their, strict=True):
        assert ulps(a, b) <= 2
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return
    # The very same where torch's loop works on whole vectors: what is left over it adds up in
    # another order.
    states = [
        [s[name] for name in t.state[q]] for s, q in zip(o.state.values(), t.state, strict=True)
    ]
    theirs_states = [list(s.values()) for s in t.state.values()]
    for a, b, mine, of_torch in zip(own, their, states, theirs_states, strict=True):
        whole = a.numel() // 64 * 64
        for x, y in zip([a, *mine], [b, *of_torch], strict=True):
            x, y = x.reshape(-1)[:whole], y.reshape(-1)[:whole]
            assert torch.equal(x, y)


@native
@on_cpu
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    ids=str,
)
def test_ten_steps_of_sgd_beside_torchs_fused(options):
    tensors = [randn(n, dtype=torch.float32) for n in SIZES]
    grads = [[randn(n, dtype=torch.float32) for n in SIZES] for _ in range(10)]
    own, _ = trajectory(lambda p: SGD(p, lr=1e-3, backend="native", **options), tensors, grads)
    their, _ = trajectory(
        lambda p: torch.optim.SGD(p, lr=1e-3, fused=True, **options), tensors, grads
    )
    for a, b in zip(own, their, strict=True):
        # In units of the largest value's last place: an ulp of what cancels out is no measure.
        torch.testing.assert_close(a, b, rtol=0, atol=2 * 2.0**-23 * float(b.abs().max()))


RUNS = {
    "AdamW": lambda p, **o: AdamW(p, lr=0.01, weight_decay=0.1, **o),
    "AdamW, all of it": lambda p, **o: AdamW(
        *(p,), lr=0.01, amsgrad=True, l1=0.05, ema_decay=0.9, max_grad_norm=1.0, **o
    ),
    "Adam": lambda p, **o: Adam(p, lr=0.01, weight_decay=0.1, betas=(0.3, 0.9), **o),
    "SGD": lambda p, **o: SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1, **o),
    "SGDW": lambda p, **o: SGDW(p, lr=0.01, l1=0.05, ema_decay=0.5, **o),
    "bf16 state": lambda p, **o: AdamW(p, lr=0.01, state_dtype=torch.bfloat16, **o),
    "Kahan": lambda p, **o: AdamW(p, lr=0.01, rounding="kahan", state_dtype=torch.float32, **o),
    "stochastic": lambda p, **o: AdamW(p, lr=0.01, rounding="stochastic", **o),
}
runs = pytest.mark.parametrize("run", RUNS)


def skip_what_there_is_not(run, dtype):
    if run == "stochastic" and dtype == torch.float16:
        pytest.skip("bfloat16 only")


def lists(dtype, sizes=SIZES, steps=3):
    tensors = [randn(n).to(dtype) for n in sizes]
    return tensors, [[randn(n).to(dtype) for n in sizes] for _ in range(steps)]


@native
@dtypes
@runs
def test_each_instruction_set_gives_the_same_bits(run, dtype):
    from reg_kernels import _C

    skip_what_there_is_not(run, dtype)
    best = _C.isa()
    tensors, grads = (
        [x.cpu() for x in lists(dtype)[0]],
        [[g.cpu() for g in of] for of in lists(dtype)[1]],
    )
    bits = {}
    try:
        for isa in isas():
            _C.set_isa(isa)
            assert _C.isa() == isa
            bits[isa] = all_bits(
                *trajectory(lambda p: RUNS[run](p, backend="native"), tensors, grads)
            )
    finally:
        _C.set_isa(best)
    for isa, of_isa in bits.items():
        # FMAs are explicit: those of the baseline are the C library's.
        assert_same_bits(of_isa, bits[best])
        assert isa in isas()


# Stochastic rounding


def below_and_above(x):
    """The two bfloat16 about each float64."""
    bits = x.float().view(torch.int32)
    down = (bits & -65536).view(torch.float32).double()  # towards zero
    up = ((bits & -65536) + 65536).view(torch.float32).double()
    return torch.minimum(down, up), torch.maximum(down, up)


@pytest.mark.parametrize("backend", implementations())
def test_stochastic_rounding_leaves_wider_types_beside_bfloat16_alone(backend):
    ps = [torch.ones(9, dtype=dtype, device=DEVICE) for dtype in (torch.bfloat16, torch.float32)]
    ps = [p.requires_grad_() for p in ps]
    for p in ps:
        p.grad = torch.full_like(p, 0.5)
    SGD(ps, lr=0.5, rounding="stochastic", backend=backend).step()
    assert all(torch.equal(p, torch.full_like(p, 0.75)) for p in ps)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("start", [1.0, -1.0, 1.9375, -0.0078125, 1e-30])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9375])
def test_stochastic_rounding_goes_up_as_often_as_it_should(backend, start, fraction):
    n = 2_000 if backend == "triton" and DEVICE == "cpu" else 100_000
    p = torch.full((n,), start, dtype=torch.bfloat16, device=DEVICE)
    step = torch.finfo(torch.bfloat16).eps * 2.0 ** math.floor(math.log2(abs(float(p[0]))))
    g = torch.full_like(p, -math.copysign(fraction * step, start))  # away from zero
    exact = float(p[0]) - float(g[0])
    (y,), _ = trajectory(
        lambda q: SGD(q, lr=1.0, rounding="stochastic", backend=backend), [p], [[g]]
    )
    low, high = (float(b) for b in below_and_above(torch.tensor([exact], dtype=torch.float64)))
    assert low < exact < high
    assert set(y.double().unique().tolist()) == {low, high}
    up = (exact - low) / (high - low)
    ups = int((y.double() == high).sum())
    assert abs(ups - n * up) <= 4 * math.sqrt(n * up * (1 - up))


def test_stochastic_rounding_is_unbiased_whatever_it_rounds():
    n = 300_000
    p = (randn(n) * torch.exp(3 * randn(n))).bfloat16()
    g = (randn(n) * p.double() / 64).bfloat16()
    (y,), _ = trajectory(lambda q: SGD(q, lr=1.0, rounding="stochastic"), [p], [[g]])
    exact = (p.double() - g.double()).float().double()
    low, high = below_and_above(exact)
    on_grid = exact.bfloat16().double() == exact
    assert bool(((y.double() == low) | (y.double() == high) | on_grid).all())
    assert torch.equal(y.double()[on_grid], exact[on_grid])
    y, low, high, exact = y[~on_grid], low[~on_grid], high[~on_grid], exact[~on_grid]
    up = (exact - low) / (high - low)
    excess = ((y.double() == high).double() - up).sum()
    assert abs(excess) <= 4 * math.sqrt(float((up * (1 - up)).sum()))
    # And where the fraction is small, and large.
    for of in (up < 0.05, up > 0.95, (up > 0.4) & (up < 0.6)):
        excess = ((y.double() == high).double() - up)[of].sum()
        assert abs(excess) <= 4 * math.sqrt(float((up * (1 - up))[of].sum()))


def test_stochastic_roundings_are_independent():
    n, half = 1 << 17, torch.finfo(torch.bfloat16).eps / 2
    params = [torch.ones(n, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for _ in range(2)]
    optimizer = SGD(params, lr=1.0, rounding="stochastic")

    def ups():
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.full_like(p, -half)
        optimizer.step()
        return [(p.detach() > 1).float() for p in params]

    (a, b), (c, _) = ups(), ups()
    pairs = {"steps": (a, c), "parameters": (a, b)}
    for lag in (1, 2, 4, 8, 16, 64, 512, 8192):
        pairs[f"lag {lag}"] = (a[:-lag], a[lag:])
    for what, (x, y) in pairs.items():
        r = float(torch.corrcoef(torch.stack([x, y]))[0, 1]) * math.sqrt(x.numel())
        assert abs(r) < 4.5, what


def test_stochastic_rounding_leaves_alone_what_is_a_bfloat16_already():
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1.5, 3.3895313892515355e38]
    p = torch.tensor(special * 30, dtype=torch.bfloat16, device=DEVICE)
    (y,), _ = trajectory(
        lambda q: SGD(q, lr=1.0, rounding="stochastic"), [p], [[torch.zeros_like(p)]]
    )
    assert torch.equal(y.isnan(), p.isnan())
    assert torch.equal(y.nan_to_num(), p.nan_to_num())


def test_stochastic_rounding_follows_the_seed():
    p, g = randn(500).bfloat16(), randn(500).bfloat16()

    def run(seed):
        return trajectory(lambda q: SGD(q, lr=1e-3, rounding="stochastic"), [p], [[g]], seed)[0][0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_what_draws_nothing_leaves_the_generator_alone():
    params = [randn(5).float().requires_grad_(), randn(5).bfloat16().requires_grad_()]
    for p in params:
        p.grad = torch.ones_like(p)
    before = torch.get_rng_state()
    AdamW(params, rounding="kahan", max_grad_norm=1.0).step()
    AdamW(params[:1], rounding="stochastic").step()
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_rounding_does_not_drift():
    # 300 steps of a tenth of an ulp each, on average just that.
    n, steps = 20_000, 300
    ulp = torch.finfo(torch.bfloat16).eps
    p = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    g = torch.full_like(p, -ulp / 16)
    (y,), _ = trajectory(lambda q: SGD(q, lr=1.0, rounding="stochastic"), [p], [[g]] * steps)
    moved = (y.double() - 1).mean() / ulp
    sigma = math.sqrt(steps * (1 / 16) * (15 / 16) / n)
    assert abs(float(moved) - steps / 16) <= 4 * sigma


# Updates below half an ulp


@on_kernels
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_small_updates_stall_or_arrive(kind, rounding, backend):
    # From 1 to 0.5 by steps of at most 0.001, where half an ulp of bfloat16 is 0.002 and more.
    n = 512
    p = torch.ones(n, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    if kind == "SGD":
        optimizer = SGD([p], lr=2e-3, rounding=rounding, backend=backend)
    else:
        optimizer = AdamW([p], lr=1e-3, weight_decay=0.0, rounding=rounding, backend=backend)
    for _ in range(1500):
        p.grad = p.detach() - 0.5
        optimizer.step()
    far = p.detach().float() - 0.5
    if rounding == "nearest":
        assert (p == 1).all()
    else:
        # SGD leaves exp(-3) of the way, 0.025; Adam arrives.
        assert abs(float(far.mean()) - (0.0249 if kind == "SGD" else 0.0)) < 0.01
        assert float(far.abs().max()) < 0.1


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", ["AdamW", "Nesterov"])
def test_kahan_is_as_good_as_twice_the_bits(run, dtype, backend):
    ours, theirs, options, x, grads = long_run(run, dtype)
    (truth,), _ = trajectory(lambda p: theirs(p, foreach=False, **options), [x.double()], grads)

    def make(p):
        return ours(p, rounding="kahan", state_dtype=torch.float32, backend=backend, **options)

    (own,), optimizer = trajectory(make, [x], grads)
    (state,) = optimizer.state.values()
    assert state["compensation"].dtype == dtype
    together = own.double() + state["compensation"].double()
    size = truth.abs().clamp(min=1.0)
    unit = torch.finfo(dtype).eps
    assert ((together - truth).abs() / size).max() < STEPS * unit**2
    # What is kept apart is what rounding took off, half an ulp at the most.
    assert (state["compensation"].double().abs() <= own.double().abs() * unit / 2).all()
    assert (state["compensation"] != 0).float().mean() > 0.8
    (plain,), _ = trajectory(lambda p: ours(p, backend=backend, **options), [x], grads)
    assert (own.double() - truth).abs().mean() < 0.2 * (plain.double() - truth).abs().mean()


# The same bits


@on_cpu
@dtypes
@runs
def test_bits_do_not_depend_on_the_number_of_threads(run, dtype):
    skip_what_there_is_not(run, dtype)
    tensors, grads = lists(dtype, (90_001, 8193, 3, 40_000, 0, 70_000, 513))
    threads = torch.get_num_threads()
    bits = []
    try:
        for count in (1, 2, 2, max(3, os.cpu_count() or 1)):
            torch.set_num_threads(count)
            bits.append(all_bits(*trajectory(RUNS[run], tensors, grads)))
    finally:
        torch.set_num_threads(threads)
    for other in bits[1:]:
        assert_same_bits(bits[0], other)


def in_groups(split, make):
    return lambda params: make([{"params": [params[i] for i in part]} for part in split])


GROUPINGS = {
    "halves": lambda n: [range(n // 2), range(n // 2, n)],
    "each its own": lambda n: [[i] for i in range(n)],
    "one and the rest": lambda n: [[0], range(1, n)],
}


def grouped(run, dtype, split, count=48):
    """Small tensors in groups: more of them than a launch takes groups."""
    sizes = (SIZES[:8] * 6)[:count]
    torch.manual_seed(1)
    tensors, grads = lists(dtype, sizes)
    whole, first = trajectory(in_groups([range(count)], RUNS[run]), tensors, grads)
    parts, second = trajectory(in_groups(split, RUNS[run]), tensors, grads)
    assert len(second.param_groups) == len(split)
    return whole, first, parts, second


@dtypes
@runs
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_bits_do_not_depend_on_the_groups(run, dtype, grouping):
    skip_what_there_is_not(run, dtype)
    whole, first, parts, second = grouped(run, dtype, GROUPINGS[grouping](48))
    assert_same_bits(all_bits(whole, first), all_bits(parts, second))


@dtypes
@pytest.mark.parametrize("run", [run for run in RUNS if run != "stochastic"])
def test_bits_do_not_depend_on_the_order_of_groups(run, dtype):
    # Stochastic rounding does: draws are numbered in the order of the parameters.
    split = [range(1, 48, 2), range(46, -1, -2)]
    whole, _, parts, _ = grouped(run, dtype, split)
    assert_same_bits(whole, parts)


@pytest.mark.parametrize("run", ["stochastic", "AdamW, all of it"])
def test_bits_do_not_depend_on_the_neighbours_gradients(run):
    # A parameter's draws stay its own where one before it has no gradient.
    tensors = [randn(n).bfloat16() for n in (65, 33, 513)]
    options = {} if run == "stochastic" else {"rounding": "stochastic"}
    make = RUNS[run] if run == "stochastic" else lambda p: AdamW(p, lr=0.01, l1=0.1, **options)
    results = []
    for missing in (None, 0, 1):
        params = [x.clone().requires_grad_() for x in tensors]
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.full_like(p, 0.7)
        torch.manual_seed(3)
        make(params).step()
        results.append(params[2].detach())
    assert_same_bits(results[:1] * 2, results[1:])


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@runs
def test_two_runs_give_the_same_bits(run, backend):
    sizes = (65, 3) if backend == "triton" else SIZES
    tensors, grads = lists(torch.bfloat16, sizes)
    a, b = (
        all_bits(*trajectory(lambda p: RUNS[run](p, backend=backend), tensors, grads))
        for _ in range(2)
    )
    assert_same_bits(a, b)


@runs
def test_bits_do_not_depend_on_layout_or_alignment(run):
    x, grads = randn(31, 17).float(), [randn(31, 17).float() for _ in range(3)]

    def result(arrange):
        params = [arrange(x).detach().requires_grad_()]
        optimizer = RUNS[run](params)
        for g in grads:
            params[0].grad = arrange(g).detach()
            optimizer.step()
        return params[0].detach()

    expected = result(torch.clone)

    def misaligned(x):
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)

    def strided(x):
        return torch.stack([x, x], -1)[..., 0]

    for arrange in (lambda x: x.t().contiguous().t(), misaligned, strided):
        if run == "AdamW, all of it":  # its norm is summed in storage order
            torch.testing.assert_close(result(arrange), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(result(arrange), expected)


# Memory

MEMORY = {
    "AdamW": {},
    "amsgrad, l1, EMA": {"amsgrad": True, "l1": 0.1, "ema_decay": 0.9},
    "clipping": {"max_grad_norm": 1.0},
    "stochastic": {"rounding": "stochastic"},
    "Kahan": {"rounding": "kahan", "state_dtype": torch.float32},
    "tensor lr": {"lr": "float32"},
    "double lr": {"lr": "float64"},
    "lr of two kinds": {"lr": "both"},
    "scaled": {"scaled": True},
    "found infinite": {"scaled": True, "infinite": True},
    "l2": {"decay": "l2"},
}


def bytes_of_a_step(options, *, many_groups=False, fresh=False, strided=False):
    """The most that a step took, after two that were not looked at."""
    options = dict(options)
    scaled, infinite = options.pop("scaled", False), options.pop("infinite", False)
    rate = options.pop("lr", None)
    params = [
        torch.randn(n).to(dtype).requires_grad_()
        for n in (3, 70, 513)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    if many_groups:
        params += [torch.randn(3).requires_grad_() for _ in range(36)]
    if strided:
        params += [torch.randn(5, 8)[:, ::2].requires_grad_(), torch.randn(4, 5).requires_grad_()]
    groups = [{"params": [p]} for p in params] if many_groups else [{"params": params}]
    optimizer = AdamW(groups, **options)
    if rate:
        dtype = torch.float64 if rate == "float64" else torch.float32
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01, dtype=dtype)
        if rate == "both":
            optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)], "lr": 0.1})
            params = [*params, *optimizer.param_groups[-1]["params"]]
    if scaled:
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.found_inf = torch.tensor(float(infinite))

    def give():
        for p in params:
            if strided and p.dim() == 2:
                p.grad = torch.randn(*p.shape[::-1]).t()
            elif fresh or p.grad is None:
                p.grad = torch.randn_like(p)

    for _ in range(2):
        give()
        optimizer.step()
    most = 0
    for _ in range(2):
        give()
        _, peak, grown = cpu_memory(lambda _: optimizer.step(), torch.device("cpu"))
        most = max(most, peak, grown)
    return most


@native
@pytest.mark.parametrize("options", MEMORY)
def test_a_step_allocates_nothing(options):
    assert bytes_of_a_step(MEMORY[options]) == 0


@native
@pytest.mark.parametrize(
    "circumstances", [{"many_groups": True}, {"fresh": True}, {"strided": True}], ids=str
)
def test_a_step_allocates_nothing_whatever_it_is_given(circumstances):
    assert bytes_of_a_step({"max_grad_norm": 1.0}, **circumstances) == 0
    assert bytes_of_a_step({}, **circumstances) == 0


def test_the_profile_sees_what_is_allocated():
    p = torch.ones(1000, requires_grad=True)
    p.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([p], foreach=False)
    optimizer.step()
    _, peak, _ = cpu_memory(lambda _: optimizer.step(), torch.device("cpu"))
    assert peak >= 4000
    ours = AdamW([p])
    _, peak, grown = cpu_memory(lambda _: ours.step(), torch.device("cpu"))
    assert grown >= 8000  # the state, at the first step


def test_state_takes_no_more_than_it_says():
    p = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    for options, expected in (
        ({}, {"exp_avg": 2000, "exp_avg_sq": 2000}),
        ({"state_dtype": torch.float32}, {"exp_avg": 4000, "exp_avg_sq": 4000}),
        (
            {"rounding": "kahan", "ema_decay": 0.9},
            {"exp_avg": 2000, "exp_avg_sq": 2000, "compensation": 2000, "ema": 4000},
        ),
        ({"rounding": "stochastic"}, {"exp_avg": 2000, "exp_avg_sq": 2000}),
    ):
        optimizer = AdamW([p], **options)
        optimizer.step()
        sizes = {name: v.nbytes for name, v in optimizer.state[p].items()}
        assert sizes == expected | {"step": 4}
