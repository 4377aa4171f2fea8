"""Bad input: torch's error type, the house's words, and nothing changed."""

import copy
import math

import pytest
import torch
from torch import nn

from reg_kernels import backends
from reg_kernels.optim import SGD, SGDW, Adam, AdamW

from support import DEVICE, implementations

IMPLEMENTATIONS = implementations()
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
KINDS = {
    "AdamW": (AdamW, torch.optim.AdamW),
    "Adam": (Adam, torch.optim.Adam),
    "SGDW": (SGDW, torch.optim.SGD),
    "SGD": (SGD, torch.optim.SGD),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def parameter(*shape, dtype=torch.float32):
    return randn(*shape, dtype=dtype).requires_grad_()


def snapshot(optimizer):
    """All that a step may change."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    params = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]
    state = {
        p: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
        for p, s in optimizer.state.items()
    }
    return copy.deepcopy(groups), params, state


def assert_unchanged(optimizer, before):
    groups, params, state = before
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    for group, kept in zip(optimizer.param_groups, params, strict=True):
        for p, q in zip(group["params"], kept, strict=True):
            assert torch.equal(p.detach().nan_to_num(), q.nan_to_num())
    assert optimizer.state.keys() == state.keys()
    for p, kept in state.items():
        assert optimizer.state[p].keys() == kept.keys()
        for name, value in kept.items():
            assert torch.equal(optimizer.state[p][name], value), name


# At construction

NEGATIVE = [("lr", -1), ("lr", math.nan), ("weight_decay", -0.5), ("l1", -0.1), ("l1", math.nan)]


@kinds
@pytest.mark.parametrize(("option", "value"), NEGATIVE)
def test_negative_options(kind, option, value):
    ours, theirs = KINDS[kind]
    with pytest.raises(ValueError, match=rf"^{kind}: {option} must be at least 0, got {value}$"):
        ours([parameter(2)], **{option: value})
    if option != "l1" and not math.isnan(value):
        with pytest.raises(ValueError):
            theirs([parameter(2)], **{option: value})


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_bad_options_of_adam(kind):
    ours, theirs = KINDS[kind]
    for i, value in ((0, 1.0), (0, -0.1), (1, 1.0), (1, -1e-9), (0, math.nan), (1, 2)):
        betas = (value, 0.9) if i == 0 else (0.9, value)
        words = rf"betas\[{i}\] must be in \[0, 1\), got {value}"
        with pytest.raises(ValueError, match=f"^{kind}: {words}$"):
            ours([parameter(2)], betas=betas)
        with pytest.raises(ValueError):
            theirs([parameter(2)], betas=betas)
    with pytest.raises(ValueError, match=f"^{kind}: eps must be at least 0, got -1"):
        ours([parameter(2)], eps=-1)
    with pytest.raises(
        ValueError, match=f"^{kind}: betas must be two numbers, got .0.9, 0.99, 0.999."
    ):
        ours([parameter(2)], betas=(0.9, 0.99, 0.999))


@pytest.mark.parametrize("kind", ["SGDW", "SGD"])
def test_bad_options_of_sgd(kind):
    ours, theirs = KINDS[kind]
    with pytest.raises(ValueError, match=f"^{kind}: momentum must be at least 0, got -0.1"):
        ours([parameter(2)], momentum=-0.1)
    for options in ({"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match=f"^{kind}: nesterov must go with a momentum and zero"):
            ours([parameter(2)], nesterov=True, **options)
        with pytest.raises(ValueError):
            theirs([parameter(2)], lr=0.1, nesterov=True, **options)


@kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\) or None, got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\) or None, got -0.1"),
        ({"ema_decay": math.nan}, r"ema_decay must be in \[0, 1\) or None, got nan"),
        ({"rounding": "up"}, "rounding must be one of nearest, stochastic, kahan, got 'up'"),
        ({"decay": "l3"}, "decay must be one of decoupled, decoupled_lr, l2, got 'l3'"),
        ({"decay": "decoupled_lr", "lr": 0.0}, "decay_lr must be above 0 for"),
        ({"decay": "decoupled_lr", "decay_lr": -1.0}, "decay_lr must be above 0 for"),
        ({"state_dtype": torch.float16}, "state_dtype must be torch.float32, torch.bfloat16 or"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be at least 0, got nan"),
        ({"lr": torch.ones(2)}, "lr must be a tensor of one element, got 2"),
        ({"lr": torch.tensor(-0.5)}, "lr must be at least 0, got -0.5"),
    ],
    ids=str,
)
def test_bad_options_of_ours(kind, options, message):
    with pytest.raises(ValueError, match=rf"^{kind}: {message}"):
        KINDS[kind][0]([parameter(2)], **options)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"^backend must be one of native, triton, reference"):
        AdamW([parameter(2)], backend="cuda")


@kinds
def test_differentiable(kind):
    with pytest.raises(RuntimeError, match=f"^{kind}: differentiable must be False"):
        KINDS[kind][0]([parameter(2)], differentiable=True)


@kinds
@pytest.mark.parametrize(
    "bad",
    [
        lambda: torch.ones(3, dtype=torch.int64),
        lambda: torch.ones(3, dtype=torch.bool),
        lambda: torch.ones(3, dtype=torch.complex64).requires_grad_(),
        lambda: torch.ones(3, dtype=torch.float8_e4m3fn),
        lambda: torch.eye(3).to_sparse().requires_grad_(),
    ],
    ids=["int64", "bool", "complex64", "float8", "sparse"],
)
def test_parameters_of_other_dtypes_and_layouts(kind, bad):
    words = "parameters must be dense float64, float32, float16 or bfloat16, got .* number 1"
    with pytest.raises(RuntimeError, match=f"^{kind}: {words}"):
        KINDS[kind][0]([parameter(2), bad()])


def test_stochastic_rounding_of_float16():
    with pytest.raises(RuntimeError, match=r"^AdamW: rounding='stochastic' must go with bfloat16"):
        AdamW([parameter(2, dtype=torch.float16)], rounding="stochastic")


@kinds
@pytest.mark.parametrize(
    "params",
    [
        lambda: [],
        lambda: torch.ones(3),
        lambda: [1.0],
        lambda: [{"params": "abc"}],
        lambda: [parameter(2) * 1],
        lambda: [parameter(2), ("name", parameter(2))],
    ],
    ids=["none", "a tensor", "a number", "a word", "no leaf", "half named"],
)
def test_what_torch_refuses_is_refused_with_its_error(kind, params):
    errors = []
    for make in KINDS[kind]:
        with pytest.raises((ValueError, TypeError)) as caught:
            make(params())
        errors.append(caught.type)
    assert errors[0] is errors[1]


@kinds
def test_a_parameter_given_twice(kind):
    p = parameter(2)
    for make in KINDS[kind]:
        with pytest.raises(ValueError, match="more than one parameter group"):
            make([{"params": [p]}, {"params": [p]}])
    # torch warns, and steps it twice: one launch cannot.
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match=f"^{kind}: a parameter must come once"),
    ):
        KINDS[kind][0]([p, p])


def test_a_gradient_that_shrinks_is_refused():
    p = parameter(1000)
    optimizer = SGD([p], lr=1.0)
    p.grad = randn(1000)
    optimizer.step()
    p.grad.data = randn(2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"^SGD: a gradient must have its parameter's shape"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_bad_option_of_one_group_changes_no_other_launch():
    p, q = parameter(3), parameter(3, dtype=torch.float64)
    optimizer = AdamW([{"params": [p]}, {"params": [q]}])
    p.grad, q.grad = randn(3), randn(3, dtype=torch.float64)
    optimizer.step()
    before = snapshot(optimizer)[1:]
    for option, value in (("betas", (0.9,)), ("decay", "typo"), ("lr", "high")):
        good = dict(optimizer.param_groups[1])
        optimizer.param_groups[1][option] = value
        with pytest.raises((ValueError, TypeError)):
            optimizer.step()
        optimizer.param_groups[1].clear()
        optimizer.param_groups[1].update(good)
        assert all(map(torch.equal, before[0][0], [p])) and torch.equal(before[0][1][0], q)


def test_wrapper_subclasses_are_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    p = TwoTensor(randn(3), randn(3)).requires_grad_()
    with pytest.raises(RuntimeError, match=r"^SGD: parameters must be plain tensors"):
        SGD([p])


def test_torchs_word_for_the_decay_and_ours_must_agree():
    p = parameter(2)
    optimizer = Adam([{"params": [p], "decoupled_weight_decay": True}], weight_decay=0.1)
    p.grad = randn(2)
    optimizer.step()
    optimizer.param_groups[0]["decay"] = "l2"
    with pytest.raises(ValueError, match=r"^Adam: decoupled_weight_decay must go with decay"):
        optimizer.step()
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    optimizer.step()
    with pytest.raises(ValueError, match=r"^Adam: decoupled_weight_decay"):
        Adam([p], decoupled_weight_decay=True, decay="l2")


# A group added


@kinds
@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"weight_decay": -1.0}, ValueError),
        ({"ema_decay": 2.0}, ValueError),
        ({"params": [torch.ones(3, dtype=torch.int64)]}, RuntimeError),
        ({"params": "given already"}, ValueError),
        ({"params": [1]}, TypeError),
    ],
    ids=str,
)
def test_a_bad_group_is_not_added(kind, group, error):
    p = parameter(4)
    optimizer = KINDS[kind][0]([p], lr=0.1)
    p.grad = randn(4)
    optimizer.step()
    before = snapshot(optimizer)
    if group.get("params") == "given already":
        group = {"params": [p]}
    with pytest.raises(error):
        optimizer.add_param_group({"params": [parameter(3)]} | group)
    assert len(optimizer.param_groups) == 1
    assert_unchanged(optimizer, before)
    optimizer.step()
    q = parameter(3)
    optimizer.add_param_group({"params": [q]})
    q.grad = randn(3)
    optimizer.step()


# In a step


def prepared(kind, backend=None, steps=1, **options):
    """An optimizer of several dtypes and layouts, after a step or none."""
    params = [
        parameter(3, 5),
        parameter(4, 6, dtype=torch.float64),
        randn(4, 6)[:, ::2].requires_grad_(),
        parameter(9),
    ]
    if DEVICE == "cpu" and backend == "triton":
        params = params[::3]
    optimizer = KINDS[kind][0](params, lr=0.1, backend=backend, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p in params:
        p.grad = torch.randn_like(p)
    return params, optimizer


@on_each
@kinds
@pytest.mark.parametrize("steps", [0, 1])
def test_a_sparse_gradient_changes_nothing(kind, backend, steps):
    options = {"momentum": 0.9} if "SGD" in kind else {}
    params, optimizer = prepared(kind, backend, steps, **options)
    params[-1].grad = torch.ones(9, device=DEVICE).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"^{kind}: gradients must be dense, got sparse_coo for"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    params[-1].grad = None
    optimizer.step()  # as if nothing had happened


def test_torchs_error_for_sparse_gradients():
    p = parameter(9)
    p.grad = torch.ones(9, device=DEVICE).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        torch.optim.AdamW([p], foreach=False).step()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        AdamW([p]).step()


def test_an_embedding_with_sparse_gradients():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)).to(DEVICE)
    optimizer = Adam(model.parameters(), lr=0.1)
    model(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@kinds
@pytest.mark.parametrize("steps", [0, 2])
def test_state_of_another_shape_changes_nothing(kind, steps):
    options = {"momentum": 0.9} if "SGD" in kind else {}
    params, optimizer = prepared(kind, None, steps, **options)
    name = "momentum_buffer" if "SGD" in kind else "exp_avg"
    optimizer.state[params[-1]][name] = torch.zeros(7, device=DEVICE)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"{name} of parameter 3 .* shape \(9,\), got \(7,\)"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_backend_that_cannot_run_changes_nothing(monkeypatch, steps):
    params, optimizer = prepared("AdamW", None, steps)
    before = snapshot(optimizer)
    real = backends.why_not

    def why_not(name, device_type, dtype):
        # Of the launches only the second one's dtype cannot be run.
        if name == "native" and dtype == torch.float64:
            return "of the test"
        return real(name, device_type, dtype)

    monkeypatch.setattr(backends, "why_not", why_not)
    optimizer.backend = "native"
    with pytest.raises(backends.BackendUnavailable, match="of the test"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert params[0].grad is not None


def test_overlapping_parameters():
    # torch's loop raises half way; here the others are as they were.
    base = torch.zeros(1, device=DEVICE)
    q, p = parameter(3), base.expand(3).detach().requires_grad_()
    optimizer = AdamW([q, p], lr=1.0)
    q.grad, p.grad = randn(3), randn(3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert_unchanged(optimizer, before)


# found_inf

OPTIONS = [
    ("AdamW", {"amsgrad": True, "ema_decay": 0.9, "l1": 0.1, "max_grad_norm": 1.0}),
    ("AdamW", {"state_dtype": torch.bfloat16}),
    ("Adam", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "ema_decay": 0.9}),
    ("SGDW", {}),
]


@on_each
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_found_inf_changes_nothing(kind, options, backend, scaled):
    params, optimizer = prepared(kind, backend, 2, **options)
    before = snapshot(optimizer)
    for p in params:
        p.grad.fill_(math.nan)
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.grad_scale = torch.full((), 8.0, device=DEVICE) if scaled else None
    optimizer.step()
    assert_unchanged(optimizer, before)
    del optimizer.found_inf, optimizer.grad_scale


@on_each
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_found_inf_at_the_first_step_leaves_no_trace(kind, options, backend):
    params, optimizer = prepared(kind, backend, 0, **options)
    others = [p.detach().clone().requires_grad_() for p in params]
    fresh = KINDS[kind][0](others, lr=0.1, backend=backend, **options)
    values = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    del optimizer.found_inf
    for p, q in zip(params, values, strict=True):
        assert torch.equal(p, q)
        assert float(optimizer.state[p].get("step", torch.zeros(()))) == 0
    for _ in range(2):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        fresh.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for name, value in fresh.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_found_inf_of_16_bit_parameters(rounding):
    p = parameter(70, dtype=torch.bfloat16)
    optimizer = AdamW([p], lr=0.1, rounding=rounding, ema_decay=0.5)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = snapshot(optimizer)
    p.grad = torch.full_like(p, math.inf)
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    assert_unchanged(optimizer, before)


@on_each
def test_found_inf_of_zero_is_a_step(backend):
    params, optimizer = prepared("AdamW", backend)
    values = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    optimizer.grad_scale = torch.ones((), device=DEVICE)
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(params, values, strict=True))
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)


def test_a_skipped_first_step_does_not_stand_for_a_momentum_in_torchs():
    # torch takes any momentum_buffer for one that a gradient has gone into.
    p = torch.ones(3, requires_grad=True)
    ours = SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    p.grad = torch.full((3,), math.inf)
    ours.found_inf = torch.ones(())
    ours.step()
    del ours.found_inf
    q = torch.ones(3, requires_grad=True)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q)


# load_state_dict


@kinds
def test_a_state_dict_of_other_shapes_changes_nothing(kind):
    options = {"momentum": 0.9} if "SGD" in kind else {}
    _, optimizer = prepared(kind, None, 1, **options)
    _, other = prepared(kind, None, 1, **options)
    name = "momentum_buffer" if "SGD" in kind else "exp_avg"
    saved = other.state_dict()
    saved["state"][3][name] = torch.zeros(7, device=DEVICE)
    saved["param_groups"][0]["lr"] = 5.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"^{kind}: {name} of parameter 3 .* \(9,\), got \(7,\)"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    optimizer.step()


@kinds
def test_a_state_dict_of_other_groups_changes_nothing(kind):
    params, optimizer = prepared(kind)
    before = snapshot(optimizer)
    for groups in (
        [{"params": [p]} for p in (parameter(3, 5), parameter(4, 6))],
        [{"params": [parameter(3, 5)]}],
    ):
        saved = KINDS[kind][1](groups, lr=0.1).state_dict()
        messages = []
        for target in (optimizer, KINDS[kind][1](params, lr=0.1)):
            with pytest.raises(ValueError) as caught:
                target.load_state_dict(saved)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert_unchanged(optimizer, before)
    optimizer.step()


def test_a_load_that_failed_leaves_no_trace_in_the_next():
    params, optimizer = prepared("AdamW", None, 2)
    good = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(good)
    bad["state"][0]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(bad)
    good["state"][0]["exp_avg"] += 1
    optimizer.load_state_dict(good)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], good["state"][0]["exp_avg"])
    assert not optimizer._optimizer_load_state_dict_pre_hooks


# Memory that is not there


@on_each
def test_gradients_without_memory(backend):
    # Zeros that autograd knows of and does not store are taken at each step, as torch takes them.
    p, q = parameter(64), None
    q = p.detach().clone().requires_grad_()
    ours = AdamW([p], lr=0.1, backend=backend, max_grad_norm=1.0)
    theirs = torch.optim.AdamW([q], lr=0.1, foreach=False)
    zeros = torch._efficientzerotensor(64, device=DEVICE)
    for grad in (zeros, torch.ones(64, device=DEVICE), zeros, zeros):
        p.grad, q.grad = grad, grad.clone() / max(float(grad.norm()), 1)
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q)
    assert float(ours.grad_norm) == 0


FREED = {
    "gradient": lambda p, optimizer: p.grad,
    "parameter": lambda p, optimizer: p,
    "exp_avg": lambda p, optimizer: optimizer.state[p]["exp_avg"],
    "ema": lambda p, optimizer: optimizer.state[p]["ema"],
}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("what", FREED)
def test_what_was_freed_is_refused(what, steps):
    p, other = parameter(64), parameter(8)
    optimizer = AdamW([other, p], lr=0.1, ema_decay=0.9)
    p.grad, other.grad = randn(64), randn(8)
    for _ in range(steps):
        optimizer.step()
    if steps == 0 and what not in ("gradient", "parameter"):
        optimizer.state[p] = {
            name: torch.zeros(() if name == "step" else 64, device=DEVICE)
            for name in ("step", "exp_avg", "exp_avg_sq", "ema")
        }
    FREED[what](p, optimizer).untyped_storage().resize_(0)
    before = other.detach().clone(), copy.deepcopy(optimizer.state.get(other, {}))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=f"^AdamW: (a )?{what} .*must have memory of its own"
        ):
            optimizer.step()
    assert torch.equal(other, before[0])
    assert before[1].keys() == optimizer.state.get(other, {}).keys()


def test_an_average_of_a_parameter_that_was_freed_is_refused():
    p = parameter(64)
    optimizer = SGD([p], lr=0.1, ema_decay=0.9)
    optimizer.step()
    p.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"^SGD: a parameter must have memory of its own"):
        optimizer.step()
