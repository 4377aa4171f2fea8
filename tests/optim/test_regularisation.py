"""Decay, l1, clipping and averaged weights, against their formulas; and who is regularised."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reg_kernels import nn as rnn
from reg_kernels.optim import SGD, SGDW, Adam, AdamW, param_groups

from support import DEVICE, DTYPE_IDS, DTYPES, Twins, implementations

IMPLEMENTATIONS = implementations()
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kinds = pytest.mark.parametrize("kind", [AdamW, SGDW])

SHAPES = ((3, 5), (2,), (65,))
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def parameters(*values):
    return [v.detach().clone().requires_grad_() for v in values]


def stepped(kind, values, grads, steps=1, **options):
    """Parameters after steps with the same gradients."""
    params = parameters(*values)
    optimizer = kind(params, **options)
    for _ in range(steps):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def prox(x, threshold):
    """argmin_z (z - x)^2 / 2 + threshold |z|, in another form than the kernels'."""
    return torch.sign(x) * (x.abs() - threshold).clamp(min=0)


# The three decays


@on_each
@kinds
@pytest.mark.parametrize("decay", ["decoupled", "decoupled_lr", "l2"])
def test_decay_is_its_formula(kind, decay, backend):
    # Where the gradient is zero and the moments are, what is left is the decay.
    lr, weight_decay = 0.1, 0.3
    x = randn(70)
    options = {"lr": lr, "weight_decay": weight_decay, "decay": decay, "backend": backend}
    if decay == "decoupled_lr":
        options["decay_lr"] = 0.4
    (y,) = stepped(kind, [x], [torch.zeros_like(x)], **options)
    if decay == "l2":
        g = weight_decay * x
        expected = x - lr * (g if kind is SGDW else g / (g.abs() + 1e-8))
    else:
        rate = lr if decay == "decoupled" else lr / 0.4
        expected = x * (1 - rate * weight_decay)
    torch.testing.assert_close(y, expected, **CLOSE)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(AdamW, torch.optim.Adam), (SGDW, torch.optim.SGD)], ids=["Adam", "SGD"]
)
def test_l2_is_torchs_of_the_coupled_ones(ours, theirs):
    options = {"lr": 0.1, "weight_decay": 0.3}
    pair = Twins(
        lambda p: ours(p, decay="l2", **options),
        lambda p: theirs(p, foreach=False, **options),
        [randn(*s) for s in SHAPES],
    )
    pair.step(4)
    pair.check()


@pytest.mark.parametrize(("plain", "coupled"), [(AdamW, Adam), (SGDW, SGD)])
def test_the_two_names_differ_by_their_decay_alone(plain, coupled):
    values, grads = [randn(9)], [randn(9)]
    for decay in ("decoupled", "l2"):
        options = {"lr": 0.1, "weight_decay": 0.3, "decay": decay, "steps": 3}
        (a,), (b,) = (stepped(kind, values, grads, **options) for kind in (plain, coupled))
        assert torch.equal(a, b)
    assert plain(parameters(values[0])).defaults["decay"] == "decoupled"
    assert coupled(parameters(values[0])).defaults["decay"] == "l2"
    decays = [kind(parameters(values[0])).defaults["weight_decay"] for kind in (plain, coupled)]
    assert decays == [0.01 if plain is AdamW else 0.0, 0.0]


@kinds
def test_decoupled_lr_is_independent_of_the_rate_and_follows_its_schedule(kind):
    x, zero = randn(9), torch.zeros(9, dtype=torch.float64, device=DEVICE)
    kept = {}
    for lr in (0.5, 0.001):
        (p,) = parameters(x)
        optimizer = kind([p], lr=lr, weight_decay=0.1, decay="decoupled_lr")
        assert optimizer.param_groups[0]["decay_lr"] == lr
        schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(3):
            p.grad = zero
            optimizer.step()
            schedule.step()
        kept[lr] = p.detach()
    expected = x * (1 - 0.1) * (1 - 0.05) * (1 - 0.025)
    for p in kept.values():
        torch.testing.assert_close(p, expected, **CLOSE)


