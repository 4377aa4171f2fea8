"""The growth curves: that every size is there, that what is left out has a reason, and values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import growth
from reg_kernels import backends, bench, nn

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCOPE = bench.Scope(CPU, (torch.float32, torch.bfloat16))
TINY = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
pytestmark = pytest.mark.usefixtures("one_thread")
OURS = backends.choose("dropout", "cpu", torch.float32)
BY_SIZE = {
    "batch_norm_act relu forward+backward",
    "cross_entropy labels forward+backward",
    "dropout backward",
    "dropout forward",
    "mixup forward",
    "optimizer_step AdamW",
}
BY_TENSORS = {"AdamW by tensors", "SGDW by tensors"}


def curves(cases: list[bench.Benchmark]) -> dict[str, list[bench.Benchmark]]:
    result: dict[str, list[bench.Benchmark]] = {}
    for case in cases:
        result.setdefault(case.series, []).append(case)
    return result


def rows(case: bench.Benchmark) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in bench.measure(case, CPU, TINY)["contenders"]}


def test_the_curves_have_every_size():
    cases = growth.cases(SCOPE)
    found = curves(cases)
    assert found.keys() == BY_SIZE | BY_TENSORS
    for series in BY_SIZE:
        sizes = [math.prod(case.shape) for case in found[series]]
        assert sizes == [2**power for power in range(10, 29, 2)], series
        assert not any(case.tensors for case in found[series])
    for series in BY_TENSORS:
        assert [case.tensors for case in found[series]] == [1, 10, 100, 1000, 10_000]
        assert all(case.shape == (64 * case.tensors,) for case in found[series])
    assert len({case.label for case in cases}) == len(cases)
    assert all(case.dtype == torch.float32 and not case.goals for case in cases)


@pytest.mark.parametrize("series", sorted(BY_SIZE | BY_TENSORS))
def test_a_point_has_ours_eager_and_the_copy(series: str):
    for case in curves(growth.cases(SCOPE))[series][:3]:
        found = rows(case)
        assert set(found) == {"copy", OURS, "eager"}
        assert all("seconds" in row for row in found.values()), found
        assert "speedup_over_eager" in found[OURS]


@pytest.mark.parametrize(
    ("owner", "layer"), [(torch.nn, "ReLU"), (nn, "BatchNormAct2d")], ids=["eager", "ours"]
)
def test_another_activation_is_an_error(owner: Any, layer: str, monkeypatch: pytest.MonkeyPatch):
    (case, *_) = curves(growth.cases(SCOPE))["batch_norm_act relu forward+backward"]
    spoilt: dict[str, Callable[..., torch.nn.Module]] = {
        "ReLU": lambda inplace: torch.nn.LeakyReLU(inplace=inplace),
        "BatchNormAct2d": lambda *args, **options: nn.BatchNorm2d(args[0]),
    }
    monkeypatch.setattr(owner, layer, spoilt[layer])
    wrong = [name for name, row in rows(case).items() if "output is off by" in row.get("wrong", "")]
    assert wrong == ["eager" if owner is torch.nn else OURS]


def test_what_memory_does_not_hold_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growth, "_memory", lambda device: 200 * 2**20)
    last = {series: points[-1] for series, points in curves(growth.cases(SCOPE)).items()}
    for series in BY_SIZE:  # none of them makes a tensor: this machine need not hold them
        found = rows(last[series])
        assert set(found) == {OURS, "eager"}
        for row in found.values():
            assert row["skipped"].endswith("GiB, more than 80 MiB")
    # 2^20 elements of 34 bytes fit into 80 MiB, of 124 they do not.
    fits = {
        series: max(math.prod(case.shape) for case in points if case.bytes is not None)
        for series, points in curves(growth.cases(SCOPE)).items()
    }
    assert (fits["dropout forward"], fits["optimizer_step AdamW"]) == (2**20, 2**18)


def test_eager_dropout_is_left_out_where_it_takes_seconds(monkeypatch: pytest.MonkeyPatch):
    assert growth._EAGER_DROPOUT_UP_TO == 2**26
    monkeypatch.setattr(growth, "_EAGER_DROPOUT_UP_TO", 2**10)
    found = curves(growth.cases(SCOPE))
    for direction in ("forward", "backward"):
        small, large = (rows(case) for case in found[f"dropout {direction}"][:2])
        assert "seconds" in small["eager"] and "seconds" in large[OURS]
        assert large["eager"]["skipped"] == "its forward takes seconds"
    assert "seconds" in rows(found["mixup forward"][1])["eager"]


def test_a_gpu_has_the_same_curves(monkeypatch: pytest.MonkeyPatch):
    properties = argparse.Namespace(total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(backends, "choose", lambda *_: "triton")
    found = curves(growth.cases(bench.Scope(CUDA, (torch.float32, torch.bfloat16))))
    assert found.keys() == BY_SIZE | BY_TENSORS
    assert all(len(found[series]) == 10 for series in BY_SIZE)
    assert all(found[series][-1].bytes is not None for series in BY_SIZE)
