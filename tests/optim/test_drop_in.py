"""The optimizers in the place of torch's: held to torch's for-loop, mostly in float64, where a
difference of meaning shows and one of rounding does not."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from reg_kernels.ops.optimizer_step import MOST_GROUPS
from reg_kernels.optim import SGD, SGDW, Adam, AdamW

from support import DEVICE, Twins, implementations

INTERPRETED = DEVICE == "cpu"
IMPLEMENTATIONS = implementations()
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)

SHAPES = ((3, 5), (), (65,), (0,), (4, 0, 2), (1,))


class TorchSGDW(torch.optim.SGD):
    """torch has none: its SGD after the decay."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, **options):
        super().__init__(params, lr, foreach=False, **options)
        self.decoupled = weight_decay

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - float(group["lr"]) * self.decoupled)
        super().step()
        return loss


def for_loop(kind):
    """torch's class with foreach=False."""
    if kind is TorchSGDW:
        return kind
    return lambda params, **options: kind(params, foreach=False, **options)


KINDS = {
    "AdamW": (AdamW, for_loop(torch.optim.AdamW)),
    "Adam": (Adam, for_loop(torch.optim.Adam)),
    "SGDW": (SGDW, TorchSGDW),
    "SGD": (SGD, for_loop(torch.optim.SGD)),
}
OPTIONS = {
    "AdamW": [
        {},
        {"lr": 0.1, "weight_decay": 0.3},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "amsgrad": True},
        {"lr": 0.1, "amsgrad": True, "maximize": True, "weight_decay": 0.1},
        {"betas": (0.4, 0.7), "eps": 1e-3},  # torch.lerp's other form
        {"betas": (0.5, 0.5)},
        {"betas": (0.0, 0.0), "eps": 0.1},
        {"betas": (0.9, 0.0), "eps": 0.1},
        {"lr": 0.0, "weight_decay": 0.5},
        {"lr": 0},
        {"lr": 1, "eps": 1, "weight_decay": 1},
        {"maximize": True},
    ],
    "Adam": [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.3},
        {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True, "maximize": True},
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.1, "betas": (0.3, 0.99), "weight_decay": 0.1},
    ],
    "SGD": [
        {},
        {"lr": 0.1, "weight_decay": 0.3},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 1.0, "dampening": 1.0, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.5, "dampening": -0.5, "maximize": True},
        {"lr": 0.1, "dampening": 0.7},
    ],
    "SGDW": [
        {},
        {"lr": 0.1, "weight_decay": 0.3},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.3},
    ],
}
MATRIX = [(kind, options) for kind in KINDS for options in OPTIONS[kind]]
# One of each rule, for what has nothing to do with the options.
RULES = [
    ("AdamW", {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGDW", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]
by_rule = pytest.mark.parametrize(("kind", "options"), RULES, ids=[kind for kind, _ in RULES])


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def twins(kind, options, tensors=None, **of_ours):
    if tensors is None:
        tensors = [randn(*shape) for shape in SHAPES]
    ours, theirs = KINDS[kind]
    return Twins(lambda p: ours(p, **options, **of_ours), lambda p: theirs(p, **options), tensors)


def check_state(pair, **tolerances):
    """What torch keeps, ours keeps, and no more."""
    tolerances = tolerances or {"rtol": 1e-12, "atol": 1e-13}
    for p, q in zip(pair.params, pair.their_params, strict=True):
        own, their = pair.ours.state.get(p, {}), pair.theirs.state.get(q, {})
        assert set(own) == set(their)
        for name, value in their.items():
            if value is not None:
                torch.testing.assert_close(own[name].cpu(), value.cpu(), **tolerances)


# Values


@pytest.mark.parametrize(
    ("kind", "options"), MATRIX, ids=[f"{kind} {options}" for kind, options in MATRIX]
)
@on_each
def test_options(kind, options, backend):
    tensors = [randn(3, 5), randn(2)] if backend == "triton" else None
    pair = twins(kind, options, tensors, backend=backend)
    pair.step(5)
    pair.check()
    check_state(pair)


@by_rule
def test_each_keeps_its_defaults(kind, options):
    ours, theirs = KINDS[kind]
    p = randn(2).requires_grad_()
    own, their = ours([p]).defaults, theirs([p.detach().requires_grad_()]).defaults
    for name, value in their.items():
        if name not in ("foreach", "weight_decay") or kind in ("AdamW", "Adam"):
            assert name == "foreach" or own[name] == value, name


def step_by_large_gradients(pair, steps):
    """Whose squares are no subnormals of float16, which torch rounds to."""
    for _ in range(steps):
        grads = [torch.randn_like(p) for p in pair.params]
        pair.give([g + g.sign() for g in grads])
        pair.ours.step()
        pair.theirs.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@by_rule
def test_lower_precision(kind, options, dtype):
    pair = twins(kind, options, [randn(3, 5, dtype=dtype), randn(513, dtype=dtype)])
    step_by_large_gradients(pair, 3)
    if not all(p.isfinite().all() for p in pair.their_params):
        pytest.skip("the step of this torch makes NaN in float16")
    unit = torch.finfo(dtype).eps
    pair.check(rtol=16 * unit, atol=16 * unit)
    check_state(pair, rtol=16 * unit, atol=16 * unit)
    for p in pair.params:
        for name, value in pair.ours.state[p].items():
            assert value.dtype == (torch.float32 if name == "step" else dtype)


@by_rule
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 0.0, 1e300, 1e-300])
def test_special_gradients_and_parameters(kind, options, special):
    x = randn(70)
    x[[0, 7, 69]] = special
    pair = twins(kind, options, [randn(70), x])
    for _ in range(2):
        grads = [randn(70), randn(70)]
        grads[0][[1, 8, 68]] = special
        pair.give(grads)
        pair.ours.step()
        pair.theirs.step()
    for p, q in zip(pair.params, pair.their_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13, equal_nan=True)


# Layouts


def strided(*shape):
    return randn(*shape[:-1], 2 * shape[-1])[..., ::2]


LAYOUTS = {
    "channels_last": lambda: randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: randn(2, 3, 2, 5, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: randn(7, 11).t(),
    "permuted": lambda: randn(3, 4, 5).permute(1, 2, 0),
    "every second": lambda: strided(4, 6),
    "rows apart": lambda: randn(6, 9)[:, :5],
    "part of a whole": lambda: randn(100)[3:80],
    "size one": lambda: randn(10)[:5].as_strided((1, 5, 1), (77, 1, 13)),
}


@pytest.mark.parametrize("parameter", LAYOUTS)
@pytest.mark.parametrize("gradient", ["alike", "contiguous", "reversed", "expanded", "strided"])
@pytest.mark.parametrize("backend", IMPLEMENTATIONS[::2])
def test_layouts(parameter, gradient, backend):
    x = LAYOUTS[parameter]()

    def like(x):
        if gradient == "alike":
            return torch.randn_like(x)
        if gradient == "contiguous":
            return randn(*x.shape)
        if gradient == "reversed":
            return randn(*x.shape[::-1]).permute(tuple(reversed(range(x.dim()))))
        if gradient == "expanded":
            return randn().expand(x.shape)
        return strided(*x.shape)

    options = {"lr": 0.1, "amsgrad": True}
    pair = twins("AdamW", options, [randn(3), x, randn(2, 2)], backend=backend)
    strides = pair.params[1].stride()
    for _ in range(4):
        grads = [randn(3), like(x), randn(2, 2)]
        for params in (pair.params, pair.their_params):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone() if gradient == "alike" else g.detach()
        pair.ours.step()
        pair.theirs.step()
    pair.check()
    check_state(pair)
    assert pair.params[1].stride() == strides


def test_gradients_are_left_as_they_are():
    pair = twins("Adam", {"weight_decay": 0.5, "maximize": True}, [LAYOUTS["transposed"]()])
    g = randn(11, 7)
    kept = g.clone()
    pair.params[0].grad = g
    pair.ours.step()
    assert pair.params[0].grad is g
    assert torch.equal(g, kept)


def test_what_lies_around_a_parameter_stays():
    whole = torch.full((40, 9), 7.0, dtype=torch.float64, device=DEVICE)
    for view in (whole[3:5], whole[10:20, 2:4], whole[30:, ::3]):
        p = view.detach().requires_grad_()
        optimizer = AdamW([p], lr=1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (p < 7).all()
    assert int((whole != 7).sum()) == 2 * 9 + 10 * 2 + 10 * 3


def test_a_gradient_that_is_a_negated_view():
    pair = twins("AdamW", {"lr": 0.1}, [randn(70)])
    for _ in range(2):
        g = randn(70)
        for p in (pair.params[0], pair.their_params[0]):
            p.grad = torch._neg_view(g.clone())
        pair.ours.step()
        pair.theirs.step()
    pair.check()


# Several dtypes, groups


@by_rule
def test_mixed_dtypes_in_one_optimizer(kind, options):
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.float64]
    pair = twins(kind, options, [randn(5, 7, dtype=d) for d in dtypes])
    step_by_large_gradients(pair, 3)
    for p, q in zip(pair.params, pair.their_params, strict=True):
        assert p.dtype == q.dtype
        unit = 16 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p, q, rtol=unit, atol=unit)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS[::2])
