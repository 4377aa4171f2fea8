"""The benchmarks of whole models: that the nets are those, and that another step is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import reg_kernels
from bench import models
from reg_kernels import backends, bench
from reg_kernels.nn import StochasticDepthBlock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
pytestmark = pytest.mark.usefixtures("one_thread")
OURS = backends.choose("batch_norm", "cpu", torch.float32)


def small(block: str = "_Basic") -> bench.Benchmark:
    """A ResNet of two stages with dropout before its head, on few images of few pixels."""

    def make() -> nn.Module:
        net = models.ResNet(getattr(models, block), (1, 1), classes=5)
        net.head = nn.Sequential(nn.Dropout(0.5), net.head)
        return net

    net = models.Net("small", make, 5, (4, 3, 16, 16), (4, 3, 16, 16))
    return models._case(CPU, net, torch.float32, "contiguous")


def rows(case: bench.Benchmark) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in bench.measure(case, CPU, TINY)["contenders"]}


# The nets


@pytest.mark.parametrize(
    ("name", "parameters", "convolutions"),
    [("resnet18", 11_689_512, 20), ("resnet50", 25_557_032, 53)],
)
def test_a_resnet_has_its_weights_and_shapes(name: str, parameters: int, convolutions: int):
    with torch.device("meta"):
        net = getattr(models, name)()
        images = torch.empty(2, 3, 224, 224)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == convolutions
    sizes = []
    for stage in net.stages:
        stage.register_forward_hook(lambda module, inputs, y: sizes.append(tuple(y.shape[2:])))
    assert net(images).shape == (2, 1000)
    assert sizes == [(56, 56), (28, 28), (14, 14), (7, 7)]


@pytest.mark.parametrize(("name", "chains"), [("resnet18", 17), ("resnet50", 49)])
def test_every_relu_of_a_resnet_is_fused(name: str, chains: int):
    with torch.device("meta"):
        net = getattr(models, name)()
    found: list[Any] = []
    reg_kernels.convert(net, fuse=True, inplace=True, report=found.append)
    (report,) = found
    assert (len(report.fused), report.apart, report.left) == (chains, [], [])
    assert len(report.swapped) == chains + {"resnet18": 3, "resnet50": 4}[name]  # the shortcuts too


def test_the_demo_trains_the_same_net_with_dropout():
    demo = models.NETS[0]
    net = demo.make()
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert net(torch.zeros(demo.batch)).shape == (64, 10)


# What contenders compute


@pytest.mark.parametrize("block", ["_Basic", "_Bottleneck"])
def test_a_step_is_measured_and_its_images_counted(block: str):
    found = rows(small(block))
    assert found.keys() == {OURS, "eager"}
    for row in found.values():
        assert row["items_per_second"] == 4 / row["median"]
    (goal,) = found[OURS]["goals"]
    assert goal["value"] == found[OURS]["speedup_over_eager"]


def test_the_peak_holds_gradients_and_activations():
    """A linear layer of 256 KiB with its gradient; the optimizer's state was there before."""
    net = models.Net(
        "line", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1024)), 1024, *2 * ((2, 1, 8, 8),)
    )
    peak = rows(models._case(CPU, net, torch.float32, "contiguous"))[OURS]["peak_bytes"]
    assert 2**18 < peak < 1.25 * 2**18


def lost_relu(model: nn.Module) -> nn.Module:
    model.stages[1][0].relu = nn.Identity()
    return model


def frozen_stages(model: nn.Module) -> nn.Module:
    for p in model.stages.parameters():
        p.requires_grad_(False)
    return model


def no_statistics(model: nn.Module) -> nn.Module:
    return model.eval()


def other_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.head[1].bias.add_(torch.arange(5.0))
    return model


@pytest.mark.parametrize(
    ("spoil", "step"), [(lost_relu, 1), (no_statistics, 1), (other_weights, 1), (frozen_stages, 2)]
)
def test_another_model_is_an_error(
    spoil: Callable[[nn.Module], nn.Module],
    step: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(models, "converted", lambda model: spoil(reg_kernels.convert(model)))
    found = rows(small())
    assert f"the loss of step {step} is" in found[OURS]["wrong"]
    assert "seconds" not in found[OURS] and "seconds" in found["eager"]


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_another_learning_rate_is_an_error(factor: float, monkeypatch: pytest.MonkeyPatch):
    ours = reg_kernels.optim.AdamW
    monkeypatch.setattr(models.optim, "AdamW", lambda p, lr: ours(p, lr=lr * factor))
    assert "the loss of step 2 is" in rows(small())[OURS]["wrong"]


def test_what_is_timed_has_dropout_and_small_steps():
    for entry in bench.contenders(small(), CPU):
        entry.check()
        stepper = entry.check.func.__self__
        model, (group,) = stepper._model, stepper._optimizer.param_groups
        (dropout,) = (m for m in model.modules() if isinstance(m, nn.Dropout))
        assert (dropout.p, dropout.training, group["lr"]) == (0.5, True, models.LR_TIMED)
        entry.call(0)
        assert all(p.grad is None for p in model.parameters())


def test_a_deep_net_skips_half_of_its_branches():
    net = models.NETS[3]
    model = net.make()
    ours = net.ours(model)
    blocks = [module for module in ours.modules() if isinstance(module, StochasticDepthBlock)]
    assert {(block.mode, block.p) for block in blocks} == {("batch", 0.5)}
    assert len(blocks) == 24
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(images), model.eval()(images))
    models.without_dropout(ours)
    assert all(block.p == 0 for block in blocks)


# Which there are


def test_the_cases_cover_what_is_promised():
    cases = models.cases(bench.Scope(CPU, (torch.float32, torch.bfloat16)))
    assert [case.label for case in cases] == [
        "model demo float32 64×1×8×8",
        *(f"model deep, {mode} skipped float32 32×3×16×16" for mode in ("batch", "subset")),
        *(
            f"model {net} float32 {batch}×3×64×64{layout}"
            for net, batch in (("resnet18", 32), ("resnet50", 16))
            for layout in ("", " channels_last")
        ),
    ]
    assert all((case.items, case.unit) == (case.shape[0], "images") for case in cases)
    assert all(case.bytes is None and case.goals for case in cases)
    full = models.cases(bench.Scope(CPU, backends.DTYPES, everything=True))
    assert len({case.label for case in full}) == len(full) == 11


def test_the_gpu_cases_cover_what_is_promised(monkeypatch: pytest.MonkeyPatch):
    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(backends, "choose", lambda *_: "native")
    scope = bench.Scope(CUDA, (torch.float32, torch.bfloat16))
    size = "128×3×224×224 channels_last"
    assert [case.label for case in models.cases(scope)] == [
        "model demo float32 64×1×8×8",
        *(f"model deep, {mode} skipped float32 256×3×32×32" for mode in ("batch", "subset")),
        *(
            f"model {net} {size}"
            for name in ("resnet18", "resnet50")
            for net in (f"{name} float32", f"{name} autocast bfloat16")
        ),
    ]
    assert all(case.wall for case in models.cases(scope))
    Properties.total_memory = 16 * 2**30
    assert len(models.cases(scope)) == 3
