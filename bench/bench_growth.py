"""Growth curves under pytest-benchmark: `pytest bench/bench_growth.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_growth(time_it: Callable[[], None]) -> None:
    time_it()