def test_more_groups_than_a_launch_takes(backend):
    def groups(kind):
        def make(params):
            return kind(
                [
                    {
                        "params": params[2 * i : 2 * i + 2],
                        "lr": 0.01 * (i + 1),
                        "weight_decay": 0.1 * (i % 3),
                        "betas": (0.5 + 0.01 * i, 0.9),
                        "maximize": i % 2 == 1,
                        "amsgrad": i % 7 == 0,
                    }
                    for i in range(40)
                ]
            )

        return make

    pair = Twins(
        groups(lambda g: AdamW(g, backend=backend)),
        groups(lambda g: torch.optim.AdamW(g, foreach=False)),
        [randn(1 + i % 5) for i in range(80)],
    )
    pair.step(3)
    pair.check()
    check_state(pair)
    assert max(len(launch.groups) for launch in pair.ours._plan.launches.all) <= MOST_GROUPS
    # A group among the last that changes its mind.
    for optimizer in (pair.ours, pair.theirs):
        optimizer.param_groups[38]["lr"] = 5.0
    pair.step(2)
    pair.check()


def test_groups_of_different_decays_and_algorithms_options():
    def make(kind, **extra):
        return lambda p: kind(
            [{"params": p[:1], "momentum": 0.0}, {"params": p[1:2]}, {"params": p[2:], **extra}],
            lr=0.1,
            momentum=0.9,
            weight_decay=0.1,
        )

    pair = Twins(
        make(SGD, nesterov=True), make(torch.optim.SGD, nesterov=True), [randn(9) for _ in range(3)]
    )
    pair.step(4)
    pair.check()


@by_rule
def test_add_param_group_mid_way(kind, options):
    tensors = [randn(5), randn(3, 3)]
    pair = twins(kind, options, tensors)
    pair.step(3)
    for params, optimizer in (
        (pair.params, pair.ours),
        (pair.their_params, pair.theirs),
    ):
        p = torch.linspace(-1, 1, 70, dtype=torch.float64, device=DEVICE).requires_grad_()
        optimizer.add_param_group({"params": p, "lr": 0.5})
        params.append(p)
    pair.step(3)
    pair.check()
    check_state(pair)