def test_decay_lr_of_a_group_is_that_of_when_it_is_added():
    a, b = parameters(randn(3), randn(3))
    optimizer = AdamW([a], lr=0.5, decay="decoupled_lr")
    optimizer.add_param_group({"params": [b], "lr": 0.25})
    assert [g["decay_lr"] for g in optimizer.param_groups] == [0.5, 0.25]


@kinds
def test_decays_of_several_groups_in_one_optimizer(kind):
    values, grads = [randn(9) for _ in range(3)], [randn(9) for _ in range(3)]
    names = ("decoupled", "decoupled_lr", "l2")
    options = {"lr": 0.1, "weight_decay": 0.3, "decay_lr": 0.7}
    params = parameters(*values)
    groups = [{"params": [p], "decay": d} for p, d in zip(params, names, strict=True)]
    optimizer = kind(groups, **options)
    for _ in range(3):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, x, g, d in zip(params, values, grads, names, strict=True):
        (alone,) = stepped(kind, [x], [g], steps=3, decay=d, **options)
        assert torch.equal(p, alone)


@kinds
def test_no_decay_keeps_what_is_infinite(kind):
    x = torch.tensor([math.inf, -math.inf, 1.0], dtype=torch.float64, device=DEVICE)
    for decay in ("decoupled", "l2"):
        options = {"lr": 0.1, "weight_decay": 0.0, "decay": decay}
        (y,) = stepped(kind, [x], [torch.ones_like(x)], **options)
        assert y[:2].tolist() == [math.inf, -math.inf]
        assert y[2] < 1


# l1


@on_each
@kinds
@pytest.mark.parametrize("decay", ["decoupled", "decoupled_lr", "l2"])
def test_l1_is_the_proximal_step_after_the_update(kind, decay, backend):
    values, grads = [randn(*s) for s in SHAPES], [randn(*s) for s in SHAPES]
    options = {"lr": 0.1, "weight_decay": 0.2, "decay": decay, "backend": backend}
    if decay == "decoupled_lr":
        options["decay_lr"] = 0.4
    with_l1 = parameters(*values)
    without = parameters(*values)
    rate = 0.25 if decay == "decoupled_lr" else 0.1
    optimizers = [kind(with_l1, l1=3.0, **options), kind(without, **options)]
    for _ in range(3):
        for params, optimizer in zip((with_l1, without), optimizers, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        for p in without:
            p.data.copy_(prox(p.data, rate * 3.0))
    zeros = 0
    for p, q in zip(with_l1, without, strict=True):
        torch.testing.assert_close(p, q, **CLOSE)
        assert torch.equal(p == 0, q == 0)
        zeros += int((p == 0).sum())
    assert 0 < zeros < sum(p.numel() for p in with_l1)


@on_each
@dtypes
def test_l1_zeros_are_exact_and_have_no_sign(dtype, backend):
    x = torch.linspace(-1, 1, 65).to(DEVICE, dtype)
    g = torch.zeros_like(x)
    (y,) = stepped(SGDW, [x], [g], lr=0.5, weight_decay=0.0, l1=1.0, backend=backend)
    assert torch.equal(y == 0, x.abs() <= 0.5)
    assert not torch.signbit(y[y == 0]).any()
    torch.testing.assert_close(y.double(), prox(x.double(), 0.5), rtol=2**-8, atol=0)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_l1_zeros_stay_exact_however_they_are_stored(rounding):
    x = torch.linspace(-1, 1, 513).to(DEVICE, torch.bfloat16)
    options = {"lr": 0.1, "weight_decay": 0.0, "l1": 1.0, "rounding": rounding}
    (y,) = stepped(SGDW, [x], [torch.zeros_like(x)], steps=4, **options)
    inside = x.float().abs() < 0.39
    assert (y[inside] == 0).all()
    assert (y[x.float().abs() > 0.42] != 0).all()
    assert not torch.signbit(y[inside]).any()


def test_l1_solves_the_lasso():
    # Of an orthogonal design the solution is a soft threshold of the least squares one.
    target = randn(500)
    p = torch.zeros_like(target).requires_grad_()
    optimizer = SGD([p], lr=0.1, l1=0.5)
    for _ in range(300):
        p.grad = p.detach() - target
        optimizer.step()
    torch.testing.assert_close(p.detach(), prox(target, 0.5), rtol=1e-10, atol=1e-11)
    assert torch.equal(p == 0, target.abs() <= 0.5)


def test_elastic_net():
    # argmin (p - t)^2 / 2 + l1 |p| + weight_decay p^2 / 2 = prox(t, l1) / (1 + weight_decay)
    target = randn(500)
    p = torch.zeros_like(target).requires_grad_()
    optimizer = SGD([p], lr=0.1, l1=0.5, weight_decay=0.3)
    for _ in range(300):
        p.grad = p.detach() - target
        optimizer.step()
    torch.testing.assert_close(p.detach(), prox(target, 0.5) / 1.3, rtol=1e-10, atol=1e-11)


@kinds
def test_l1_of_nan_and_infinite_parameters(kind):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.001], dtype=torch.float64, device=DEVICE)
    options = {"lr": 0.1, "l1": 1.0, "weight_decay": 0.0}
    (y,) = stepped(kind, [x], [torch.zeros_like(x)], **options)
    assert y[0].isnan()
    assert y[1:].tolist() == [math.inf, -math.inf, 0.0]


