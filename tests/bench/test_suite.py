"""The suite as a whole: each op at every size, the peers, what small CUDA calls add, pytest."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reg_kernels import backends, bench
from reg_kernels.bench import (
    _clock,
    _isas,
    _measure,
    _peers,
    augment,
    drop_path,
    dropout,
    mixup,
    optimizer_step,
)
from reg_kernels.bench._measure import BACKWARD, FORWARD
from reg_kernels.bench.optimizer_step import Kind

from support import run_program

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEFAULT = bench.Scope(CPU, (torch.float32, torch.bfloat16), compiled=False)
TINY = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
CACHES = 32 * 2**20

# An op, and the variants that are ops of their own to who calls them.
LADDERS = [
    *(("dropout", ""), ("dropout1d", ""), ("dropout2d", ""), ("dropout3d", "")),
    *(("drop_path", ""), ("drop_path", "with residual"), ("drop_path", "with layer scale")),
    *(("gaussian_noise", ""), ("gaussian_noise", "multiplicative")),
    *(("uniform_noise", ""), ("salt_and_pepper", "")),
    *(("batch_norm", ""), ("batch_norm_inference", "")),
    *(("batch_norm_act", "relu+dropout"), ("batch_norm_act", "residual+relu")),
    *(("optimizer_step", name) for name in ("AdamW", "Adam", "SGDW", "SGD")),
    *(("penalty", "l1"), ("penalty", "l2")),
    *(("mixup", ""), ("mixup", "from uint8"), ("mixup", "cutmix")),
    *(("cross_entropy", "pair"), ("distillation", "T=2")),
    ("adversarial_step", "linf"),
    ("subset", ""),
]


# Sizes


def ladder(op: str, variant: str, scope: bench.Scope) -> dict[str, list[bench.Benchmark]]:
    cases = [c for c in bench.all_cases(scope) if (c.op, c.variant) == (op, variant)]
    small = [c for c in cases if c.host or c.tensors == 400]
    rest = [(c, c.bytes * 4 // c.dtype.itemsize) for c in cases if c not in small]  # as in float32
    return {
        "small": small,
        "typical": [c for c, size in rest if size <= CACHES],
        "large": [c for c, size in rest if size > CACHES and c.tensors < 1000],
    }


def test_every_op_is_on_the_ladder():
    found = {(case.op, case.variant) for case in bench.all_cases(DEFAULT)}
    assert set(LADDERS) <= found
    options = {("optimizer_step", k) for _, k in found if "+" in k}
    targets = {("cross_entropy", kind) for kind in ("smoothed", "labels", "probabilities")}
    goals = {("drop_path", half.variant) for half in drop_path.HALVES}
    norms = {("adversarial_step", norm) for norm in ("l2", "l1")}
    pipelines = {("augment", kind.variant) for kind in augment.KINDS}  # which torch has none of
    assert found - set(LADDERS) == options & found | targets | goals | norms | pipelines


@pytest.mark.parametrize(("op", "variant"), LADDERS)
def test_each_op_has_a_small_a_typical_and_a_large_case(op: str, variant: str):
    steps = ladder(op, variant, DEFAULT)
    assert all(steps.values()), {name: len(cases) for name, cases in steps.items()}
    assert any(case.dtype == torch.bfloat16 for cases in steps.values() for case in cases)
    for name in ("small", "typical"):
        for case in steps[name][:1]:
            entries = {entry.name: entry for entry in bench.contenders(case, CPU)}
            assert {"copy", "native", "triton", "eager", "compile"} <= set(entries)
            assert isinstance(entries["eager"], bench.Contender)


@pytest.mark.parametrize(("op", "variant"), LADDERS)
def test_all_has_every_dtype_at_every_size(op: str, variant: str):
    full = bench.Scope(CPU, backends.DTYPES, everything=True)
    for name, cases in ladder(op, variant, full).items():
        assert {case.dtype for case in cases} == set(backends.DTYPES), name


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("op", ["dropout1d", "dropout3d"])
def test_every_contender_drops_channels(op: str, dtype: torch.dtype):
    shape = {"dropout1d": (32, 16, 5), "dropout3d": (32, 16, 2, 3, 2)}[op]
    scope = bench.Scope(CPU, (dtype,), compiled=False)
    for direction, host in itertools.product((FORWARD, BACKWARD), (False, True)):
        subject = dropout._case(op, direction, dtype, shape, "contiguous", scope, host=host)
        for entry in bench.contenders(subject, CPU):
            if isinstance(entry, bench.Contender):
                with entry.within():
                    entry.check()


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize(
    "drawn",
    [drop_path.ALONE, drop_path.ADDED, drop_path.SCALED, drop_path.HALVES[1]],
    ids=lambda d: d.variant,
)
def test_every_contender_drops_samples(drawn: Any, dtype: torch.dtype):
    scope = bench.Scope(CPU, (dtype,), compiled=dtype == torch.float32)
    for direction in (FORWARD, BACKWARD):
        subject = drop_path._case(scope, drawn, direction, dtype, (64, 3, 4, 5))
        found = bench.contenders(subject, CPU)
        for entry in found:
            if isinstance(entry, bench.Contender):
                with entry.within():
                    entry.check()
        assert ("compile" in [e.name for e in found if isinstance(e, bench.Contender)]) is (
            scope.compiled
        )


def test_goals_are_for_each_instruction_set():
    cases = bench.all_cases(DEFAULT)
    for plain, by_isa in zip(cases, bench.on_each_isa(cases), strict=True):
        assert by_isa.isas == (_isas.here() if plain.goals else ())
    goal = bench.Goal("native", "slow", "time_over_eager", -1.0)
    entries = [bench.Contender(name, lambda i: None, lambda: None) for name in ("native", "eager")]
    (timed,) = bench.on_each_isa([case(*entries, goals=(goal,))])
    for row in bench.measure(timed, CPU, TINY)["contenders"]:
        missed = [goal["met"] for goal in row.get("goals", ())]
        assert missed == ([] if row["name"] == "eager" else [False]), row["name"]


# Peers


def entry_of(name: str, subject: bench.Benchmark) -> Any:
    return next(entry for entry in bench.contenders(subject, CPU) if entry.name == name)


def step(algorithm: str, dtype: torch.dtype = torch.float32) -> bench.Benchmark:
    return optimizer_step._case(CPU, dtype, Kind(algorithm), ((3, 5), (64,)))


def mixing(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> bench.Benchmark:
    scope = bench.Scope(CPU, (dtype,), compiled=False)
    return mixup._case(scope, mixup.MIXED, FORWARD, dtype, (6, 3, 5, 4), layout)


@pytest.mark.parametrize(
    ("name", "subject"), [("optimi", step("AdamW")), ("optimi", step("SGD")), ("timm", mixing())]
)
def test_a_peer_that_is_missing_is_skipped_with_the_remedy(
    name: str, subject: bench.Benchmark, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, name, None)
    entry = entry_of(name, subject)
    assert isinstance(entry, bench.Skipped), entry
    assert "not installed" in entry.reason and entry.reason.endswith("make bench-peers")


def optimi(decoupled: bool) -> types.ModuleType:
    """torch's optimizers under the names and arguments that optimi's have."""

    class SGD(torch.optim.SGD):
        def __init__(self, params: Any, decouple_wd: bool, kahan_sum: bool, **options: Any) -> None:
            self._decay = options.pop("weight_decay") if decouple_wd and decoupled else 0.0
            super().__init__(params, **options)

        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(1 - self.param_groups[0]["lr"] * self._decay)
            super().step()

    module = types.ModuleType("optimi")
    module.SGD = SGD
    module.AdamW = lambda params, kahan_sum, **options: torch.optim.AdamW(params, **options)
    return module


def test_optimis_step_is_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optimi", optimi(True))
    for algorithm in ("AdamW", "SGDW", "SGD"):
        entry_of("optimi", step(algorithm)).check()
    monkeypatch.setitem(sys.modules, "optimi", optimi(False))
    with pytest.raises(bench.WrongValues, match="optimi: parameters is off by"):
        entry_of("optimi", step("SGDW")).check()


def test_optimis_own_step():
    pytest.importorskip("optimi")
    for algorithm, dtype in itertools.product(("AdamW", "Adam", "SGDW", "SGD"), backends.DTYPES):
        entry_of("optimi", step(algorithm, dtype)).check()


TIMM = """
import numpy as np
import torch