def test_named_parameters():
    model = nn.Linear(3, 2).double().to(DEVICE)
    other = copy.deepcopy(model)
    ours = AdamW(model.named_parameters(), lr=0.1)
    theirs = torch.optim.AdamW(other.named_parameters(), lr=0.1, foreach=False)
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    assert ours.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    for m, o in ((model, ours), (other, theirs)):
        m(torch.ones(4, 3, dtype=torch.float64, device=DEVICE)).square().sum().backward()
        o.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    ours.load_state_dict(theirs.state_dict())


@by_rule
def test_options_changed_between_steps(kind, options):
    pair = twins(kind, options)
    changes = [{"lr": 0.01}, {"weight_decay": 0.0}, {"maximize": True}, {"weight_decay": 0.7}]
    if "Adam" in kind:
        changes += [{"betas": (0.3, 0.9)}, {"eps": 0.1}]
    else:
        changes += [{"nesterov": False}, {"momentum": 0.0}, {"momentum": 0.5}, {"dampening": 0.9}]
    for change in changes:
        for optimizer in (pair.ours, pair.theirs):
            optimizer.param_groups[0].update(change)
        if kind == "SGDW" and "weight_decay" in change:
            pair.theirs.param_groups[0]["weight_decay"] = 0.0
            pair.theirs.decoupled = change["weight_decay"]
        pair.step(2)
        pair.check()


def test_momentum_turned_on_late():
    pair = twins("SGD", {"lr": 0.1, "dampening": 0.4})
    pair.step(2)
    for optimizer in (pair.ours, pair.theirs):
        optimizer.param_groups[0]["momentum"] = 0.9
    pair.step(3)
    pair.check()
    check_state(pair)


# Learning rates


@by_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_as_a_tensor(kind, options, dtype, shape):
    if kind == "SGDW" and shape:
        pytest.skip("the stand-in for torch's")
    pair = twins(kind, options)
    for optimizer in (pair.ours, pair.theirs):
        lr = torch.full(shape, 0.1, dtype=dtype, device=DEVICE)
        optimizer.param_groups[0]["lr"] = lr
    # torch computes with such a tensor, in its dtype; without, in double.
    tolerances = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    pair.step(2)
    pair.check(**tolerances)
    for optimizer in (pair.ours, pair.theirs):
        optimizer.param_groups[0]["lr"].mul_(0.25)  # in place, as a schedule does
    pair.step(2)
    pair.check(**tolerances)


def test_a_tensor_lr_in_one_group_leaves_the_others_alone():
    def make(kind):
        lr = torch.tensor(0.1, dtype=torch.float32, device=DEVICE)
        return lambda p: kind([{"params": p[:1], "lr": lr}, {"params": p[1:], "lr": 0.3}])

    pair = Twins(
        make(AdamW), make(lambda g: torch.optim.AdamW(g, foreach=False)), [randn(9), randn(9)]
    )
    pair.step(3)
    torch.testing.assert_close(pair.params[0], pair.their_params[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pair.params[1], pair.their_params[1], rtol=1e-12, atol=1e-13)


SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.5, 3, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@by_rule
def test_schedules(kind, options, schedule):
    # OneCycleLR and CyclicLR turn the momentum too, of Adam the first beta.
    pair = twins(kind, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a step that the schedule did not see
        schedules = [SCHEDULES[schedule](o) for o in (pair.ours, pair.theirs)]
        for _ in range(8):
            pair.step()
            for s in schedules:
                s.step()
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    pair.check()
    check_state(pair)


def test_a_schedule_of_a_tensor_lr():
    pair = twins("AdamW", {})
    for optimizer in (pair.ours, pair.theirs):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device=DEVICE)
    schedules = [lr_scheduler.ExponentialLR(o, 0.5) for o in (pair.ours, pair.theirs)]
    for _ in range(4):
        pair.step()
        for s in schedules:
            s.step()
    pair.check(rtol=1e-6, atol=1e-6)  # torch computes in the tensor's float32


def test_reduce_on_plateau():
    pair = twins("SGD", {"lr": 0.1, "momentum": 0.9})
    schedules = [
        lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5) for o in (pair.ours, pair.theirs)
    ]
    for _ in range(8):
        pair.step()
        for s in schedules:
            s.step(1.0)
    assert pair.ours.param_groups[0]["lr"] < 0.1
    pair.check()


# Gradients that come and go


@by_rule
@pytest.mark.parametrize("backend", IMPLEMENTATIONS[::2])
def test_gradients_that_come_and_go(kind, options, backend):
    pair = twins(kind, options, [randn(n) for n in (3, 70, 1, 9)], backend=backend)
    patterns = [
        (1, 1, 0, 1),
        (1, 1, 0, 1),
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (0, 1, 0, 1),
        (0, 1, 1, 0),
        (1, 0, 0, 0),
        (1, 1, 1, 1),
    ]
    for pattern in patterns:
        pair.give([randn(p.numel()) if on else None for on, p in zip(pattern, pair.params)])  # noqa: B905
        pair.ours.step()
        pair.theirs.step()
        pair.check()
    check_state(pair)
    if "Adam" in kind:
        assert [int(pair.ours.state[p]["step"]) for p in pair.params] == [5, 6, 3, 5]


@by_rule
def test_no_gradients_at_all(kind, options):
    pair = twins(kind, options, max_grad_norm=1.0)
    before = [p.detach().clone() for p in pair.params]
    pair.ours.step()
    assert all(torch.equal(p, q) for p, q in zip(pair.params, before, strict=True))
    assert not pair.ours.state
    assert float(pair.ours.grad_norm) == 0