def test_l1_and_a_rate_of_zero():
    x = randn(9)
    (y,) = stepped(SGDW, [x], [randn(9)], lr=0.0, l1=1.0)
    assert torch.equal(x, y)


@kinds
def test_l1_of_one_group(kind):
    values, grads = [randn(33), randn(33)], [randn(33), randn(33)]
    params = parameters(*values)
    optimizer = kind([{"params": params[:1], "l1": 2.0}, {"params": params[1:]}], lr=0.1)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    (first,) = stepped(kind, values[:1], grads[:1], lr=0.1, l1=2.0)
    (second,) = stepped(kind, values[1:], grads[1:], lr=0.1)
    assert torch.equal(params[0], first)
    assert torch.equal(params[1], second)
    assert (params[0] == 0).any()


# Who is regularised


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(4),
                nn.GroupNorm(2, 4),
                nn.InstanceNorm2d(4, affine=True),
                nn.LayerNorm((4, 5)),  # of two dimensions: only its layer tells
                nn.RMSNorm((4, 5)),
                rnn.BatchNorm2d(4),
                nn.SyncBatchNorm(4),
            ]
        )
        self.rnn = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding = nn.Embedding(7, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight  # tied
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


DECAYED = {
    "conv.weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "embedding.weight",
}


def test_param_groups():
    model = Model()
    lines = []
    groups = param_groups(model, 0.25, l1=0.5, report=lines.append)
    names = {p: name for name, p in model.named_parameters()}
    first, second = ({names[p] for p in g["params"]} for g in groups)
    assert first == DECAYED
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    assert second == everything - DECAYED
    assert sum(len(g["params"]) for g in groups) == len(everything)
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {"weight_decay": 0.25, "l1": 0.5},
        {"weight_decay": 0.0, "l1": 0.0},
    ]
    # One line for each parameter, frozen ones too, and one for each group.
    assert len(lines) == len(dict(model.named_parameters())) + 2
    said = dict(line.split(": ", 1) for line in lines)
    assert said["conv.weight"] == "decay"
    assert said["conv.bias"] == "no decay, a bias"
    assert said["norms.0.weight"] == "no decay, of a BatchNorm2d"
    assert said["norms.3.weight"] == "no decay, of a LayerNorm"
    assert said["temperature"] == "no decay, fewer than two dimensions"
    assert said["frozen.weight"] == "left out, it requires no gradient"
    numel = sum(p.numel() for p in groups[0]["params"])
    assert (
        said["decay"] == f"{len(DECAYED)} parameters, {numel} elements, weight_decay 0.25, l1 0.5"
    )
    assert said["no decay"].endswith("weight_decay 0.0, l1 0.0")


