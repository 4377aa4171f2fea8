"""pytest-benchmark over the definitions in reg_kernels/bench.

A test's `contender` in bench_<op>.py runs over every case and contender of that op. What runs one
after the other cannot be compared on a machine that changes its speed: this follows one contender
over time (--benchmark-autosave, --benchmark-compare), `reg-kernels bench` compares.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from reg_kernels import backends, bench
from reg_kernels.bench import _environment

sys.path.insert(0, str(Path(__file__).parent))  # models and growth, which are no op's

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCOPE = bench.Scope(DEVICE, (torch.float32, torch.bfloat16))
ROUNDS = 5
NAMES = (
    *("copy", *backends.NAMES, "native[avx2]", "native[baseline]"),
    *("eager", "compile", "fused", "foreach", "optimi", "liger"),
)


class Prepared(NamedTuple):
    """A contender whose values were checked, and the case it runs in."""

    case: bench.Case
    contender: bench.Contender


def pytest_report_header() -> str:
    if DEVICE.type == "cuda":
        return f"benchmarks on {_environment.device_name(DEVICE)}"
    settings = " ".join(f"{name}={value}" for name, value in _environment.ALLOCATOR.items())
    warm = "keeps freed memory" if _environment.allocator() else f"is cold: set {settings}"
    return f"benchmarks on {torch.get_num_threads()} threads, malloc {warm}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    op = metafunc.module.__name__.rpartition(".")[2].removeprefix("bench_")
    module = op if op in ("models", "growth") else f"reg_kernels.bench.{op}"
    cases = importlib.import_module(module).cases(SCOPE)
    metafunc.parametrize(
        "contender",
        [
            pytest.param((case, name), id=f"{case.label}-{name}".replace(" ", "-"))
            for case in cases
            for name in NAMES
        ],
        indirect=True,
    )


@functools.lru_cache(maxsize=1)
def _contenders(case: bench.Case) -> dict[str, bench.Contender | bench.Skipped]:
    return {entry.name: entry for entry in bench.contenders(case, DEVICE)}


@pytest.fixture
def contender(request: pytest.FixtureRequest) -> Prepared:
    case, name = request.param
    entry = _contenders(case).get(name)
    if entry is None:
        pytest.skip(f"{name} is no contender here")
    if isinstance(entry, bench.Skipped):
        pytest.skip(entry.reason)
    with entry.within():
        entry.check()
    return Prepared(case, entry)


@pytest.fixture
def time_it(benchmark: Any, contender: Prepared) -> Callable[[], None]:
    """Times the contender: all that a test here has to do."""
    case, way = contender

    def call() -> None:
        way.call(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def time_it() -> None:
        benchmark.group = case.label
        benchmark.extra_info["bytes"] = case.bytes
        calls = 100 if case.host else 1
        with way.within():
            benchmark.pedantic(call, rounds=ROUNDS, iterations=calls, warmup_rounds=1)

    return time_it