def test_requires_grad_turned_off():
    pair = twins("AdamW", {"lr": 0.1})
    pair.step()
    for params in (pair.params, pair.their_params):
        params[0].requires_grad_(False)
    pair.step()  # by a gradient that is still there, as torch does
    pair.give([None, *map(torch.randn_like, pair.params[1:])])
    pair.ours.step()
    pair.theirs.step()
    pair.check()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_a_model(set_to_none):
    def model():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        ).to(DEVICE, torch.float64, memory_format=torch.channels_last)

    models = [model(), model()]
    optimizers = [
        AdamW(models[0].parameters(), lr=0.01),
        torch.optim.AdamW(models[1].parameters(), lr=0.01, foreach=False),
    ]
    for _ in range(6):
        x = randn(5, 3, 6, 6)
        for m, o in zip(models, optimizers, strict=True):
            o.zero_grad(set_to_none=set_to_none)
            m(x).square().mean().backward()
            o.step()
    # Training magnifies what differs by roundings.
    torch.testing.assert_close(
        list(models[0].parameters()), list(models[1].parameters()), rtol=1e-9, atol=1e-10
    )


def test_gradients_accumulate_into_the_same_tensor():
    pair = twins("SGD", {"lr": 0.1, "momentum": 0.9}, [randn(70)])
    for _ in range(4):
        for p, o in ((pair.params[0], pair.ours), (pair.their_params[0], pair.theirs)):
            p.sin().sum().backward()
            o.step()
    pair.check()


def test_one_gradient_for_two_parameters():
    pair = twins("Adam", {"lr": 0.1, "weight_decay": 0.1}, [randn(9), randn(9)])
    for _ in range(3):
        g = randn(9)
        for params in (pair.params, pair.their_params):
            for p in params:
                p.grad = g
        pair.ours.step()
        pair.theirs.step()
    pair.check()


# What holds parameters and state moves them


@by_rule
def test_parameters_get_other_data(kind, options):
    pair = twins(kind, options, [randn(4, 6), randn(3)])
    pair.step(2)
    x = randn(4, 6)
    for params in (pair.params, pair.their_params):
        params[0].data = x.clone()
    gc.collect()
    pair.step(2)
    pair.check()
    check_state(pair)


@by_rule
def test_parameters_changed_in_place(kind, options):
    # As weights are clipped, loaded or pruned by hand.
    pair = twins(kind, options, [randn(4, 6), strided(4, 6), randn(6, 4).t()])
    pair.step(2)
    for params in (pair.params, pair.their_params):
        with torch.no_grad():
            for p in params:
                p.clamp_(-0.1, 0.1)
                p[1] = 0.5
    pair.step(2)
    pair.check()


@by_rule
def test_parameters_get_other_strides(kind, options):
    pair = twins(kind, options, [randn(4, 3, 5, 2), randn(3)])
    pair.step(2)
    for params in (pair.params, pair.their_params):
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
    pair.step(2)
    pair.check()
    for params in (pair.params, pair.their_params):
        params[0].data = params[0].data.contiguous()
    pair.step(2)
    pair.check()
    check_state(pair)


@pytest.mark.parametrize("gradient", ["new", "the same"])
def test_parameters_are_transposed_where_they_lie(gradient):
    # The same memory, element 0 at the same place: only strides tell.
    pair = twins("AdamW", {"lr": 0.1}, [randn(4, 4)])
    pair.step(2)
    for p in (pair.params[0], pair.their_params[0]):
        p.data = p.data.t()
        if gradient == "new":
            p.grad = None
    for _ in range(2):
        if gradient == "new":
            pair.give()
        pair.ours.step()
        pair.theirs.step()
    pair.check()
    check_state(pair)


def test_parameters_get_another_dtype_where_they_lie():
    memory = torch.zeros(64, device=DEVICE)
    p = nn.Parameter(memory[:16])
    optimizer = SGD([p], lr=1.0)
    p.grad = torch.ones(16, device=DEVICE)
    optimizer.step()
    p.grad = None
    memory.zero_()
    p.data = memory.view(torch.bfloat16)[:16]
    p.grad = torch.ones(16, dtype=torch.bfloat16, device=DEVICE)
    optimizer.step()
    assert (memory.view(torch.bfloat16)[:16] == -1).all()
    assert (memory[8:] == 0).all()  # past its end


def test_parameters_shrink_where_they_lie():
    memory = torch.zeros(64, device=DEVICE)
    p = nn.Parameter(memory[:32])
    optimizer = SGD([p], lr=1.0)
    p.grad = torch.ones(32, device=DEVICE)
    optimizer.step()
    p.grad = None
    memory.zero_()
    p.data = memory[:16]
    p.grad = torch.ones(16, device=DEVICE)
    optimizer.step()
    assert memory.tolist() == [-1.0] * 16 + [0.0] * 48


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
@by_rule
def test_a_module_is_moved_to_another_dtype(kind, options, to):
    ours, theirs = KINDS[kind]
    options = options | {"eps": 1e-3} if "Adam" in kind else options
    model = nn.Linear(5, 3).to(DEVICE, torch.float64)
    other = copy.deepcopy(model)
    optimizers = [ours(model.parameters(), **options), theirs(other.parameters(), **options)]

    def step(dtype):
        x = randn(4, 5).to(dtype)
        for m, o in zip((model, other), optimizers, strict=True):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()

    step(torch.float64)
    for m, o in zip((model, other), optimizers, strict=True):
        m.to(to)
        saved = copy.deepcopy(o.state_dict())
        if o is optimizers[1]:
            o.load_state_dict(saved)  # what torch needs to cast its state
    for _ in range(2):
        step(to)
    unit = 32 * torch.finfo(to).eps
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=unit, atol=unit)
        for name, value in optimizers[0].state[p].items():
            assert value.dtype == (torch.float32 if name == "step" else to)


