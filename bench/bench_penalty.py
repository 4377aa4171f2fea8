"""The penalties under pytest-benchmark: `pytest bench/bench_penalty.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_penalty(time_it: Callable[[], None]) -> None:
    time_it()
