"""The benchmarks of losses of logits: which there are, and that what computes something else is
found."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reg_kernels import backends, bench
from reg_kernels.bench import _logits, cross_entropy, distillation
from reg_kernels.bench._measure import BOTH, FORWARD
from reg_kernels.bench._peers import LIGER
from reg_kernels.bench.cross_entropy import LABELS, PAIR, PROBABILITIES, SMOOTHED, Kind

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEFAULT = (torch.float32, torch.bfloat16)
TINY = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
FLAT, IMAGES = (37, 211), (3, 21, 9, 7)
KINDS = (PAIR, SMOOTHED, LABELS, PROBABILITIES)


def names(value: object) -> str:
    return value.variant if isinstance(value, Kind) else str(value)


def scope(dtype: torch.dtype, compiled: bool = False) -> bench.Scope:
    return bench.Scope(CPU, (dtype,), compiled=compiled)


def check_all(subject: bench.Benchmark) -> None:
    found = set()
    for entry in bench.contenders(subject, CPU):
        if isinstance(entry, bench.Contender):
            with entry.within():
                entry.check()
                entry.call(0)
            found.add(entry.name)
    assert {"copy", "reference", "eager"} <= found


def rows(subject: bench.Benchmark) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in bench.measure(subject, CPU, TINY)["contenders"]}


# What contenders compute


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(FLAT, "contiguous"), (IMAGES, "contiguous"), (IMAGES, "channels_last")],
    ids=names,
)
@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_every_contender_computes_the_cross_entropy(
    kind: Kind, shape: tuple[int, ...], layout: str, dtype: torch.dtype
):
    for direction in (FORWARD, BOTH):
        check_all(cross_entropy._case(scope(dtype), kind, direction, dtype, shape, layout))


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [2.0, 1.5])
def test_every_contender_distills(temperature: float, dtype: torch.dtype):
    for direction in (FORWARD, BOTH):
        check_all(distillation._case(scope(dtype), direction, temperature, dtype, FLAT))


def test_the_compiled_loss_is_measured_and_right():
    compiled = scope(torch.float32, compiled=True)
    found = rows(cross_entropy._case(compiled, PAIR, BOTH, torch.float32, FLAT))
    assert len(found["compile"]["seconds"]) == 3, found["compile"]
    assert all("kept_bytes" in found[name] for name in ("reference", "eager", "compile"))


def test_a_gradient_is_made_anew_by_every_call():
    for subject in (
        cross_entropy._case(scope(torch.float32), PAIR, BOTH, torch.float32, FLAT),
        distillation._case(scope(torch.float32), BOTH, 2.0, torch.float32, FLAT),
    ):
        for entry in bench.contenders(subject, CPU):
            if entry.name in ("reference", "native", "eager"):
                (_, first), (_, second) = entry.call(0), entry.call(1)
                assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "shape", "reason"),
    [
        (SMOOTHED, (2, 30_000), "sums a position's log-probabilities"),
        (LABELS, (1, 2, 300, 300), "counts the positions"),
    ],
    ids=names,
)
def test_torch_is_left_out_where_float16_is_too_small_for_it(
    kind: Kind, shape: tuple[int, ...], reason: str
):
    logits = torch.zeros(shape, dtype=torch.float16)
    target = torch.ones((shape[0], *shape[2:]), dtype=torch.int64)
    eager = cross_entropy._functions(kind).eager()
    assert not torch.isclose(eager(logits, target).double(), eager(logits.double(), target), 0.5)
    found = rows(cross_entropy._case(scope(torch.float16), kind, BOTH, torch.float16, shape))
    assert reason in found["eager"]["skipped"] and "seconds" in found["reference"]
    assert cross_entropy._overflow(kind, torch.bfloat16, shape) is None
    assert cross_entropy._overflow(kind, torch.float16, _logits.CLASSES) is None


# What is wrong is found


class Step:
    """An eager step of a loss, and what it has to be."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        logits = (2 * torch.randn(64, 100)).requires_grad_()
        labels, partners = torch.randint(100, (2, 64))
        if name == "distillation":
            teacher = 2 * torch.randn(64, 100)
            self.truth = _logits.Truth(
                logits,
                [(1.0, labels)],
                teacher=teacher,
                temperature=2.0,
                alpha=distillation.ALPHA,
            )
            self.arguments = (logits, teacher, labels)
        else:
            kind = next(kind for kind in KINDS if kind.variant == name)
            targets = {PAIR: (labels, partners), PROBABILITIES: (teacher_like(logits),)}
            self.arguments = (logits, *targets.get(kind, (labels,)))
            self.truth = cross_entropy._truth(kind, *self.arguments)
        self.loss, self.gradient = self.run(self.eager())

    def eager(self) -> Callable[..., Tensor]:
        if self.name == "distillation":
            return distillation._functions(2.0).eager()
        return cross_entropy._functions(next(k for k in KINDS if k.variant == self.name)).eager()

    def run(self, function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.arguments[0]
        loss = function(*(arguments or self.arguments))
        return loss, torch.autograd.grad(loss, logits)[0]

    def check(self, loss: Tensor, gradient: Tensor) -> None:
        self.truth.check("it", loss, [gradient], torch.ones(()), False)


def teacher_like(logits: Tensor) -> Tensor:
    return torch.randn_like(logits).softmax(1)


STEPS = [*(kind.variant for kind in KINDS), "distillation"]


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradient_are_checked(name: str):
    step = Step(name)
    step.check(step.loss, step.gradient)
    for loss in (step.loss * 1.00002, step.loss + torch.nan):
        with pytest.raises(bench.WrongValues, match="loss is off by"):
            step.check(loss, step.gradient)
    one = step.gradient.clone().flatten()
    one[one.abs().argmax()] *= 1.001
    one = one.view_as(step.gradient)
    for gradient in (step.gradient * 1.001, step.gradient.roll(1), one, step.gradient / 2):
        with pytest.raises(bench.WrongValues, match="gradient is off by"):
            step.check(step.loss, gradient)


@pytest.mark.parametrize("name", STEPS)
def test_the_loss_of_another_target_is_an_error(name: str):
    step = Step(name)
    *rest, target = step.arguments
    loss, gradient = step.run(step.eager(), *rest, target.roll(1, 0))
    with pytest.raises(bench.WrongValues, match="loss is off by"):
        step.check(loss, gradient)
    with pytest.raises(bench.WrongValues, match="gradient is off by"):
        step.check(step.loss, gradient)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("smoothed", cross_entropy._functions(LABELS)),
        ("labels", cross_entropy._functions(SMOOTHED)),
        ("distillation", distillation._functions(1.9)),
    ],
)
def test_another_loss_is_an_error(name: str, other: Any):
    step = Step(name)
    loss, gradient = step.run(other.eager())
    with pytest.raises(bench.WrongValues, match="loss is off by"):
        step.check(loss, gradient)
    with pytest.raises(bench.WrongValues, match="gradient is off by"):
        step.check(step.loss, gradient)