@by_rule
def test_state_replaced_by_the_user(kind, options):
    pair = twins(kind, options, [randn(70), randn(4, 5)])
    pair.step(2)
    name = "exp_avg" if "Adam" in kind else "momentum_buffer"
    values = [randn(70), randn(5, 4).t()]
    for params, optimizer in ((pair.params, pair.ours), (pair.their_params, pair.theirs)):
        for p, value in zip(params, values, strict=True):
            optimizer.state[p][name] = value.clone()
    pair.step(2)
    pair.check()
    check_state(pair)
    for params, optimizer in ((pair.params, pair.ours), (pair.their_params, pair.theirs)):
        optimizer.state[params[0]][name].fill_(3.0)
    pair.step(2)
    pair.check()
    for params, optimizer in ((pair.params, pair.ours), (pair.their_params, pair.theirs)):
        optimizer.state[params[1]].clear()
    if "Adam" in kind:
        for params, optimizer in ((pair.params, pair.ours), (pair.their_params, pair.theirs)):
            optimizer.state[params[0]]["step"] = torch.tensor(41.0)
    pair.step(2)
    pair.check()
    check_state(pair)


@by_rule
def test_state_tensors_get_other_data(kind, options):
    # How state is moved by hand: `v.data = v.data.to(device)`. And what share_memory_() does.
    pair = twins(kind, options, [randn(5000)])
    pair.step(2)
    name = "exp_avg" if "Adam" in kind else "momentum_buffer"
    value = randn(5000)
    for params, optimizer in ((pair.params, pair.ours), (pair.their_params, pair.theirs)):
        optimizer.state[params[0]][name].data = value.clone()
    pair.step(2)
    pair.check()
    check_state(pair)


def test_state_in_shared_memory():
    p = torch.ones(5000, dtype=torch.float64, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    ours, theirs = AdamW([p]), torch.optim.AdamW([q], foreach=False)
    for _ in range(3):
        g = torch.randn(5000, dtype=torch.float64)
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
        for value in ours.state[p].values():
            value.share_memory_()
        p.data.share_memory_()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])


def test_state_of_the_users_own():
    pair = twins("AdamW", {"lr": 0.1}, [randn(9), randn(2)])
    pair.step(2)
    for params, optimizer in ((pair.params, pair.ours), (pair.their_params, pair.theirs)):
        optimizer.state[params[0]]["norms"] = torch.zeros(3)
        optimizer.state[params[0]]["note"] = "a word"
    pair.step(2)
    # Any new plan looks at the state again.
    for params, optimizer in ((pair.params, pair.ours), (pair.their_params, pair.theirs)):
        p = torch.ones(4, dtype=torch.float64, device=DEVICE, requires_grad=True)
        params.append(p)
        optimizer.add_param_group({"params": [p]})
    pair.step(2)
    pair.check()
    saved = pair.ours.state_dict()
    pair.ours.load_state_dict(copy.deepcopy(saved))
    assert pair.ours.state[pair.params[0]]["note"] == "a word"
    assert pair.ours.state[pair.params[0]]["norms"].shape == (3,)
    pair.step()
    pair.check()


def test_uninitialised_parameters_wait_as_with_torch():
    def make(kind):
        model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).to(DEVICE)
        optimizer = kind(model.parameters(), lr=0.1)
        model[1].weight.grad = torch.ones(2, 3, device=DEVICE)
        optimizer.step()  # the lazy ones have no gradient yet
        torch.manual_seed(2)
        model(torch.ones(4, 5, device=DEVICE)).sum().backward()
        optimizer.step()
        return optimizer.state[model[0].weight]

    torch.manual_seed(1)
    theirs = make(lambda p, **options: torch.optim.AdamW(p, foreach=False, **options))
    torch.manual_seed(1)
    ours = make(AdamW)
    torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"])


# state_dict