def test_param_groups_in_an_optimizer():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    model = model.to(DEVICE, torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SGDW(param_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, **CLOSE)


def test_param_groups_without_a_group():
    (group,) = param_groups(nn.Linear(2, 3, bias=False))
    assert group["weight_decay"] == 0.01
    (group,) = param_groups(nn.BatchNorm1d(3))
    assert group["weight_decay"] == 0.0
    assert param_groups(nn.ReLU()) == []
    (alone,) = param_groups(nn.LayerNorm((2, 3)), report=None)
    assert len(alone["params"]) == 2


def test_param_groups_of_bad_input():
    for name, options in (("weight_decay", {"weight_decay": -1}), ("l1", {"l1": math.nan})):
        value = options[name]
        with pytest.raises(
            ValueError, match=f"^param_groups: {name} must be at least 0, got {value}"
        ):
            param_groups(nn.Linear(2, 2), **options)
    with pytest.raises(TypeError, match=r"^param_groups: model must be a Module, got list"):
        param_groups([])


# Clipping


def clipping_pair(max_norm, tensors, kind=AdamW, theirs=torch.optim.AdamW, **of_ours):
    def their_step(optimizer):
        def clip(o, args, kwargs):
            params = [p for g in o.param_groups for p in g["params"]]
            o.found = torch.nn.utils.clip_grad_norm_(params, max_norm)

        optimizer.register_step_pre_hook(clip)
        return optimizer

    return Twins(
        lambda p: kind(p, lr=0.1, max_grad_norm=max_norm, **of_ours),
        lambda p: their_step(theirs(p, lr=0.1, foreach=False)),
        tensors,
    )


@on_each
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1.0, 1e3, math.inf])
@pytest.mark.parametrize(
    ("kind", "theirs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)], ids=["AdamW", "SGD"]
)
def test_clipping_is_clip_grad_norm(kind, theirs, max_norm, backend):
    pair = clipping_pair(max_norm, [randn(*s) for s in SHAPES], kind, theirs, backend=backend)
    for _ in range(3):
        pair.step()
        torch.testing.assert_close(pair.ours.grad_norm, pair.theirs.found, **CLOSE)
    pair.check()


def test_clipping_leaves_the_gradients():
    (p,) = parameters(randn(9))
    p.grad = g = randn(9) * 100
    kept = g.clone()
    optimizer = SGD([p], lr=0.1, max_grad_norm=1.0)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.grad, kept)
    moved = float((p.detach() - before).norm())
    assert math.isclose(moved, 0.1, rel_tol=1e-6)


def test_clipping_over_launches_of_all_dtypes():
    # float16 and bfloat16 overflow and underflow where their squares are summed up in themselves.
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float64]
    values = [randn(40, dtype=d) for d in dtypes]
    grads = [(randn(40) * 300).to(d) for d in dtypes]
    params = parameters(*values)
    optimizer = SGD(params, lr=1.0, max_grad_norm=2.0)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    torch.testing.assert_close(float(optimizer.grad_norm), norm, rtol=1e-13, atol=0)
    for p, x, g in zip(params, values, grads, strict=True):
        expected = x.double() - g.double() * (2.0 / (norm + 1e-6))
        unit = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.detach().double(), expected, rtol=unit, atol=unit)


def test_clipping_of_strided_gradients_and_of_those_missing():
    pair = clipping_pair(0.5, [randn(4, 6), randn(5)[::2], randn(3), randn(0)])
    for missing in (2, 0, None):
        grads = [randn(6, 4).t(), randn(1).expand(3), randn(6)[::2], randn(0)]
        for params in (pair.params, pair.their_params):
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                p.grad = None if i == missing else g.clone()
        pair.ours.step()
        pair.theirs.step()
        torch.testing.assert_close(pair.ours.grad_norm, pair.theirs.found, **CLOSE)
    pair.check()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_of_what_is_not_finite_is_torchs(bad):
    pair = clipping_pair(1.0, [randn(3), randn(2)])
    pair.give([torch.tensor([bad, 1.0, 0.0], dtype=torch.float64), randn(2)])
    pair.ours.step()
    pair.theirs.step()
    torch.testing.assert_close(pair.params, pair.their_params, equal_nan=True, **CLOSE)
    assert float(pair.ours.grad_norm) == bad or math.isnan(bad)


def test_clipping_over_more_groups_than_a_launch_takes():
    pair = Twins(
        lambda p: AdamW([{"params": [q], "lr": 0.1} for q in p], max_grad_norm=0.5),
        lambda p: torch.optim.AdamW([{"params": [q], "lr": 0.1} for q in p], foreach=False),
        [randn(3) for _ in range(40)],
    )
    for _ in range(2):
        pair.give()
        found = torch.nn.utils.clip_grad_norm_(pair.their_params, 0.5)
        pair.ours.step()
        pair.theirs.step()
        torch.testing.assert_close(pair.ours.grad_norm, found, **CLOSE)
    pair.check()