class Mixup:
    def __init__(self, label_smoothing, num_classes):
        self.classes = num_classes

    def __call__(self, x, labels):
        lam = float(np.random.beta(1.0, 1.0))
        x.mul_(lam).add_(x.flip(0) / lam * (1 - lam))
        hot = torch.nn.functional.one_hot(labels, self.classes).float()
        return x, lam * hot + (1 - lam) * hot.flip(0)
"""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (("", ""), None),
        (("/ lam * (1 - lam)", "/ lam * (1.0001 - lam)"), "output is off by"),
        (("x.flip(0)", "x.roll(1, 0)"), "output is off by"),
        (("hot.flip(0)", "hot"), "target is off by"),
    ],
)
def test_timms_mixup_is_checked(
    spoil: tuple[str, str], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "timm" / "data").mkdir(parents=True)
    # Importing the package fails, as timm's does without torchvision.
    (tmp_path / "timm" / "__init__.py").write_text("raise ImportError('torchvision')")
    (tmp_path / "timm" / "data" / "mixup.py").write_text(TIMM.replace(*spoil))
    monkeypatch.syspath_prepend(tmp_path)
    entry = entry_of("timm", mixing(torch.float64))
    with pytest.raises(bench.WrongValues, match=message) if message else contextlib.nullcontext():
        for _ in range(2):  # also after it has written over its images
            entry.check()
            entry.call(0)


def test_timms_own_mixup():
    module = _peers.peer("timm", "timm", "data/mixup.py")
    if isinstance(module, bench.Skipped):
        pytest.skip(module.reason)
    for dtype, layout in itertools.product(backends.DTYPES, ("contiguous", "channels_last")):
        entry_of("timm", mixing(dtype, layout)).check()


def test_a_compiled_step_is_measured_and_right():
    scope = bench.Scope(CPU, (torch.float32,), everything=True)
    subject = optimizer_step._case(CPU, torch.float32, Kind("SGD"), ((64,),), scope=scope)
    rows = {row["name"]: row for row in bench.measure(subject, CPU, TINY)["contenders"]}
    assert len(rows["compile"]["seconds"]) == 3, rows["compile"]
    many = optimizer_step._case(CPU, torch.float32, Kind("SGD"), ((1,),) * 17, scope=scope)
    assert "17 tensors takes minutes" in entry_of("compile", many).reason
    scope = bench.Scope(CPU, (torch.float64,), everything=True)
    broken = optimizer_step._case(CPU, torch.float64, Kind("Adam"), ((64,),), scope=scope)
    assert "in float32" in entry_of("compile", broken).reason


# Clocks


def case(*contenders: bench.Contender, **fields: Any) -> bench.Benchmark:
    described = {"op": "toy", "direction": "forward", "dtype": torch.float32, "shape": (256,)}
    described |= {"bytes": None, "requires_grad": False}
    return bench.Benchmark(**(described | fields), prepare=lambda device, pool: list(contenders))


@pytest.mark.parametrize(("seconds", "lead"), [(0.001, 2), (0.02, 1), (0.06, 0)])
def test_the_shorter_a_call_the_more_lead_in(seconds: float, lead: int):
    log: list[str] = []

    def timed(call: Callable[[int], object], calls: int, first: int) -> float:
        log.append("timed")
        call(first)
        return seconds

    entry = bench.Contender("a", lambda i: log.append("call"), lambda: None)
    samples, _ = _measure._interleave([entry], _clock.Clock(timed, 10), TINY)
    assert samples == {"a": [seconds] * 3}
    assert log == ["timed", "call"] * 2 + ([*["call"] * lead, "timed", "call"]) * 3


class Cuda:
    """What stands in for a GPU: clocks that say what they are, and captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replayed = 0
        monkeypatch.setattr(_measure, "clock", self._clock)
        monkeypatch.setattr(_measure, "captured", self._captured)
        monkeypatch.setattr(_measure, "pool_size", lambda case, device: 1)
        monkeypatch.setattr(_measure, "peak_bytes", lambda call, device: 0)

    def _clock(
        self, device: torch.device, host: bool = False, wall: bool = False, cold: bool = False
    ) -> Any:
        def seconds(call: Callable[[int], object], calls: int, first: int) -> float:
            call(first)
            return 3.0 if wall else 2.0 if host else 1.0

        return _clock.Clock(seconds, 1)

    def _captured(self, call: Callable[[int], object], device: torch.device) -> Any:
        if call(0) == "waits":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay(i: int) -> None:
            self.replayed += 1

        return replay


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    yield Cuda(monkeypatch)