def rounds_trip(state_dict, way):
    if way == "deepcopy":
        return copy.deepcopy(state_dict)
    if way == "pickle":
        return pickle.loads(pickle.dumps(state_dict))
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("direction", ["ours to ours", "ours to torch's", "torch's to ours"])
@by_rule
def test_saved_in_one_loaded_in_another(kind, options, direction, way):
    if kind == "SGDW" and direction != "ours to ours":
        pytest.skip("torch has no SGDW")
    pair = twins(kind, options)
    pair.step(3)
    first, second = direction.split(" to ")
    source = pair.ours if first == "ours" else pair.theirs
    of_source = pair.params if first == "ours" else pair.their_params
    kinds = dict(zip(("ours", "torch's"), KINDS[kind], strict=True))
    params = [p.detach().clone().requires_grad_() for p in of_source]
    # Of other options: those come with the state.
    loaded = kinds[second](params, lr=77.0, weight_decay=0.0)
    loaded.load_state_dict(rounds_trip(source.state_dict(), way))
    assert loaded.param_groups[0]["lr"] == 0.1
    for _ in range(3):
        pair.give()
        for p, q in zip(params, pair.params, strict=True):
            p.grad = q.grad.clone()
        pair.ours.step()
        pair.theirs.step()
        loaded.step()
    pair.check()
    for p, q, exact in zip(params, pair.their_params, pair.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        if direction == "ours to ours":
            assert torch.equal(p, exact)
    if direction != "ours to torch's":
        for p, q in zip(params, pair.params, strict=True):
            for name, value in pair.ours.state[q].items():
                torch.testing.assert_close(loaded.state[p][name], value, rtol=1e-12, atol=1e-13)


def test_state_goes_through_torchs_and_back():
    pair = twins("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})
    pair.step(2)
    pair.theirs.load_state_dict(copy.deepcopy(pair.ours.state_dict()))
    pair.step(2)
    pair.ours.load_state_dict(pair.theirs.state_dict())
    pair.step(2)
    pair.check()
    check_state(pair)


@pytest.mark.parametrize("fresh", [True, False])
def test_loading_shares_nothing_with_the_source(fresh):
    pair = twins("AdamW", {"lr": 0.1, "amsgrad": True})
    pair.step(2)
    saved = pair.theirs.state_dict()
    kept = copy.deepcopy(saved)
    copies = [p.detach().clone().requires_grad_() for p in pair.params]
    ours = AdamW(copies) if fresh else pair.ours
    ours.load_state_dict(saved)
    params = ours.param_groups[0]["params"]
    for p, q in zip(params, pair.params, strict=True):
        p.grad = torch.ones_like(q)
    ours.step()
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(saved["state"][key][name], value)
            own = ours.state[params[key]][name]
            if value.numel():
                assert own.data_ptr() != saved["state"][key][name].data_ptr()
    assert saved["param_groups"] == kept["param_groups"]
    assert ours.param_groups[0]["lr"] == 0.1


def test_loading_a_tensor_lr_shares_nothing():
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    source = torch.optim.AdamW([q], lr=torch.tensor(0.1), foreach=False)
    ours = AdamW([p])
    ours.load_state_dict(source.state_dict())
    source.param_groups[0]["lr"].fill_(7.0)
    assert float(ours.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_state_dict_has_torchs_keys():
    pair = twins("AdamW", {"lr": 0.1, "amsgrad": True})
    pair.step()
    ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        for name, value in state.items():
            own = ours["state"][key][name]
            assert (own.shape, own.dtype, own.stride()) == (
                value.shape,
                value.dtype,
                value.stride(),
            )
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()


def test_options_that_torchs_lacks_stay_at_loading():
    p = torch.ones(3, requires_grad=True)
    ours = AdamW([p], l1=0.5, ema_decay=0.9, decay="decoupled_lr", lr=0.25)
    q = torch.ones(3, requires_grad=True)
    ours.load_state_dict(torch.optim.AdamW([q], lr=0.5).state_dict())
    (group,) = ours.param_groups
    assert (group["l1"], group["ema_decay"], group["decay"], group["decay_lr"]) == (
        *(0.5, 0.9, "decoupled_lr"),
        0.25,
    )
    assert group["lr"] == 0.5


def test_options_of_ours_are_saved():
    options = {
        "l1": 0.1,
        "ema_decay": 0.9,
        "decay": "decoupled_lr",
        "rounding": "kahan",
        "state_dtype": torch.float32,
    }
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    ours = AdamW([p], lr=0.5, **options)
    p.grad = torch.ones_like(p)
    ours.step()
    q = p.detach().clone().requires_grad_()
    other = AdamW([q])
    other.load_state_dict(rounds_trip(ours.state_dict(), "torch.save"))
    for name, value in options.items():
        assert other.param_groups[0][name] == value
    for name, value in ours.state[p].items():
        loaded = other.state[q][name]
        assert loaded.dtype == value.dtype  # torch would cast all to bfloat16
        assert torch.equal(loaded, value)
    for _ in range(3):
        p.grad = torch.randn(3).bfloat16()
        q.grad = p.grad.clone()
        ours.step()
        other.step()
    assert torch.equal(p, q)
    assert torch.equal(ours.state[p]["ema"], other.state[q]["ema"])


@by_rule
def test_copies_of_model_and_optimizer_go_on_alike(kind, options):
    for way in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        pair = twins(kind, options, ema_decay=0.9, max_grad_norm=1.0)
        pair.step(2)
        params, optimizer = way((pair.params, pair.ours))
        assert type(optimizer) is type(pair.ours)
        assert optimizer.max_grad_norm == 1.0
        assert optimizer.state.keys() == {p for p in params if p in optimizer.state}
        for _ in range(3):
            pair.give()
            for p, q in zip(params, pair.params, strict=True):
                p.grad = q.grad.clone()
            pair.ours.step()
            optimizer.step()
        for p, q in zip(params, pair.params, strict=True):
            assert torch.equal(p, q)
            for name, value in pair.ours.state[q].items():
                assert torch.equal(optimizer.state[p][name], value)


def test_a_copy_shares_nothing():
    pair = twins("AdamW", {"lr": 0.1}, [randn(9)])
    pair.step()
    (p,), optimizer = copy.deepcopy((pair.params, pair.ours))
    before = pair.params[0].detach().clone(), pair.ours.state[pair.params[0]]["exp_avg"].clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(pair.params[0], before[0])
    assert torch.equal(pair.ours.state[pair.params[0]]["exp_avg"], before[1])


def test_state_dict_hooks():
    pair = twins("AdamW", {"lr": 0.1})
    pair.step()
    seen = []
    for o in (pair.ours, pair.theirs):
        o.register_state_dict_pre_hook(lambda o: seen.append("save"))
        o.register_state_dict_post_hook(lambda o, d: d | {"more": 1})
        o.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))

        def halve(o, d):
            d = copy.deepcopy(d)
            d["param_groups"][0]["lr"] /= 2
            for state in d["state"].values():
                state["exp_avg"] = state["exp_avg"] * 2
            return d

        o.register_load_state_dict_pre_hook(halve)
        saved = copy.deepcopy(o.state_dict())
        assert saved["more"] == 1
        o.load_state_dict(saved)
    assert seen == ["save", "loaded"] * 2
    assert pair.ours.param_groups[0]["lr"] == 0.05
    pair.step(2)
    pair.check()
    check_state(pair)


# Hooks, closures, autograd


@by_rule
def test_step_hooks(kind, options):
    pair = twins(kind, options)
    calls = []
    handles = [
        pair.ours.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o))),
        pair.ours.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o))),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append(("all", o))),
    ]
    try:
        pair.give()
        pair.ours.step()
    finally:
        for h in handles:
            h.remove()
    assert [name for name, _ in calls] == ["all", "pre", "post"]
    assert all(o is pair.ours for _, o in calls)
    pair.ours.step()
    assert len(calls) == 3


