"""BatchNorm's benchmarks: which there are, and that what computes something else is found."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reg_kernels import backends, bench
from reg_kernels.bench import _ways, batch_norm
from reg_kernels.bench._measure import BACKWARD, BOTH, FORWARD

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
DEFAULT = (torch.float32, torch.bfloat16)
KINDS = (batch_norm.PLAIN, batch_norm.DROPPED, batch_norm.ADDED, batch_norm.FROZEN)


def names(kind: batch_norm.Kind) -> str:
    return kind.variant or kind.op


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((48, 7), "contiguous"), ((32, 9, 5, 5), "contiguous"), ((32, 9, 5, 5), "channels_last")],
)
@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_every_contender_computes_it(
    kind: batch_norm.Kind, shape: tuple[int, ...], layout: str, dtype: torch.dtype
):
    scope = bench.Scope(CPU, (dtype,), compiled=False)
    for direction in (FORWARD, BACKWARD, BOTH) if kind.training else (FORWARD,):
        subject = batch_norm._case(scope, kind, dtype, shape, direction, layout)
        for entry in bench.contenders(subject, CPU):
            if isinstance(entry, bench.Contender):
                with entry.within():
                    entry.check()
                    entry.call(0)


@pytest.mark.parametrize("direction", [BACKWARD, BOTH])
def test_the_compiled_chain_is_measured_and_right(direction: str):
    scope = bench.Scope(CPU, (torch.float32,))
    subject = batch_norm._case(scope, batch_norm.DROPPED, torch.float32, (64, 5), direction)
    budget = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
    rows = {row["name"]: row for row in bench.measure(subject, CPU, budget)["contenders"]}
    assert len(rows["compile"]["seconds"]) == 3, rows["compile"]
    assert ("kept_bytes" in rows["eager"]) is (direction == BOTH)
    assert all("peak_bytes" in row for row in rows.values() if "seconds" in row)


# Which there are


def labels(scope: bench.Scope) -> dict[str, list[str]]:
    cases = batch_norm.cases(scope)
    result = {case.label: [goal.text for goal in case.goals] for case in cases}
    assert len(result) == len(cases)
    return result


def test_the_cases_cover_what_is_promised():
    found = labels(bench.Scope(CPU, DEFAULT))
    host = "at most {} of nn.BatchNorm1d's time"
    assert found["batch_norm forward float32 32×16 no grad host time"] == [host.format(1.5)]
    for direction in ("forward", "forward+backward"):
        assert found[f"batch_norm {direction} float32 32×16 host time"] == [host.format(1.2)]
    for shape in ("64×64×56×56", "4096×512"):
        assert found[f"batch_norm forward+backward float32 {shape}"] == [
            "at least 2.2 times eager's speed",
            "at least 1.5 times torch.compile's speed",
        ]
    step = "forward+backward float32 64×64×56×56"
    assert found[f"batch_norm {step} channels_last"] == ["at least 1.4 times eager's speed"]
    for size in ("64×64×56×56", "64×64×56×56 channels_last", "4096×512"):
        assert found[f"batch_norm_act relu+dropout forward+backward float32 {size}"] == [
            "keeps x and one bit an element",
            "at least 10 times eager's speed",
        ]
        assert f"batch_norm_act residual+relu forward+backward float32 {size}" in found
        assert f"batch_norm forward+backward bfloat16 {size}" in found
        assert f"batch_norm_inference forward float32 {size} no grad" in found
    assert found.keys() < labels(bench.Scope(CPU, backends.DTYPES, everything=True)).keys()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    properties = argparse.Namespace(total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def test_the_gpu_cases_cover_what_is_promised(gpu: argparse.Namespace):
    found = labels(bench.Scope(CUDA, DEFAULT))
    assert not any("float32" in label for label in found if "host time" not in label)
    for channels in ("64×112×112", "256×56×56", "2048×7×7"):
        for layout in ("", " channels_last"):
            size = f"bfloat16 64×{channels}{layout}"
            assert found[f"batch_norm forward {size}"] == ["at least 0.85 of the floor"]
            for batch in (64, 256):
                size = f"bfloat16 {batch}×{channels}{layout}"
                assert found[f"batch_norm forward+backward {size}"] == [
                    "at least 1.5 times eager's speed",
                    "at least 1.2 times torch.compile's speed",
                ]
    assert found["batch_norm forward+backward bfloat16 8×3×1024×1024"] == []
    chain = found["batch_norm_act relu+dropout forward+backward bfloat16 64×256×56×56"]
    assert chain[1:] == ["at least 2.5 times eager's speed"]
    assert found["batch_norm forward float32 32×16 host time"] == [
        "at most 1.3 of nn.BatchNorm1d's time"
    ]
    assert found.keys() < labels(bench.Scope(CUDA, DEFAULT, everything=True)).keys()
    gpu.total_memory = 2**30
    assert not any("64×112×112" in label for label in labels(bench.Scope(CUDA, DEFAULT)))


@pytest.mark.parametrize(
    ("device", "kind", "transfers"),
    [
        (CPU, batch_norm.PLAIN, {FORWARD: 3, BACKWARD: 5, BOTH: 8}),
        (CPU, batch_norm.FROZEN, {FORWARD: 2}),
        (CPU, batch_norm.DROPPED, {FORWARD: 3 + 1 / 32, BACKWARD: 5 + 2 / 32}),
        (CPU, batch_norm.ADDED, {FORWARD: 4 + 1 / 32, BACKWARD: 6 + 2 / 32}),
        (CUDA, batch_norm.PLAIN, {FORWARD: 2, BACKWARD: 3, BOTH: 5}),
        (CUDA, batch_norm.ADDED, {FORWARD: 3 + 1 / 32, BACKWARD: 4 + 1 / 32}),
    ],
)
def test_bytes_of_a_float(
    device: torch.device, kind: batch_norm.Kind, transfers: dict[str, float], gpu: Any
):
    for direction, count in transfers.items():
        assert batch_norm._bytes(device, kind, torch.float32, (32, 64), direction) == (
            count * 32 * 64 * 4
        )


def test_bytes_of_what_the_chip_does_not_hold(gpu: Any):
    def transfers(direction: str, elements: int) -> float:
        shape, dtype = (elements // 64, 64), torch.bfloat16
        return batch_norm._bytes(CUDA, batch_norm.PLAIN, dtype, shape, direction) / elements / 2

    chip = 132 * 230 * 1024 // 2
    assert transfers(FORWARD, chip) == 2 and transfers(FORWARD, chip + 64) == 3
    assert transfers(BACKWARD, chip // 2) == 3 and transfers(BACKWARD, chip // 2 + 64) == 5


# What is wrong is found


class Spoilt(torch.nn.BatchNorm1d):
    """BatchNorm1d whose results are spoilt in place; `before` are its statistics before a call."""

    def __init__(self, spoil: Callable[[Any, Tensor, dict[str, Tensor]], object]) -> None:
        super().__init__(16)
        self._spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        y = super().forward(x)
        with torch.no_grad():
            self._spoil(self, y, before)
        return y


def biased(layer: Spoilt, y: Tensor, before: dict[str, Tensor]) -> None:
    """32 values a channel: their biased variance is 31/32 of what counts."""
    moved = layer.running_var - 0.9 * before["running_var"]
    layer.running_var.sub_(moved / 32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda layer, y, before: y.mul_(1.001), "output is off by"),
        (lambda layer, y, before: y.add_(1e-3), "output is off by"),
        (lambda layer, y, before: y[3, 5].fill_(torch.nan), "output is off by nan"),
        (lambda layer, y, before: layer.running_mean.add_(1e-3), "running mean is off by"),
        (lambda layer, y, before: layer.running_var.copy_(before["running_var"]), "variance is"),
        (biased, "running variance is off by"),
        (lambda layer, y, before: layer.num_batches_tracked.add_(1), "counted as 2 batches"),
        (lambda layer, y, before: layer.num_batches_tracked.zero_(), "counted as 0 batches"),
    ],
    ids=["scale", "shift", "nan", "mean", "still", "biased", "twice", "uncounted"],
)
def test_a_forward_that_computes_something_else_is_an_error(
    spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.nn, "BatchNorm1d", lambda channels: Spoilt(spoil))
    scope = bench.Scope(CPU, (torch.float32,), compiled=False)
    subject = batch_norm._case(scope, batch_norm.PLAIN, torch.float32, (32, 16), FORWARD)
    budget = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
    rows = {row["name"]: row for row in bench.measure(subject, CPU, budget)["contenders"]}
    assert message in rows["eager"]["wrong"] and "seconds" not in rows["eager"]
    assert "seconds" in rows["reference"]


class Step:
    """An eager training step of a kind, and what it has to be."""

    def __init__(self, kind: batch_norm.Kind) -> None:
        torch.manual_seed(0)
        self.scale = 1 / (1 - kind.drop)
        tensors = [torch.randn(256, 16, requires_grad=True) for _ in range(1 + kind.residual)]
        self.truth = batch_norm.Truth(kind, torch.float32, *tensors)
        layer = batch_norm._layers(self.truth, (256, 16), True).eager()
        self.grad = torch.randn(256, 16)
        inputs = _ways.Inputs([tuple(tensors)], [tuple(tensors)], [self.grad])
        of = _ways.calls(layer, inputs, tuple(layer.parameters()))
        self.output, *self.gradients = of.both(0)

    def check(self, gradients: list[Tensor]) -> None:
        self.truth.check_gradients("it", self.output, self.grad, gradients, self.scale)


@pytest.mark.parametrize("kind", KINDS[:3], ids=names)
def test_each_gradient_is_checked(kind: batch_norm.Kind):
    step = Step(kind)
    step.check(step.gradients)
    # Two inputs' gradients at most, then weight's and bias's.
    words = ("x", "the residual", "weight", "bias") if kind.residual else ("x", "weight", "bias")
    assert len(words) == len(step.gradients)
    for i, what in enumerate(words):
        for wrong in (step.gradients[i] * 1.01, step.gradients[i].roll(1)):
            spoilt = [*step.gradients]
            spoilt[i] = wrong
            with pytest.raises(bench.WrongValues, match=f"gradient of {what} is off by"):
                step.check(spoilt)


def test_the_mask_of_the_chain_is_checked():
    step = Step(batch_norm.DROPPED)
    truth, y, scale = step.truth, step.output.detach(), step.scale
    truth.check_output("it", y, scale)
    whole = truth._preactivation(*truth._inputs).relu().float()
    for wrong, message in (
        (whole, "0.0000% of [0-9]+ were dropped"),
        (whole * scale, "were dropped"),
        (y * torch.nn.functional.dropout(torch.ones_like(y), 0.1), "were dropped"),
        (y / scale, "output is off by"),
    ):
        with pytest.raises(bench.WrongValues, match=message):
            truth.check_output("it", wrong.detach(), scale)
    # Another mask in the backward than the output shows.
    step.output = torch.where(torch.rand_like(y) < 0.1, 0.0, whole)
    with pytest.raises(bench.WrongValues, match="gradient of x is off by"):
        step.check(step.gradients)
