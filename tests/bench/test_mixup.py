"""Mixup's benchmarks: which there are, and that what computes something else is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reg_kernels import backends, bench
from reg_kernels import functional as fused
from reg_kernels.bench import mixup
from reg_kernels.bench._measure import BOTH, FORWARD

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEFAULT = (torch.float32, torch.bfloat16)
TINY = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
SHAPE = (5, 3, 9, 7)
KINDS = (mixup.MIXED, mixup.BYTES, mixup.PASTED)
POINTS = [*((kind, FORWARD) for kind in KINDS), (mixup.MIXED, BOTH)]


def names(value: object) -> str:
    return (value.variant or "mixup") if isinstance(value, mixup.Kind) else str(value)


def rows(kind: mixup.Kind, direction: str, compiled: bool = False) -> dict[str, dict[str, Any]]:
    scope = bench.Scope(CPU, (torch.float32,), compiled=compiled)
    subject = mixup._case(scope, kind, direction, torch.float32, SHAPE)
    return {row["name"]: row for row in bench.measure(subject, CPU, TINY)["contenders"]}


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("kind", "direction"), POINTS, ids=names)
def test_every_contender_mixes(kind: mixup.Kind, direction: str, layout: str, dtype: torch.dtype):
    scope = bench.Scope(CPU, (dtype,), compiled=False)
    subject = mixup._case(scope, kind, direction, dtype, SHAPE, layout)
    found = set()
    for entry in bench.contenders(subject, CPU):
        if isinstance(entry, bench.Contender):
            with entry.within():
                entry.check()
                entry.call(0)
            found.add(entry.name)
    assert {"copy", "reference", "eager"} <= found


@pytest.mark.parametrize(("kind", "direction"), POINTS, ids=names)
def test_the_compiled_one_is_measured_and_right(kind: mixup.Kind, direction: str):
    found = rows(kind, direction, compiled=True)
    assert len(found["compile"]["seconds"]) == 3, found["compile"]
    assert ("kept_bytes" in found["eager"]) is (direction == BOTH)


def test_both_ways_to_cut_and_paste_are_one():
    x, index = torch.randn(SHAPE), torch.randperm(5)
    boxes = torch.tensor([[0, 0, 7, 9], [1, 2, 1, 5], [6, 8, 7, 9], [0, 3, 4, 4], [2, 0, 7, 8]])
    assert torch.equal(mixup._paste(x, index, boxes), mixup._select(x, index, boxes))


# What is wrong is found


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (mixup.MIXED, lambda x, lam, index, **o: fused.mixup(x, 1 - lam, index, **o)),
        (mixup.MIXED, lambda x, lam, index, **o: fused.mixup(x, lam, index.argsort(), **o)),
        (mixup.MIXED, lambda x, lam, index, **o: fused.mixup(x, lam, index, **o) * 1.000002),
        (mixup.MIXED, lambda x, lam, index, **o: fused.mixup(x, 1.0, index, **o)),
        (mixup.BYTES, lambda x, lam, index, mean, **o: fused.mixup(x, lam, index, **o)),
        (mixup.BYTES, lambda x, lam, index, std, **o: fused.mixup(x, lam, index, **o)),
        (mixup.BYTES, lambda x, lam, index, **o: fused.mixup(x, 0.301, index, **o)),
    ],
    ids=["the other lambda", "the inverse", "scale", "unmixed", "no mean", "no std", "lambda"],
)
def test_another_blend_is_an_error(
    kind: mixup.Kind, spoil: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
):
    right = fused.mixup
    double = dataclasses.make_dataclass("Double", [("mixup", Any)])
    monkeypatch.setattr(mixup, "fused", double(spoil))
    torch.manual_seed(1)  # the permutation is not its own inverse
    found = rows(kind, FORWARD)
    assert "output is off by" in found["reference"]["wrong"]
    assert "seconds" not in found["reference"] and "seconds" in found["eager"]
    assert fused.mixup is right


@pytest.mark.parametrize(
    ("start", "end"), [((1, 0), (0, 0)), ((0, -1), (0, 0)), ((0, 0), (1, 0)), ((0, 0), (0, 1))]
)
def test_another_box_is_an_error(start: tuple[int, int], end: tuple[int, int]):
    x, index = torch.randn(SHAPE), torch.randperm(5)
    index = torch.where(index == torch.arange(5), (index + 1) % 5, index)
    boxes = torch.tensor([[2, 3, 5, 6]] * 5)
    y = fused.cutmix(x, boxes + torch.tensor([*start, *end]), index, backend="reference")
    with pytest.raises(bench.WrongValues, match="output is off by"):
        mixup.check_values("it", mixup.PASTED, torch.float32, (x, index, boxes), y)


@pytest.mark.parametrize(
    "spoil",
    [lambda g: g * 1.00001, lambda g: g.flip(0), lambda g: g.masked_fill(g == g.max(), torch.nan)],
)
def test_another_gradient_is_an_error(spoil: Callable[[Tensor], Tensor]):
    x, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    index = torch.tensor([1, 2, 3, 4, 0])
    y = fused.mixup(x, mixup.LAM, index, backend="reference")
    (gradient,) = torch.autograd.grad(y, x, grad)
    mixup.check_gradient("it", index, grad, gradient)
    with pytest.raises(bench.WrongValues, match="gradient is off by"):
        mixup.check_gradient("it", index, grad, spoil(gradient))
    with pytest.raises(bench.WrongValues, match="gradient is off by"):
        mixup.check_gradient("it", index.argsort(), grad, gradient)


# Which there are


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_the_cases_cover_what_is_promised(device: torch.device):
    cases = mixup.cases(bench.Scope(device, DEFAULT))
    found = {case.label: [goal.text for goal in case.goals] for case in cases}
    size = "float32 128×3×224×224"
    smaller = {label for label in found if "128×3×32×32" in label or "8×3×8×8" in label}
    assert not any(found[label] for label in smaller)
    assert {label: found[label] for label in found.keys() - smaller} == {
        f"mixup forward {size} no grad": [
            "at least 4 times eager's speed",
            "at least 1.3 times torch.compile's speed",
        ],
        f"mixup from uint8 forward {size} no grad": [
            "at least 12 times eager's speed",
            "at least 1.4 times torch.compile's speed",
            *["at most 0.96 of copy_'s time: 0.6 of that for the result"][: device == CPU],
        ],
        f"mixup cutmix forward {size} no grad": [],
        f"mixup forward+backward {size}": [],
    }
    full = mixup.cases(bench.Scope(device, backends.DTYPES, everything=True))
    labels = {case.label for case in full}
    assert len(labels) == len(full) and found.keys() < labels
    size = "bfloat16 128×3×224×224 channels_last"
    assert {f"mixup forward {size} no grad", f"mixup forward+backward {size}"} < labels
    assert "mixup forward float32 8×3×8×8 no grad host time" in labels


@pytest.mark.parametrize(
    ("kind", "direction", "dtype", "size"),
    [
        (mixup.MIXED, FORWARD, torch.float32, 8),
        (mixup.MIXED, BOTH, torch.float32, 16),
        (mixup.PASTED, FORWARD, torch.bfloat16, 4),
        (mixup.BYTES, FORWARD, torch.float32, 5),
        (mixup.BYTES, FORWARD, torch.bfloat16, 3),
    ],
    ids=names,
)
def test_bytes_of_an_element(kind: mixup.Kind, direction: str, dtype: torch.dtype, size: int):
    subject = mixup._case(bench.Scope(CPU, (dtype,)), kind, direction, dtype, SHAPE)
    assert subject.bytes == size * 5 * 3 * 9 * 7