def test_a_pre_hook_may_change_what_is_stepped():
    pair = twins("SGD", {"lr": 0.1}, [randn(9), randn(4, 4)])
    for o in (pair.ours, pair.theirs):

        def clip(o, args, kwargs):
            torch.nn.utils.clip_grad_norm_(o.param_groups[0]["params"], 0.1)

        o.register_step_pre_hook(clip)
        o.register_step_pre_hook(lambda o, args, kwargs: o.param_groups[0].update(lr=0.7))
    pair.step(2)
    pair.check()


def test_gradients_hooked_after_accumulation():
    # An optimizer a parameter, stepped in its backward: each has a plan of its own.
    params = [randn(9).requires_grad_() for _ in range(3)]
    others = [p.detach().clone().requires_grad_() for p in params]
    for of, kind in ((params, AdamW), (others, torch.optim.AdamW)):
        optimizers = {p: kind([p], lr=0.1) for p in of}

        def hook(p, optimizers=optimizers):
            optimizers[p].step()
            p.grad = None

        for p in of:
            p.register_post_accumulate_grad_hook(hook)
        for _ in range(3):
            sum(p.sin().sum() for p in of).backward()
    torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-13)


@by_rule
def test_closure(kind, options):
    pair = twins(kind, options, [randn(9)])

    def closure(p, optimizer):
        def call():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        return call

    for _ in range(3):
        with torch.no_grad():
            a = pair.ours.step(closure(pair.params[0], pair.ours))
        b = pair.theirs.step(closure=closure(pair.their_params[0], pair.theirs))
        torch.testing.assert_close(a, b)
    pair.check()
    assert pair.ours.step() is None


def test_a_closure_that_raises_changes_nothing():
    p = randn(9).requires_grad_()
    p.grad = torch.ones_like(p)
    before = p.detach().clone()

    def closure():
        raise KeyError("mine")

    optimizer = AdamW([p])
    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert torch.equal(p, before)
    assert not optimizer.state


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("dense", [True, False])
def test_a_graph_kept_beyond_the_step_is_spoilt_as_with_torch(kind, backend, dense):
    for make in (lambda p: KINDS[kind][0](p, backend=backend), KINDS[kind][1]):
        p = (randn(4, 5) if dense else strided(4, 5)).requires_grad_()
        optimizer = make([p])
        loss = p.square().sum()
        loss.backward(retain_graph=True)
        version = p._version
        optimizer.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_no_graph_is_recorded():
    p = randn(5).requires_grad_()
    optimizer = AdamW([p], ema_decay=0.5)
    loss = p.square().sum()
    (p.grad,) = torch.autograd.grad(loss, p, create_graph=True)
    optimizer.step()
    assert p.is_leaf
    assert p.grad_fn is None
    assert not any(value.requires_grad for value in optimizer.state[p].values())


def test_step_under_inference_mode():
    pair = twins("AdamW", {"lr": 0.1})
    pair.step()
    pair.give()
    with torch.inference_mode():
        pair.ours.step()
        pair.theirs.step()
    pair.step()
    pair.check()


def test_two_optimizers_on_the_same_parameters():
    p, q = randn(70).requires_grad_(), None
    q = p.detach().clone().requires_grad_()
    ours = [AdamW([p], lr=0.1), SGD([p], lr=0.1, momentum=0.9)]
    theirs = [
        torch.optim.AdamW([q], lr=0.1, foreach=False),
        torch.optim.SGD([q], lr=0.1, momentum=0.9, foreach=False),
    ]
    for _ in range(3):
        g = randn(70)
        p.grad, q.grad = g.clone(), g.clone()
        for o in (*ours, *theirs):
            o.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_averaged_model_beside_the_optimizer():
    models = [nn.Linear(3, 2).to(DEVICE, torch.float64)]
    models.append(copy.deepcopy(models[0]))
    averages = []
    for m, kind in zip(models, (AdamW, torch.optim.AdamW), strict=True):
        optimizer, average = kind(m.parameters(), lr=0.1), AveragedModel(m)
        for _ in range(3):
            m(torch.ones(2, 3, dtype=torch.float64, device=DEVICE)).sum().backward()
            optimizer.step()
            average.update_parameters(m)
        averages.append(list(average.parameters()))
    torch.testing.assert_close(*averages)


def test_profiles_name_the_step_as_torchs():
    p = randn(5).requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p])
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {e.key for e in profile.key_averages()}


# torch.compile


@by_rule
def test_compiled_step(kind, options):
    torch._dynamo.reset()
    pair = twins(kind, options, [randn(3, 5), randn(70)])
    counter = CompileCounter()
    compiled = torch.compile(pair.ours.step, backend=counter)
    for lr in (0.1, 0.1, 0.05, 0.02):
        for optimizer in (pair.ours, pair.theirs):
            optimizer.param_groups[0]["lr"] = lr
        pair.give()
        compiled()
        pair.theirs.step()
    pair.check()
    check_state(pair)
    assert counter.frame_count == 0  # it is called, not traced
    torch._dynamo.reset()


def test_compiled_training_step():
    torch._dynamo.reset()
    models = [nn.Linear(5, 3).to(DEVICE, torch.float64)]
    models.append(copy.deepcopy(models[0]))
    x = randn(4, 5)

    def training(model, optimizer):
        def step():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    steps = [
        torch.compile(training(models[0], AdamW(models[0].parameters(), lr=0.1)), backend="eager"),
        training(models[1], torch.optim.AdamW(models[1].parameters(), lr=0.1, foreach=False)),
    ]
    for _ in range(4):
        a, b = (step() for step in steps)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        list(models[0].parameters()), list(models[1].parameters()), rtol=1e-10, atol=1e-11
    )
    torch._dynamo.reset()


# torch.amp.GradScaler


