"""timm's optimizer factory with ours in it, and targets that timm's losses take."""

import copy
import sys

import pytest
import torch
from torch import nn

from reg_kernels import functional as F
from reg_kernels import optim
from reg_kernels.augment import MixedTarget, Mixup
from reg_kernels.augment.mixup import MODES
from reg_kernels.integrations.timm import register

OURS = {"adamw": optim.AdamW, "adam": optim.Adam, "sgdw": optim.SGDW, "sgd": optim.SGD}


@pytest.mark.parametrize(
    ("prefix", "error", "message"),
    [
        (3, TypeError, "register: prefix must be a str, got int"),
        ("my_", ValueError, "register: prefix must have no '_', got 'my_'"),
    ],
)
def test_bad_prefixes(prefix, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        register(prefix)


@pytest.fixture
def timm():
    """With a registry of this test's own."""
    for part in ("data", "loss", "optim", "scheduler"):
        pytest.importorskip(f"timm.{part}", exc_type=ImportError)
    timm = sys.modules["timm"]
    registry = timm.optim._optim_factory.default_registry
    kept = dict(registry._optimizers)
    yield timm
    registry._optimizers.clear()
    registry._optimizers.update(kept)


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 2))


def trained(optimizer, model):
    torch.manual_seed(3)
    for _ in range(4):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}, {"foreach": True, "eps": 1e-6}])
def test_the_factory_makes_ours_with_the_groups_and_defaults_of_its_own(timm, name, options):
    assert register() == ["rkadamw", "rkadam", "rksgdw", "rksgd"]
    found = []
    for each in (f"rk{name}", name):
        model = network()
        optimizer = timm.optim.create_optimizer_v2(
            model, each, lr=0.01, weight_decay=0.1, **options
        )
        found.append((trained(optimizer, model), optimizer.param_groups))
        if each != name:
            assert type(optimizer) is OURS[name]
    (ours, groups), (theirs, their_groups) = found
    torch.testing.assert_close(ours, theirs)
    keys = {"lr", "lr_scale", "weight_decay", "momentum", "nesterov", "betas", "eps", "param_names"}
    for group, their_group in zip(groups, their_groups, strict=True):
        assert {k: group.get(k) for k in keys} == {k: their_group.get(k) for k in keys}


def test_options_of_ours_are_passed_on_and_wrappers_and_schedules_take_it(timm):
    register()
    model = network()
    optimizer = timm.optim.create_optimizer_v2(
        model, "lookahead_rkadamw", lr=0.01, max_grad_norm=1.0, ema_decay=0.9
    )
    schedule = timm.scheduler.CosineLRScheduler(optimizer, 10, warmup_t=2, warmup_lr_init=0.0)
    trained(optimizer, model)
    assert optimizer._base_optimizer.max_grad_norm == 1.0
    assert all("ema" in state for state in optimizer.state.values())
    assert optimizer.param_groups[0]["lr"] == 0.0
    schedule.step(1)
    assert optimizer.param_groups[0]["lr"] == 0.005


def test_to_register_again_says_nothing_and_an_empty_prefix_replaces(timm, caplog):
    register()
    register()
    assert not caplog.records
    register("")
    assert len(caplog.records) == 4
    assert timm.optim.get_optimizer_class("adamw", bind_defaults=False) is optim.AdamW
    assert timm.optim.get_optimizer_info("nesterov").opt_class is torch.optim.SGD  # an alias of its


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_dense_target_is_timms(timm, mode, smoothing):
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 3, 0])
    mixup = Mixup(0.8, 1.0, mode=mode, label_smoothing=smoothing, num_classes=4, seed=3)
    _, target = copy.deepcopy(mixup)(images, labels)
    mixup.dense = True
    _, dense = mixup(images, labels)
    assert isinstance(target, MixedTarget)
    lam = target.lam if mode == "batch" else target.lam.unsqueeze(1)
    timms = timm.data.mixup.mixup_target(labels, 4, lam, smoothing)
    assert dense.dtype == timms.dtype
    torch.testing.assert_close(dense, timms, rtol=0, atol=1.5e-7)
    logits = torch.randn(6, 4)
    loss = timm.loss.SoftTargetCrossEntropy()(logits, dense)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
