"""Cross-entropy under pytest-benchmark: `pytest bench/bench_cross_entropy.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_cross_entropy(time_it: Callable[[], None]) -> None:
    time_it()