def scaled_training(kind, options, amp, fused, dtype=torch.float64):
    """The models and optimizers after steps of a scaled loss, one of them with an infinity."""
    torch.manual_seed(3)
    first = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(DEVICE, dtype)
    models = [first, copy.deepcopy(first)]
    ours, theirs = KINDS[kind]
    optimizers = [
        ours(models[0].parameters(), **options, fused=fused),
        theirs(models[1].parameters(), **options),
    ]
    scalers = [
        torch.amp.GradScaler(device=DEVICE, init_scale=1024.0, growth_interval=2) for _ in models
    ]
    for step in range(6):
        x = randn(4, 5).to(dtype)
        for m, o, s in zip(models, optimizers, scalers, strict=True):
            o.zero_grad()
            loss = m(x).square().mean()
            s.scale(loss).backward()
            if step in (0, 3):
                next(m.parameters()).grad.view(-1)[3] = float("inf") if step else float("nan")
            if amp == "unscale_":
                s.unscale_(o)
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            grad = [p.grad.clone() for p in m.parameters()]
            s.step(o)
            s.update()
            if o is optimizers[0] and fused:
                assert all(
                    torch.equal(p.grad.nan_to_num(), g.nan_to_num())
                    for p, g in zip(m.parameters(), grad, strict=True)
                )
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert not hasattr(optimizers[0], "grad_scale")
    assert not hasattr(optimizers[0], "found_inf")
    return models, optimizers


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("amp", ["step", "unscale_"])
@by_rule
def test_grad_scaler(kind, options, amp, fused):
    models, optimizers = scaled_training(kind, options, amp, fused)
    torch.testing.assert_close(
        list(models[0].parameters()), list(models[1].parameters()), rtol=1e-9, atol=1e-10
    )
    for p in models[0].parameters():
        assert int(optimizers[0].state[p].get("step", 4)) == 4


def test_grad_scaler_beside_torchs_fused():
    fused = {**KINDS, "AdamW": (AdamW, lambda p, **o: torch.optim.AdamW(p, fused=True, **o))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "AdamW", fused["AdamW"])
        models, optimizers = scaled_training("AdamW", {"lr": 0.1}, "step", True)
    torch.testing.assert_close(
        list(models[0].parameters()), list(models[1].parameters()), rtol=1e-9, atol=1e-10
    )
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        own, their = optimizers[0].state[p], optimizers[1].state[q]
        assert float(own["step"]) == float(their["step"]) == 4


def test_a_disabled_grad_scaler():
    pair = twins("AdamW", {"lr": 0.1})
    scaler = torch.amp.GradScaler(device=DEVICE, enabled=False)
    pair.give()
    scaler.step(pair.ours)
    scaler.update()
    pair.theirs.step()
    pair.check()


def test_autocast_training():
    torch.manual_seed(3)
    models = [nn.Linear(5, 7).to(DEVICE)]
    models.append(copy.deepcopy(models[0]))
    for m, kind in zip(models, (AdamW, torch.optim.AdamW), strict=True):
        optimizer = kind(m.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                loss = m(torch.ones(4, 5, device=DEVICE)).float().square().mean()
                loss.backward()
                optimizer.step()  # inside of it too
    torch.testing.assert_close(*(list(m.parameters()) for m in models), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_a_default_device_is_not_the_parameters(rounding):
    with torch.device("meta"):
        params = [torch.ones(5, dtype=torch.bfloat16, device=DEVICE).requires_grad_()]
        optimizer = AdamW(
            params, lr=0.5, rounding=rounding, ema_decay=0.5, max_grad_norm=1.0, betas=(0.0, 0.0)
        )
        optimizer.step()
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        norm = optimizer.grad_norm
    assert float(norm) == pytest.approx(5**0.5)
    assert (params[0] < 0.1).all()
    assert {v.device.type for v in optimizer.state[params[0]].values()} == {DEVICE}


# What a plan keeps


def test_gradients_are_not_kept_alive():
    p = nn.Parameter(randn(8))
    optimizer = AdamW([p])
    for _ in range(2):
        p.grad = randn(8)
        gradient = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert gradient() is None


def test_a_momentum_of_torchs_survives_a_skipped_first_step_of_ours():
    p, q = nn.Parameter(torch.ones(2, device=DEVICE)), nn.Parameter(torch.ones(2, device=DEVICE))
    ours = SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    p.grad = torch.ones(2, device=DEVICE)
    ours.found_inf = torch.ones(1, device=DEVICE)
    ours.step()
    del ours.found_inf
    theirs.load_state_dict(ours.state_dict())
    q.grad = torch.ones(2, device=DEVICE)
    theirs.step()
    theirs.step()
    p.data.copy_(q.data)
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q)


def test_state_dict_hooks_may_wrap_the_result():
    optimizer = SGD([nn.Parameter(randn(2))], momentum=0.9)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"optimizer": state_dict})
    assert set(optimizer.state_dict()) == {"optimizer"}
    assert set(copy.deepcopy(optimizer).state_dict()) == {"param_groups", "state"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_infinity_stays_one_beside_its_compensation(dtype):
    p = nn.Parameter(torch.full((3,), torch.finfo(dtype).max, dtype=dtype, device=DEVICE))
    optimizer = SGD([p], lr=1.0, rounding="kahan")
    for _ in range(2):
        p.grad = torch.full_like(p, -torch.finfo(dtype).max / 2)
        optimizer.step()
    assert (p == torch.inf).all()


def test_an_average_that_is_no_longer_kept_is_not_swapped_in():
    p = nn.Parameter(randn(2))
    optimizer = AdamW([p], ema_decay=0.5)
    p.grad = randn(2)
    optimizer.step()
    optimizer.param_groups[0]["ema_decay"] = None
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"^AdamW: no average"):
        optimizer.swap_in_ema()