@pytest.mark.parametrize(
    ("fields", "median", "further"),
    [
        ({}, 1.0, {"host_median": 2.0, "graph_median": 1.0}),
        ({"host": True}, 2.0, {"device_median": 1.0, "graph_median": 1.0}),
        ({"wall": True}, 3.0, {"graph_median": 1.0}),
        ({"shape": (2**21,)}, 1.0, {}),
    ],
    ids=["small", "host", "wall", "large"],
)
def test_a_small_cuda_call_has_further_figures(
    fields: dict[str, Any], median: float, further: dict[str, float], cuda: Cuda
):
    plain = bench.Contender("plain", lambda i: None, lambda: None)
    waiting = bench.Contender("waiting", lambda i: "waits", lambda: None)
    result = bench.measure(case(plain, waiting, **fields), CUDA, TINY)
    rows = {row["name"]: row for row in result["contenders"]}
    assert {name: rows["plain"]["median"] for name in rows} == {"plain": median, "waiting": median}
    found = {
        k: v for k, v in rows["plain"].items() if k.split("_")[0] in ("host", "device", "graph")
    }
    assert found == further
    assert (cuda.replayed > 0) is bool(further)
    if further:
        note = "RuntimeError: operation not permitted when stream is capturing"
        assert rows["waiting"]["graph_note"] == note and "graph_median" not in rows["waiting"]