@pytest.mark.parametrize(
    ("module", "attribute", "value"),
    [
        (cross_entropy, "LAM", 0.301),
        (distillation, "ALPHA", 0.501),
    ],
)
def test_shares_are_checked(module: Any, attribute: str, value: float):
    step = Step("pair" if module is cross_entropy else "distillation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, attribute, value)
        loss, gradient = step.run(step.eager())
    with pytest.raises(bench.WrongValues, match="loss is off by"):
        step.check(loss, gradient)
    with pytest.raises(bench.WrongValues, match="gradient is off by"):
        step.check(step.loss, gradient)


def test_a_contender_of_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    right = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: right(*args))
    found = rows(cross_entropy._case(scope(torch.float32), SMOOTHED, BOTH, torch.float32, FLAT))
    assert "is off by" in found["eager"]["wrong"] and "seconds" not in found["eager"]
    assert "seconds" in found["reference"]


# Liger-Kernel


class InPlace(torch.autograd.Function):
    """As Liger-Kernel does it: the gradient goes over the logits, before the backward asks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        with torch.enable_grad():
            x = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(x, target, label_smoothing=smoothing)
        logits.data.copy_(torch.autograd.grad(loss, x)[0])
        ctx.save_for_backward(logits.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_cross_entropy = lambda x, y, label_smoothing=0.0: InPlace.apply(
        x, y, label_smoothing
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def on_a_gpu(inputs: Any) -> Any:
    """`inputs` that say they lie on a GPU."""
    return inputs._replace(grads=[types.SimpleNamespace(device=CUDA)])


@pytest.mark.parametrize("kind", [SMOOTHED, LABELS], ids=names)
def test_liger_gets_logits_of_its_own(kind: Kind, liger: types.ModuleType):
    logits = torch.randn(FLAT, requires_grad=True)
    before = logits.detach().clone()
    arguments = [(logits, torch.randint(FLAT[1], FLAT[:1]))]
    inputs = _logits.loss_inputs(arguments)
    truth = cross_entropy._truth(kind, *arguments[0])
    entry = cross_entropy._liger(kind, truth, BOTH, on_a_gpu(inputs))
    for _ in range(2):  # also after it has written over its logits
        entry.check()
        entry.call(0)
    assert torch.equal(logits, before) and entry.may_fail
    liger.liger_cross_entropy = lambda x, y, label_smoothing: F.cross_entropy(x, y) * 1.001
    with pytest.raises(bench.WrongValues, match="liger: loss is off by"):
        entry.check()


def test_without_liger_there_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    inputs = _logits.loss_inputs([(torch.randn(FLAT),)])
    entry = cross_entropy._liger(LABELS, None, BOTH, on_a_gpu(inputs))
    assert isinstance(entry, bench.Skipped) and entry.reason.endswith("make bench-peers")
    entry = cross_entropy._liger(LABELS, None, BOTH, inputs)
    assert entry == bench.Skipped(LIGER, "its Triton kernels need a GPU")


# Which there are


def labels(module: Any, scope: bench.Scope) -> dict[str, list[str]]:
    cases = module.cases(scope)
    result = {case.label: [goal.text for goal in case.goals] for case in cases}
    assert len(result) == len(cases)
    return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    properties = argparse.Namespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


@pytest.mark.parametrize(
    ("device", "size"), [(CPU, "float32 512×50257"), (CUDA, "bfloat16 16384×32768")], ids=str
)
def test_the_cases_cover_what_is_promised(device: torch.device, size: str, gpu: Any):
    def speeds(eager: float, compiled: float) -> list[str]:
        return [
            f"at least {eager:g} times eager's speed",
            f"at least {compiled:g} times torch.compile's speed",
        ]

    of_pair = ["at most 1.6 of copy_'s time"][: device == CPU]
    of_logits = ["at most 1.67 of copy_'s time: 2.5 of that for one tensor of logits"][
        : device == CPU
    ]
    default = bench.Scope(device, DEFAULT)
    everything = bench.Scope(device, backends.DTYPES, everything=True)
    found = labels(cross_entropy, default)
    assert {label: goals for label, goals in found.items() if size in label} == {
        f"cross_entropy pair forward+backward {size}": [*speeds(4, 2.5), *of_pair],
        f"cross_entropy smoothed forward+backward {size}": speeds(2, 1.4),
        f"cross_entropy smoothed forward {size} no grad": [],
    }
    full = labels(cross_entropy, everything)
    assert found.items() < full.items()
    for label in (
        f"labels forward+backward {size}",
        f"probabilities forward+backward {size}",
        "labels forward+backward bfloat16 8×21×512×512",
        "labels forward+backward float32 8×21×512×512 channels_last",
        "pair forward+backward float16 1024×1000",
        "labels forward float32 64×10 no grad host time",
    ):
        assert full[f"cross_entropy {label}"] == []
    for kind in ("pair", "labels"):
        level = ["at most eager's time"][: device == CPU]
        assert full[f"cross_entropy {kind} forward+backward float32 64×10 host time"] == level
    found = labels(distillation, default)
    assert {label: goals for label, goals in found.items() if size in label} == {
        f"distillation T=2 forward+backward {size}": [*speeds(3, 1.3), *of_logits],
        f"distillation T=2 forward {size} no grad": [],
    }
    full = labels(distillation, everything)
    assert found.items() < full.items()
    assert f"distillation T=1.5 forward+backward {size}" in full
    assert "distillation T=2 forward+backward float32 64×10 host time" in full


def test_what_a_gpu_does_not_hold_is_left_out(gpu: argparse.Namespace):
    gpu.total_memory = 8 * 2**30
    everything = bench.Scope(CUDA, DEFAULT, everything=True)
    for module in (cross_entropy, distillation):
        assert not any("16384" in label for label in labels(module, everything))
        assert any("1024×1000" in label for label in labels(module, everything))


def test_liger_is_a_peer_where_it_can_run():
    def peers(device: torch.device, kind: Kind, shape: tuple[int, ...] = FLAT) -> tuple[str, ...]:
        where = bench.Scope(device, DEFAULT)
        return cross_entropy._case(where, kind, BOTH, torch.float32, shape).peers

    assert peers(CUDA, SMOOTHED) == peers(CUDA, LABELS) == (LIGER,)
    assert peers(CPU, SMOOTHED) == peers(CUDA, PAIR) == peers(CUDA, PROBABILITIES) == ()
    assert peers(CUDA, LABELS, IMAGES) == ()


def test_bytes_are_those_that_have_to_move():
    size = 37 * 211 * 2
    where, dtype = scope(torch.bfloat16), torch.bfloat16
    for kind, extra in ((PAIR, 0), (SMOOTHED, 0), (LABELS, 0), (PROBABILITIES, 1)):
        for direction, transfers in ((FORWARD, 1), (BOTH, 2)):
            subject = cross_entropy._case(where, kind, direction, dtype, FLAT)
            assert subject.bytes == (transfers + extra) * size
    for direction, transfers in ((FORWARD, 2), (BOTH, 3)):
        assert distillation._case(where, direction, 2.0, dtype, FLAT).bytes == transfers * size
