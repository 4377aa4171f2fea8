"""Averaged weights: of parameters that get no gradient, and in checkpoints, copies and models that
are made or loaded while they are swapped in."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import reg_kernels
from reg_kernels.optim import SGD, SGDW, Adam, AdamW

from support import DEVICE, DTYPE_IDS, DTYPES, implementations

on_each = pytest.mark.parametrize("backend", implementations())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kinds = pytest.mark.parametrize("kind", [AdamW, Adam, SGDW, SGD])


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, device=DEVICE).to(dtype)


# Parameters without a gradient


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        shapes = {"always": (3, 5), "early": (65,), "late": (2, 3), "never": (7,), "frozen": (4,)}
        for name, shape in (shapes | {"none": (0,)}).items():
            self.register_parameter(name, nn.Parameter(randn(*shape, dtype=dtype)))
        self.frozen.requires_grad_(False)

    def give(self, step):
        """Gradients as a layer frozen in mid-training has them, and one that is thawed."""
        for name, p in self.named_parameters():
            on = {"always": True, "early": step < 3, "late": step >= 3, "none": True}
            p.grad = torch.randn_like(p) if on.get(name, False) else None


@on_each
@dtypes
def test_every_parameter_is_averaged_at_each_step(dtype, backend):
    model = Model(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75)).to(compute)
    average.n_averaged += 1  # or its first update copies; ours starts where the weights did
    optimizer = SGD(model.parameters(), lr=0.1, ema_decay=0.75, backend=backend)
    for step in range(6):
        model.give(step)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            assert p.grad is not None or torch.equal(p, q)
        average.update_parameters(copy.deepcopy(model).to(compute))
        if step == 4:
            with torch.no_grad():  # by hand, which an average follows
                model.frozen.add_(1)
    unit = 8 * torch.finfo(dtype).eps
    for p, expected in zip(model.parameters(), average.module.parameters(), strict=True):
        ema = optimizer.state[p]["ema"]
        assert ema.dtype == compute
        torch.testing.assert_close(ema, expected.detach(), rtol=unit, atol=unit)


def test_an_average_arrives_where_a_frozen_parameter_stays():
    a, b = (nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2))
    optimizer = SGD([a, b], lr=1.0, ema_decay=0.9)
    for step in range(200):
        b.grad = torch.zeros_like(b)
        a.grad = -torch.ones_like(a) if step < 3 else None
        optimizer.step()
    assert float(a.detach()) == 3
    torch.testing.assert_close(optimizer.state[a]["ema"], a.detach(), rtol=1e-5, atol=0)


@kinds
def test_a_step_without_any_gradient_averages(kind):
    p, q = nn.Parameter(randn(5)), nn.Parameter(randn(3))
    options = {"ema_decay": 0.5, "max_grad_norm": 1.0, "rounding": "kahan"}
    optimizer = kind([{"params": [p]}, {"params": [q], "ema_decay": None}], **options)
    optimizer.step()
    assert float(optimizer.grad_norm) == 0
    assert optimizer.state.keys() == {p}
    assert optimizer.state[p].keys() == {"ema"}
    before = p.detach().clone()
    p.data.add_(2)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["ema"], before + 1)
    p.data = p.data + 1  # elsewhere
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["ema"], before + 2)


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_averages_nothing(first):
    a, b = nn.Parameter(randn(5)), nn.Parameter(randn(3))
    optimizer = AdamW([a, b], lr=0.1, ema_decay=0.5)
    if not first:
        a.grad, b.grad = randn(5), randn(3)
        optimizer.step()
    start = {p: optimizer.state.get(p, {}).get("ema", p.detach()).clone() for p in (a, b)}
    a.grad, b.grad = randn(5), None
    b.data.add_(1)
    expected = start[b] if not first else b.detach().clone()
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    assert torch.equal(optimizer.state[a]["ema"], start[a])
    assert torch.equal(optimizer.state[b]["ema"], expected)
    optimizer.found_inf.zero_()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[b]["ema"], (expected + b.detach()) / 2)


def test_what_is_only_averaged_may_be_laid_out_in_any_way():
    params = [
        nn.Parameter(randn(4, 6).t()),
        nn.Parameter(randn(4, 12)[:, ::2]),
        nn.Parameter(randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    ]
    optimizer = AdamW(params, ema_decay=0.5)
    starts = [p.detach().clone() for p in params]
    for _ in range(2):
        for p, start in zip(params, starts, strict=True):
            with torch.no_grad():
                p.copy_(start + 1)
        optimizer.step()
    for p, start in zip(params, starts, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], start + 1)
    for p, start in zip(params, starts, strict=True):
        with torch.no_grad():
            p.copy_(start + 3)
    optimizer.step()
    for p, start in zip(params, starts, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], start + 2)


def test_few_launches_and_no_write_to_what_is_only_averaged():
    params = [nn.Parameter(randn(3)) for _ in range(20)]
    optimizer = AdamW(params, ema_decay=0.5)
    loss = sum(p.square().sum() for p in params)
    for p in params[:10]:
        p.grad = randn(3)
    versions = [p._version for p in params]
    optimizer.step()
    assert len(optimizer._plan.launches.all) == 2
    assert [p._version > v for p, v in zip(params, versions, strict=True)] == [True] * 10 + [
        False
    ] * 10
    del loss


def test_uninitialised_parameters_are_averaged_from_when_they_are_there():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).to(DEVICE)
    optimizer = SGD(model.parameters(), lr=0.1, ema_decay=0.5)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    optimizer.step()
    assert model[0].weight not in optimizer.state
    model(torch.ones(4, 5, device=DEVICE))
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["ema"], model[0].weight)


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_torch_loads_a_checkpoint_with_parameters_that_were_only_averaged(ours, theirs):
    a, b = nn.Parameter(randn(5)), nn.Parameter(randn(3))
    optimizer = ours([a, b], lr=0.1, ema_decay=0.5)
    for _ in range(3):
        a.grad = randn(5)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    c, d = copy.deepcopy((a, b))
    torchs = theirs([c, d], lr=0.1, foreach=False)
    torchs.load_state_dict(copy.deepcopy(saved))
    optimizer.load_state_dict(saved)
    assert optimizer.state[b].keys() == {"ema"}  # no more than before
    for _ in range(2):
        a.grad, b.grad = randn(5), randn(3)
        c.grad, d.grad = a.grad.clone(), b.grad.clone()
        optimizer.step()
        torchs.step()
    torch.testing.assert_close([a, b], [c, d])


# While averaged weights are swapped in


def trained(kind=AdamW, **options):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(DEVICE, torch.float64)
    optimizer = kind(model.parameters(), lr=0.1, ema_decay=0.9, **options)
    train(model, optimizer, 3)
    return model, optimizer


def train(model, optimizer, steps):
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(randn(4, 3)).square().mean().backward()
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(some, others):
    assert all(map(torch.equal, some, others))


@kinds
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_what_is_made_inside_goes_on_from_the_weights_that_were_swapped_out(kind, way):
    model, optimizer = trained(kind)
    own = values(model)
    with optimizer.ema_weights():
        averages = values(model)
        if way == "state_dict":
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            other, loaded = trained(kind)
            train(other, loaded, 1)
            other.load_state_dict(saved[0])
            loaded.load_state_dict(saved[1])
        elif way == "deepcopy":
            other, loaded = copy.deepcopy((model, optimizer))
        else:
            other, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    assert_same(values(other), averages)
    with pytest.raises(RuntimeError, match=r"call swap_out_ema\(\) before step\(\)"):
        loaded.step()
    loaded.swap_out_ema()
    assert_same(values(other), own)
    assert_same(values(model), own)
    train(other, loaded, 2)
    train(model, optimizer, 2)
    assert_same(values(other), values(model))
    assert not any("swapped_out" in state for state in loaded.state.values())


def test_a_state_dict_made_inside_holds_the_weights_that_were_swapped_out():
    model, optimizer = trained()
    own = values(model)
    with optimizer.ema_weights():
        state = optimizer.state_dict()["state"]
        assert_same([state[i]["swapped_out"] for i in range(len(own))], own)


def test_nothing_is_loaded_into_the_optimizer_inside():
    model, optimizer = trained()
    own, saved = values(model), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 5.0
    with optimizer.ema_weights():
        averages = values(model)
        with pytest.raises(RuntimeError, match=r"swap_out_ema\(\) before load_state_dict\(\)"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert_same(values(model), averages)
    assert_same(values(model), own)


@pytest.mark.parametrize("inference", [True, False])
def test_a_model_loaded_inside_is_not_overwritten_in_silence(inference):
    model, optimizer = trained()
    own = values(model)
    loaded = {name: p + 1 for name, p in copy.deepcopy(model.state_dict()).items()}
    changed = pytest.raises(RuntimeError, match="4 of 4 parameters were changed")
    with changed, optimizer.ema_weights(), torch.inference_mode(inference):
        model.load_state_dict(loaded)
    # Nothing is lost: what was loaded is there, and what was swapped out too.
    assert_same(values(model), loaded.values())
    other, copied = copy.deepcopy((model, optimizer))
    optimizer.swap_out_ema(changed="keep")
    assert_same(values(model), loaded.values())
    train(model, optimizer, 1)
    copied.swap_out_ema(changed="restore")
    assert_same(values(other), own)


@pytest.mark.parametrize("changed", ["keep", "restore"])
def test_what_becomes_of_changes_can_be_said_beforehand(changed):
    model, optimizer = trained()
    own = values(model)
    with optimizer.ema_weights(changed=changed), torch.no_grad():
        model[0].weight.zero_()
    expected = [torch.zeros_like(own[0]) if changed == "keep" else own[0], *own[1:]]
    assert_same(values(model), expected)
    with pytest.raises(ValueError, match="changed must be keep, restore or None, got 'drop'"):
        optimizer.swap_out_ema(changed="drop")


def test_a_model_that_is_moved_inside_comes_back():
    model, optimizer = trained()
    own = values(model)
    with optimizer.ema_weights():
        model.to(torch.float32)  # other data, which is not taken for a change of values
        model.to(torch.float64)
    assert_same(values(model), own)


def test_evaluating_changes_nothing():
    model, optimizer = trained()
    own = values(model)
    with optimizer.ema_weights():
        model.eval()
        with torch.no_grad():
            model(randn(4, 3))
        model(randn(4, 3)).sum().backward()
        model.state_dict()
    assert_same(values(model), own)


# BatchNorm beside averaged weights


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_torchs_update_bn_makes_statistics_of_the_averages(fuse, momentum):
    torch.manual_seed(5)
    plain = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU()),
    ).to(DEVICE, torch.float64)
    model = reg_kernels.convert(plain, fuse=fuse)
    optimizer = AdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    batches = [randn(5, 3, 6, 6) for _ in range(4)]
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with optimizer.ema_weights():
        update_bn(batches, model)
        plain.load_state_dict(model.state_dict())
        update_bn(batches, plain)
        torch.testing.assert_close(model.state_dict(), plain.state_dict())
        model.eval(), plain.eval()
        torch.testing.assert_close(model(batches[0]), plain(batches[0]))
        assert not torch.equal(model.state_dict()["1.running_mean"], buffers["1.running_mean"])
    model.load_state_dict(buffers, strict=False)
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