def test_a_graph_is_warmed_up_on_the_stream_that_it_is_captured_on(monkeypatch: pytest.MonkeyPatch):
    log: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "main" if name == "main" else "side"

        def wait_stream(self, other: Stream) -> None:
            log.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def inside(what: str, stream: Stream) -> Iterator[None]:
        log.append((what, stream.name))
        yield
        log.append(("end", what))

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    for name, value in {
        "Stream": Stream,
        "current_stream": lambda device: Stream("main"),
        "stream": lambda stream: inside("warm-up", stream),
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: inside("capture", stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = _clock.captured(lambda i: log.append(i), CUDA)
    replay(7)
    assert log == [
        ("side", "waits for", "main"),
        *(("warm-up", "side"), 0, 0, 0, ("end", "warm-up")),
        ("main", "waits for", "side"),
        *(("capture", "side"), 0, ("end", "capture")),
        "replay",
    ]


# pytest-benchmark

TOY = """
import torch
from reg_kernels import bench

LOG = []

def wrong():
    raise bench.WrongValues("toy: off by one")

def cases(scope):
    def prepare(device, pool):
        def way(name):
            return bench.Contender(name, lambda i: LOG.append(name), lambda: None)
        return [way("native"), way("eager"), bench.Contender("compile", LOG.append, wrong),
                bench.Skipped("liger", "no GPU")]
    return [bench.Benchmark(op="toy", direction="forward", dtype=torch.float32, shape=(4,),
                            bytes=None, prepare=prepare, requires_grad=False)]
"""

BENCH_TOY = """
import json
import sys

MODULES = ("toy",)

def test_toy(time_it):
    time_it()

def test_order():
    with open("order.json", "w") as file:
        json.dump(sys.modules["toy"].LOG, file)
"""


def test_pytest_is_handed_what_was_measured_interleaved(tmp_path: Path):
    shutil.copy(ROOT / "bench" / "conftest.py", tmp_path)
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "bench_toy.py").write_text(BENCH_TOY)
    words = ["-q", "-ra", "--benchmark-json=found.json", "bench_toy.py"]
    ran = run_program([sys.executable, "-m", "pytest", *words], cwd=tmp_path)
    assert ran.returncode == 1, ran.stdout
    assert "wrong values: toy: off by one" in ran.stdout and "no GPU" in ran.stdout
    assert "1 failed, 3 passed" in ran.stdout
    data = json.loads((tmp_path / "found.json").read_text())
    found = {b["name"].rpartition("-")[2].rstrip("]"): b for b in data["benchmarks"]}
    assert set(found) == {"native", "eager"}
    for benchmark in found.values():
        figures = benchmark["extra_info"]
        assert benchmark["group"] == "toy forward float32 16 B no grad"
        assert benchmark["stats"]["median"] == figures["median"] > 0
        assert benchmark["stats"]["min"] == figures["fastest"]
        assert benchmark["stats"]["rounds"] >= 5 and figures["time_over_eager"] > 0
    # Rounds of both, not all of one before the other.
    order = [
        name for name, _ in itertools.groupby(json.loads((tmp_path / "order.json").read_text()))
    ]
    assert order[:2] == ["native", "eager"] and len(order) > 8
