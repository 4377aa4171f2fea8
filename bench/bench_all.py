"""Every benchmark under pytest-benchmark: `pytest bench/bench_all.py --benchmark-only -k penalty`.

A test's name starts with the module that its benchmark is of.
"""

from __future__ import annotations

from collections.abc import Callable

from reg_kernels import bench

MODULES = (*(f"reg_kernels.bench.{n}" for n in bench.modules()), "bench.growth", "bench.models")


def test_benchmark(time_it: Callable[[], None]) -> None:
    time_it()