@on_each
def test_clipping_of_scaled_gradients(backend):
    # grad_norm is that of the unscaled ones, also after the scale has grown.
    pair = clipping_pair(0.5, [randn(3, 5), randn(2)], backend=backend)
    scaler = torch.amp.GradScaler(device=DEVICE, init_scale=64.0, growth_interval=1)
    for _ in range(3):
        scale = scaler.get_scale()
        pair.give()
        for p in pair.params:
            p.grad *= scale
        scaler.scale(torch.ones((), device=DEVICE))
        scaler.step(pair.ours)
        pair.theirs.step()
        scaler.update()
        assert scaler.get_scale() == 2 * scale
        torch.testing.assert_close(pair.ours.grad_norm, pair.theirs.found, **CLOSE)
    pair.check()


def test_grad_norm_is_none_where_nothing_is_clipped():
    (p,) = parameters(randn(3))
    p.grad = randn(3)
    optimizer = AdamW([p])
    assert optimizer.grad_norm is None
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, p.grad.norm(), **CLOSE)
    kept = optimizer.grad_norm
    norm = float(kept)
    p.grad = p.grad * 2
    optimizer.step()
    assert float(kept) == norm  # a value of its own
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None


# Averaged weights


@on_each
@kinds
def test_ema_is_swa_utils(kind, backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(DEVICE, torch.float64)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.n_averaged += 1  # or its first update copies; ours starts where the weights did
    optimizer = kind(model.parameters(), lr=0.1, ema_decay=0.9, backend=backend)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        average.update_parameters(model)
    own = [p.detach().clone() for p in model.parameters()]
    with optimizer.ema_weights():
        torch.testing.assert_close(list(model.parameters()), list(average.module.parameters()))
    for p, q in zip(model.parameters(), own, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(optimizer.state[p]["ema"].shape, p.shape)


@on_each
@dtypes
def test_ema_is_kept_in_single_precision_or_better(dtype, backend):
    (p,) = parameters(randn(65).to(dtype))
    optimizer = SGDW([p], lr=0.1, ema_decay=0.75, backend=backend)
    ema = p.detach().double().clone()
    for _ in range(4):
        p.grad = torch.randn_like(p)
        exact = p.detach().double() - 0.1 * p.grad.double()
        optimizer.step()
        # Of the weights before they are rounded to 16 bits.
        ema = 0.75 * ema + 0.25 * exact
    state = optimizer.state[p]["ema"]
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    unit = 4 * torch.finfo(state.dtype).eps
    torch.testing.assert_close(state.double(), ema, rtol=unit, atol=unit)


def test_ema_of_what_l1_has_made_zero():
    (p,) = parameters(torch.ones(3, dtype=torch.float64, device=DEVICE) * 0.1)
    optimizer = SGDW([p], lr=1.0, l1=1.0, weight_decay=0.0, ema_decay=0.5)
    p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert (p == 0).all()
    torch.testing.assert_close(optimizer.state[p]["ema"], torch.full_like(p, 0.1 / 8))


def test_ema_of_zero_is_the_weights():
    (p,) = parameters(randn(9))
    optimizer = AdamW([p], lr=0.1, ema_decay=0.0)
    for _ in range(3):
        p.grad = randn(9)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["ema"], p.detach(), **CLOSE)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_ema_of_other_layouts(layout):
    x = randn(6, 4).t() if layout == "transposed" else randn(4, 12)[:, ::2]
    p = copy.deepcopy(x).requires_grad_()
    optimizer = SGD([p], lr=0.1, ema_decay=0.5)
    ema = x
    for _ in range(3):
        p.grad = randn(4, 6)
        optimizer.step()
        ema = (ema + p.detach()) / 2
    with optimizer.ema_weights():
        torch.testing.assert_close(p.detach(), ema, **CLOSE)


def test_swapping_twice_or_too_soon():
    (p,) = parameters(randn(3))
    optimizer = AdamW([p], ema_decay=0.9)
    with pytest.raises(RuntimeError, match=r"^AdamW: no average of the weights is kept"):
        optimizer.swap_in_ema()
    with pytest.raises(RuntimeError, match=r"^AdamW: no averaged weights are swapped in"):
        optimizer.swap_out_ema()
    p.grad = randn(3)
    optimizer.step()
    own = p.detach().clone()
    version = p._version
    optimizer.swap_in_ema()
    assert p._version > version
    average = p.detach().clone()
    assert not torch.equal(average, own)
    with pytest.raises(RuntimeError, match=r"^AdamW: the averaged weights are swapped in already"):
        optimizer.swap_in_ema()
    with pytest.raises(RuntimeError, match=r"^AdamW: .* call swap_out_ema\(\) before step\(\)"):
        optimizer.step()
    assert torch.equal(p, average)
    assert float(optimizer.state[p]["step"]) == 1
    optimizer.swap_out_ema()
    assert torch.equal(p, own)
    with pytest.raises(RuntimeError, match="no averaged weights"):
        optimizer.swap_out_ema()
    optimizer.step()


def test_the_weights_come_back_from_a_block_that_raises():
    (p,) = parameters(randn(3))
    optimizer = AdamW([p], ema_decay=0.9)
    p.grad = randn(3)
    optimizer.step()
    own = p.detach().clone()
    with pytest.raises(KeyError), optimizer.ema_weights():
        raise KeyError
    assert torch.equal(p, own)


def test_loading_while_averaged_weights_are_swapped_in_loses_no_weights():
    (p,) = parameters(randn(3))
    optimizer = AdamW([p], lr=0.1, ema_decay=0.9)
    p.grad = randn(3)
    optimizer.step()
    own = p.detach().clone()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.swap_in_ema()
    try:
        optimizer.load_state_dict(saved)
    except RuntimeError as error:
        assert str(error).startswith("AdamW: ")  # refused in so many words
    optimizer.swap_out_ema()
    assert torch.equal(p, own)


def test_no_ema_asked_for_when_none_is_kept():
    (p,) = parameters(randn(3))
    optimizer = AdamW([p])
    p.grad = randn(3)
    optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    for ask in (optimizer.swap_in_ema, optimizer.ema_weights().__enter__):
        with pytest.raises(RuntimeError, match=r"^AdamW: no average of the weights is kept"):
            ask()
    assert torch.equal(p, before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_an_average_of_some_groups():
    a, b = parameters(randn(3), randn(3))
    optimizer = AdamW([{"params": [a], "ema_decay": 0.9}, {"params": [b]}], lr=0.1)
    a.grad, b.grad = randn(3), randn(3)
    optimizer.step()
    assert "ema" not in optimizer.state[b]
    own = a.detach().clone(), b.detach().clone()
    with optimizer.ema_weights():
        assert not torch.equal(a, own[0])
        assert torch.equal(b, own[1])
    assert torch.equal(a, own[0])


def test_averaging_that_begins_and_ends_half_way():
    (p,) = parameters(randn(9))
    optimizer = SGD([p], lr=0.1)
    p.grad = randn(9)
    optimizer.step()
    optimizer.param_groups[0]["ema_decay"] = 0.5
    ema = p.detach().clone()
    for decay in (0.5, 0.5, 0.25):
        optimizer.param_groups[0]["ema_decay"] = decay
        optimizer.step()
        ema = decay * ema + (1 - decay) * p.detach()
    torch.testing.assert_close(optimizer.state[p]["ema"], ema, **CLOSE)
    optimizer.param_groups[0]["ema_decay"] = None
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["ema"], ema, **CLOSE)


def test_groups_leave_l1_to_the_optimizer_unless_they_name_it():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    assert [g.get("l1") for g in AdamW(param_groups(model), l1=0.5).param_groups] == [0.5, None]
    assert [g.get("l1") for g in AdamW(param_groups(model, l1=0.1), l1=0.5).param_groups] == [
        0.1,
        None,
    ]


def test_a_plan_asks_no_learning_rate_tensor_for_its_value(monkeypatch):
    # On a device that would wait for everything queued there.
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = AdamW([p], lr=torch.tensor(0.1))
    p.grad = torch.ones_like(p)
    asked = []
    monkeypatch.setattr(torch.Tensor, "__ge__", lambda *args: asked.append(args) or True)
    optimizer.step()
    assert not asked
