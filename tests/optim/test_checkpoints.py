"""Checkpoints between ours and torch's: what torch's optimizers save is enough, and what lacks more
than options of ours is refused."""

import copy
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from reg_kernels.optim import SGD, SGDW, Adam, AdamW

from support import DEVICE

KINDS = {
    "AdamW": (AdamW, torch.optim.AdamW, {"amsgrad": True}),
    "Adam": (Adam, torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "SGDW": (SGDW, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),  # as torch's without a decay
    "SGD": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "plain SGD": (SGD, torch.optim.SGD, {"lr": 0.1}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(DEVICE, torch.float64)


def train(model, optimizer, steps, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, dtype=torch.float64, device=DEVICE)).square().mean().backward()
        optimizer.step()


# torch.distributed.checkpoint, whose default planner insists on every key of what is loaded into


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("way", ["state_dict", "get_optimizer_state_dict", "flattened"])
@pytest.mark.parametrize("direction", ["ours to torch's", "torch's to ours"])
@kinds
def test_distributed_checkpoints(kind, direction, way, tmp_path):
    ours, theirs, options = KINDS[kind]
    first, second = (ours, theirs) if direction == "ours to torch's" else (theirs, ours)
    model = network()
    optimizer = first(model.parameters(), **options)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    loaded = second(other.parameters(), **(options | {"lr": 7.0}))
    how = StateDictOptions(flatten_optimizer_state_dict=way == "flattened")

    def state(model, optimizer):
        if way == "state_dict":
            return {"optimizer": optimizer.state_dict()}
        return {"optimizer": get_optimizer_state_dict(model, optimizer, options=how)}

    dcp.save(state(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    if way == "state_dict":  # reads into state that is there
        train(other, loaded, 1)
        other.load_state_dict(model.state_dict())
    target = state(other, loaded)
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    if way == "state_dict":
        loaded.load_state_dict(target["optimizer"])
    else:
        set_optimizer_state_dict(other, loaded, target["optimizer"], options=how)
    train(model, optimizer, 2, seed=5)
    train(other, loaded, 2, seed=5)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@kinds
def test_a_state_dict_has_torchs_keys_and_no_others(kind):
    ours, theirs, options = KINDS[kind]
    made = []
    for of in (ours, theirs):
        model = network()
        optimizer = of(model.parameters(), **options)
        train(model, optimizer, 2)
        made.append((optimizer.state_dict(), optimizer))
    (own, optimizer), (their, reference) = made
    assert own["state"].keys() == their["state"].keys()
    for key, state in their["state"].items():
        assert own["state"][key].keys() == state.keys()
    for group, expected in zip(own["param_groups"], their["param_groups"], strict=True):
        assert group.keys() == expected.keys()
    assert optimizer.param_groups[0].keys() == reference.param_groups[0].keys()


# Options of ours


OPTIONS = {
    "decay": "decoupled_lr",
    "decay_lr": 0.5,
    "l1": 0.1,
    "ema_decay": 0.9,
    "rounding": "kahan",
    "state_dtype": torch.float32,
}


@pytest.mark.parametrize("kind", [AdamW, Adam, SGDW, SGD])
def test_options_in_use_are_saved_and_absent_ones_stay(kind):
    p = nn.Parameter(torch.ones(3))
    groups = [{"params": [p], "l1": 0.0, "decay_lr": None}]
    with_options, without = kind([p], **OPTIONS), kind(groups, ema_decay=0.5)
    assert OPTIONS.items() <= with_options.param_groups[0].items()
    assert without.param_groups[0].keys() & OPTIONS.keys() == {"ema_decay"}
    saved = [copy.deepcopy(o.state_dict()) for o in (with_options, without)]
    without.load_state_dict(saved[0])
    assert OPTIONS.items() <= without.param_groups[0].items()
    with_options.load_state_dict(saved[1])
    expected = OPTIONS | {"ema_decay": 0.5}
    if kind is Adam:  # whose decoupled_weight_decay says what it is to be
        del expected["decay"]
    group = with_options.param_groups[0]
    assert {k: group[k] for k in OPTIONS if k in group} == expected


def test_torchs_word_for_the_decay_comes_with_a_checkpoint():
    for decoupled in (True, False):
        for before in ("l2", "decoupled", "decoupled_lr"):
            ours = Adam([nn.Parameter(torch.ones(3))], decay=before)
            theirs = torch.optim.Adam(
                [nn.Parameter(torch.ones(3))], decoupled_weight_decay=decoupled
            )
            saved = theirs.state_dict()
            ours.load_state_dict(saved)
            (group,) = ours.param_groups
            assert group["decoupled_weight_decay"] == decoupled
            kept = before if (before != "l2") == decoupled else ["l2", "decoupled"][decoupled]
            assert ours._algorithm.decay_of(group) == kept
            del saved["param_groups"][0]["decoupled_weight_decay"]  # as torch saved it once
            ours.load_state_dict(saved)
            assert ours._algorithm.decay_of(ours.param_groups[0]) == kept


def test_a_group_follows_torchs_word_for_the_decay():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours = Adam([p], lr=0.1, weight_decay=0.5)
    theirs = torch.optim.Adam([q], lr=0.1, weight_decay=0.5)
    for decoupled in (False, True, False):
        for x, optimizer in ((p, ours), (q, theirs)):
            optimizer.param_groups[0]["decoupled_weight_decay"] = decoupled
            x.grad = torch.full((3,), 0.5)
            optimizer.step()
        torch.testing.assert_close(p, q)


# Of other optimizers


def stepped(kind, **options):
    p = nn.Parameter(torch.linspace(-1, 1, 6, device=DEVICE))
    optimizer = kind([p], **options)
    p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    return p, optimizer


def refused(optimizer, saved, error, match):
    """Loading raises and changes nothing."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [AdamW, Adam])
@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_state_that_lacks_something(kind, missing):
    _, optimizer = stepped(kind, lr=0.1, amsgrad=True)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][missing]
    refused(optimizer, saved, KeyError, f"{kind.__name__}: {missing} of parameter 0 in the")
    saved["state"][0][missing] = None
    refused(optimizer, saved, KeyError, missing)
    # As is what somebody has taken out of the state itself.
    if missing != "max_exp_avg_sq":
        p = optimizer.param_groups[0]["params"][0]
        del optimizer.state[p][missing]
        before = p.detach().clone()
        with pytest.raises(KeyError, match=missing):
            optimizer.step()
        assert torch.equal(p, before)


def test_a_group_that_counts_the_steps():
    # As apex's FusedAdam writes it.
    _, optimizer = stepped(AdamW, lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["step"]
    saved["param_groups"][0] |= {"step": 3, "bias_correction": True}
    refused(optimizer, saved, KeyError, "step of parameter 0")
    with pytest.raises(KeyError, match="step"):
        torch.optim.AdamW([nn.Parameter(torch.ones(6))]).load_state_dict(saved)


def test_state_of_another_algorithm():
    _, adam = stepped(AdamW, lr=0.1)
    _, sgd = stepped(SGD, lr=0.1, momentum=0.9)
    refused(adam, copy.deepcopy(sgd.state_dict()), KeyError, "step of parameter 0")


NUMBERS = [
    *(3, 3.0, True, np.int64(3), np.float32(3), Fraction(3), Decimal(3)),
    *(torch.tensor(3), torch.tensor([3.0], dtype=torch.float64)),
]


@pytest.mark.parametrize("step", NUMBERS, ids=lambda step: type(step).__name__)
def test_a_step_may_be_any_number_that_torch_takes(step):
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        p, optimizer = stepped(kind, lr=0.1)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"] = copy.deepcopy(step)
        optimizer.load_state_dict(saved)
        assert isinstance(optimizer.state_dict()["state"][0]["step"], torch.Tensor)
        optimizer.step()
        results.append(p)
        assert float(optimizer.state[p]["step"]) == float(step) + 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("step", ["three", [3.0], torch.ones(2)], ids=["word", "list", "two"])
def test_a_step_that_is_no_number(step):
    _, optimizer = stepped(AdamW, lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = copy.deepcopy(step)
    refused(
        optimizer, saved, ValueError, "step of parameter 0 in the state_dict must be one number"
    )


# SGD's count of steps, which tells a momentum that has not begun


def test_steps_that_were_saved_with_a_momentum_are_left_out():
    p, optimizer = stepped(SGD, lr=0.1, momentum=0.9, dampening=0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(3.0)
    optimizer.load_state_dict(saved)
    assert optimizer.state[p].keys() == {"momentum_buffer"}


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "plan"])
def test_a_momentum_whose_first_step_was_skipped_has_not_begun(way):
    p, q = (nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours, theirs = SGD([p], **options), torch.optim.SGD([q], **options)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    ours.found_inf = torch.ones((), device=DEVICE)
    ours.step()
    del ours.found_inf
    assert ours.state_dict()["state"][0].get("momentum_buffer") is None
    if way == "state_dict":
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    elif way == "deepcopy":
        p, ours = copy.deepcopy((p, ours))
        p.grad = torch.ones_like(p)
    else:
        ours.add_param_group({"params": [nn.Parameter(torch.ones(1, device=DEVICE))]})
    for _ in range(2):
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)


def test_a_momentum_that_is_put_there_has_begun():
    p, q = (nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    for x, optimizer in ((p, SGD([p], **options)), (q, torch.optim.SGD([q], **options))):
        optimizer.state[x]["momentum_buffer"] = torch.full_like(x, 3.0)
        x.grad = torch.ones_like(x)
        optimizer.step()
    torch.testing.assert_close(p, q)
