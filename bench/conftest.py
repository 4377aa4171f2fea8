"""pytest-benchmark over the definitions in reg_kernels/bench and in the modules beside this file.

A test's `time_it` is run for every benchmark of its file's `MODULES` and for every contender. On a
machine that changes its speed, contenders that run one after the other cannot be compared. So
`reg_kernels.bench.measure` measures the contenders of a benchmark together, when the first of them
is asked for, and pytest-benchmark reads the recorded seconds from a clock that shows them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reg_kernels import backends, bench
from reg_kernels.bench import _environment, _isas

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCOPE = bench.Scope(DEVICE, (torch.float32, torch.bfloat16))
BUDGET = bench.Budget(seconds=1.0, least=5, most=20, sample=1e-3)
NAMES = (
    *("copy", *backends.NAMES, *map(_isas.further, _isas.here()[1:])),
    *("eager", "compile", "fused", "foreach", "optimi", "liger", "timm"),
)


class RecordedClock:
    """A clock that shows 0, and then the seconds that it is set to."""

    __name__ = "recorded"  # in pytest-benchmark's files

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def set(self, seconds: float = 0.0) -> None:
        self._seconds = seconds


CLOCK = RecordedClock()


def pytest_report_header() -> str:
    if DEVICE.type == "cuda":
        return f"benchmarks on {_environment.facts_of(DEVICE)['name']}"
    settings = " ".join(f"{name}={value}" for name, value in _environment.ALLOCATOR.items())
    warm = "keeps freed memory" if _environment.allocator() else f"is cold: set {settings}"
    return f"benchmarks on {torch.get_num_threads()} threads, malloc {warm}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "time_it" not in metafunc.fixturenames:
        return
    metafunc.parametrize(
        "row",
        [
            pytest.param(
                (case, name),
                id=f"{module.rpartition('.')[2]}-{case.label}-{name}".replace(" ", "-"),
                marks=pytest.mark.benchmark(timer=CLOCK, group=case.label),
            )
            for module in metafunc.module.MODULES
            for case in bench.on_each_isa(importlib.import_module(module).cases(SCOPE))
            for name in NAMES
        ],
        indirect=True,
    )


@functools.lru_cache(maxsize=1)
def measured(case: bench.Benchmark) -> dict[str, dict[str, Any]]:
    """What was measured of each contender, by its name."""
    return {row["name"]: row for row in bench.measure(case, DEVICE, BUDGET)["contenders"]}


@pytest.fixture
def row(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A contender's figures, or what is wrong with its values."""
    case, name = request.param
    row = measured(case).get(name)
    if row is None:
        pytest.skip(f"{name} is no contender here")
    if "skipped" in row:
        pytest.skip(row["skipped"])
    return {"bytes": case.bytes, **row}


@pytest.fixture
def time_it(benchmark: Any, row: dict[str, Any]) -> Callable[[], None]:
    """Hands the contender's times to pytest-benchmark: all that a test here has to do.

    It fails where the contender computed something else.
    """

    def time_it() -> None:
        if "wrong" in row:
            pytest.fail(f"wrong values: {row['wrong']}", pytrace=False)
        seconds = iter(row["seconds"])
        benchmark.extra_info |= {k: v for k, v in row.items() if k not in ("name", "seconds")}
        benchmark.pedantic(
            lambda: CLOCK.set(next(seconds)), setup=CLOCK.set, rounds=len(row["seconds"])
        )

    return time_it
