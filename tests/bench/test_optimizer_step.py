"""The benchmarks of optimizers and penalties: which there are, and that wrong values are found."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reg_kernels import backends, bench, optim
from reg_kernels.bench import _clock, _measure, _report, optimizer_step, penalty
from reg_kernels.bench._measure import BOTH, FORWARD
from reg_kernels.bench.optimizer_step import OPTIONS, Kind

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEFAULT = (torch.float32, torch.bfloat16)
TINY = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
SHAPES = ((3, 5), (64,), (1,))
KINDS = [Kind(name, option) for name in ("AdamW", "SGDW") for option in ("", *OPTIONS)]
KINDS += [Kind("Adam"), Kind("SGD")]
NATIVE = backends.why_not("native", "cpu", torch.float32) is None


def step(kind: Kind, dtype: torch.dtype = torch.float32) -> bench.Benchmark:
    return optimizer_step._case(CPU, dtype, kind, SHAPES)


def rows(subject: bench.Benchmark) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in bench.measure(subject, CPU, TINY)["contenders"]}


# What contenders compute


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_contender_takes_the_step(kind: Kind, dtype: torch.dtype):
    names = set()
    for entry in bench.contenders(step(kind, dtype), CPU):
        if isinstance(entry, bench.Contender):
            with entry.within():
                entry.check()
                entry.call(0)
            names.add(entry.name)
    assert {"reference", "eager", "foreach"} <= names and ("native" in names) is NATIVE
    assert ("fused" in names) is (kind.adam or dtype.itemsize > 2)


@pytest.mark.parametrize(
    ("kind", "attribute", "value", "message"),
    [
        (Kind("AdamW"), "weight_decay", 0.0, "parameters is off by"),
        (Kind("AdamW"), "eps", 1e-2, "parameters is off by"),
        (Kind("AdamW"), "betas", (0.9, 0.99), "parameters is off by"),
        (Kind("AdamW"), "maximize", True, "parameters is off by"),
        (Kind("SGDW"), "momentum", 0.8, "parameters is off by"),
        (Kind("SGDW"), "decay", "l2", "parameters is off by"),
        (Kind("SGD"), "decay", "decoupled", "parameters is off by"),
        (Kind("Adam"), "decay", "decoupled", "parameters is off by"),
        (Kind("AdamW", "l1"), "l1", 0.0, "parameters is off by"),
        (Kind("SGDW", "clip"), "max_grad_norm", None, "parameters is off by"),
        (Kind("AdamW", "ema"), "ema_decay", 0.998, "ema is off by"),
        (Kind("AdamW", "ema"), "ema_decay", None, "there is no ema"),
    ],
)
def test_a_step_that_computes_something_else_is_an_error(
    kind: Kind, attribute: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
):
    ours = getattr(optim, kind.algorithm)

    def spoilt(params: Any, **options: Any) -> torch.optim.Optimizer:
        return ours(params, **options | {attribute: value})

    monkeypatch.setattr(optim, kind.algorithm, spoilt)
    found = rows(step(kind))
    assert message in found["reference"]["wrong"] and "seconds" not in found["reference"]
    assert "seconds" in found["fused"]


def test_moments_are_checked(monkeypatch: pytest.MonkeyPatch):
    class Spoilt(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            super().step()
            for state in self.state.values():
                state["exp_avg_sq"][-1] *= 1.01 if state["step"] == 3 else 1.0

    monkeypatch.setattr(torch.optim, "AdamW", Spoilt)
    assert "exp_avg_sq is off by 1.0" in rows(step(Kind("AdamW")))["fused"]["wrong"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_stay_finite_over_many_calls(kind: Kind):
    for entry in bench.contenders(step(kind), CPU):
        if entry.name in ("native", "fused"):
            entry.check()
            for i in range(1000):
                entry.call(i)
            params = entry.check.func.__self__._params
            assert all(bool((p.detach().abs() < 10).all()) for p in params)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_every_contender_computes_the_penalty(power: int, dtype: torch.dtype):
    for direction in (FORWARD, BOTH):
        scope = bench.Scope(CPU, (dtype,), compiled=False)
        for entry in bench.contenders(penalty._case(scope, power, dtype, direction, 65), CPU):
            if isinstance(entry, bench.Contender):
                with entry.within():
                    entry.check()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y, g: (y * 1.00001, g), "sum is off by"),
        (lambda y, g: (y, [g[0], g[1] * 1.00001]), "gradient of tensor 1 is off by 1.0"),
        (lambda y, g: (y, [-g[0], g[1]]), "gradient of tensor 0 is off by"),
    ],
)
@pytest.mark.parametrize("power", [1, 2])
def test_another_penalty_is_an_error(power: int, spoil: Callable[..., Any], message: str):
    tensors = [torch.randn(n, requires_grad=True) for n in (5, 300)]
    y = penalty._functions(power).eager()(*tensors)
    grad = torch.tensor(0.5)
    gradients = list(torch.autograd.grad(y, tensors, grad))
    penalty.check_values("it", power, tensors, y, gradients, grad, True)
    with pytest.raises(bench.WrongValues, match=message):
        penalty.check_values("it", power, tensors, *spoil(y, gradients), grad, True)


# Which there are


def goals(cases: list[bench.Benchmark]) -> dict[str, list[str]]:
    result = {case.label: [goal.text for goal in case.goals] for case in cases}
    assert len(result) == len(cases)
    return result


def test_the_cases_cover_what_is_promised():
    found = goals(optimizer_step.cases(bench.Scope(CPU, DEFAULT)))
    floor = "within 1.2 of the floor, 0.8 of copy_'s time"
    for name in ("AdamW", "SGDW"):
        label = f"optimizer_step {name} float32 16 tensors, 64 MiB"
        assert found[label] == [floor, "at least level with fused=True"]
        for option in OPTIONS:
            assert found[label.replace(name, f"{name}+{option}")] == [floor]
        goal = "at least 5 times the speed of fused=True"
        assert found[f"optimizer_step {name} float32 400 tensors, 100 KiB cold caches"] == [
            goal,
            "at least 10 times the speed of foreach=True",
        ]
        assert found[f"optimizer_step {name} float32 10000 tensors, 2.441 MiB cold caches"] == [
            goal
        ]
    for name in ("Adam", "SGD"):
        few = "400 tensors, 100 KiB cold caches"
        for size in ("16 tensors, 64 MiB", few, "16 tensors, 4 MiB"):
            assert found[f"optimizer_step {name} float32 {size}"] == []
    assert found["optimizer_step AdamW bfloat16 16 tensors, 2 MiB"] == []
    full = bench.Scope(CPU, backends.DTYPES, everything=True)
    assert found.keys() < goals(optimizer_step.cases(full)).keys()
    label = "penalty l1 forward+backward float32 16 tensors, 64 MiB"
    assert label in goals(penalty.cases(bench.Scope(CPU, DEFAULT)))


def test_the_gpu_cases_cover_what_is_promised(monkeypatch: pytest.MonkeyPatch):
    properties = argparse.Namespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cases = optimizer_step.cases(bench.Scope(CUDA, DEFAULT))
    found = goals(cases)
    peak = "peak no higher than that of fused=True"
    for name in ("AdamW", "SGDW"):
        assert found[f"optimizer_step {name} float32 16 tensors, 381.5 MiB"] == [
            "at least 0.9 of copy bandwidth",
            "at least level with fused=True",
            peak,
        ]
        for size in ("161 tensors, 97.49 MiB", "10000 tensors, 2.441 MiB"):
            assert found[f"optimizer_step {name} float32 {size}"] == [
                "at least 2 times the speed of fused=True",
                "at least 3 times the speed of foreach=True",
                peak,
            ]
    assert found["optimizer_step SGD float32 400 tensors, 100 KiB"] == []
    assert all(case.wall is (case.tensors > 16) for case in cases)
    properties.total_memory = 8 * 2**30
    assert not any("381.5 MiB" in c.label for c in optimizer_step.cases(bench.Scope(CUDA, DEFAULT)))


def test_bytes_are_those_that_have_to_move():
    wanted = {"AdamW": 28, "AdamW+l1": 28, "AdamW+clip": 32, "AdamW+ema": 36}
    wanted |= {"Adam": 28, "SGD": 20, "SGDW": 20, "SGDW+l1": 20, "SGDW+clip": 24, "SGDW+ema": 28}
    assert {kind.name: step(kind).bytes / 80 for kind in KINDS} == wanted
    # Averages of 16-bit parameters have 32.
    assert step(Kind("AdamW", "ema"), torch.bfloat16).bytes == 80 * (7 * 2 + 2 * 4)
    scope = bench.Scope(CPU, DEFAULT)
    for direction, transfers in ((FORWARD, 1), (BOTH, 3)):
        subject = penalty._case(scope, 1, torch.bfloat16, direction, 10)
        assert subject.bytes == transfers * 160 * 2


def test_a_resnet_has_its_parameters():
    shapes = optimizer_step.resnet50()
    assert (len(shapes), optimizer_step._numel(shapes)) == (161, 25_557_032)


# Peers in figures and reports


def test_goals_and_reports_know_the_peers():
    def prepare(device: torch.device, pool: int) -> list[bench.Contender]:
        held = torch.ones(64)
        return [
            bench.Contender("native", lambda i: held.neg_(), lambda: None),
            bench.Contender("fused", lambda i: held.copy_(held.neg()), lambda: None),
        ]

    subject = bench.Benchmark(
        op="toy",
        variant="kind",
        direction=_measure.STEP,
        dtype=torch.float32,
        shape=(64,),
        tensors=400,
        bytes=512,
        prepare=prepare,
        peers=("fused",),
        goals=(
            bench.Goal("native", "no slower", "speedup_over_fused", 0, True),
            bench.Goal("native", "no higher", "peak_above_fused_bytes", 0),
        ),
    )
    result = bench.measure(subject, CPU, TINY)
    native = next(row for row in result["contenders"] if row["name"] == "native")
    assert native["peak_above_fused_bytes"] == -256 and "kept_bytes" not in native
    assert native["seconds_per_tensor"] == native["median"] / 400
    assert [goal["met"] for goal in native["goals"]] == [True, True]
    data = {"benchmarks": [result]}
    ((label, name, seconds, *_),) = _report.result_table(data).rows
    assert (label, name) == ("toy kind float32 400 tensors, 256 B", "native")
    assert seconds.endswith("µs a tensor")
    table = _report.peer_table(data)
    ((_, name, fused),) = table.rows
    assert (table.columns[2:], name) == (("fused",), "native")
    assert "×" in fused and fused.endswith(", 256 B")
    assert _report.peer_table(data, ("triton",)).rows == []


def test_cold_caches_are_emptied_before_each_call_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    cases = optimizer_step.cases(bench.Scope(CPU, DEFAULT))
    assert {c.tensors for c in cases if c.cold} == {400, 10_000}
    assert not any(c.cold for c in optimizer_step.numbered(bench.Scope(CPU, DEFAULT), 400))
    log: list[str] = []
    now = 0.0

    def evict(i: int) -> None:
        nonlocal now
        now += 0.05
        log.append("evicted")

    monkeypatch.setattr(_clock, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(_clock, "_evict", evict)
    cold = _clock.clock(CPU, cold=True)
    assert cold.beside == 0.05 and cold.most_calls == 1
    log.clear()
    assert cold.seconds(lambda i: log.append(f"call {i}"), 2, 7) == 0
    assert log == ["evicted", "call 7", "evicted", "call 8"]


def test_the_wall_clock_runs_until_the_gpu_is_done(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.01))
    subject = optimizer_step._case(CUDA, torch.float32, Kind("AdamW"), SHAPES)
    assert subject.wall and _measure.pool_size(subject, CUDA) == 1
    assert _clock.clock(CUDA, wall=True).seconds(lambda i: None, 2, 0) >= 0.005
