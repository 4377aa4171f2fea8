"""BatchNorm under pytest-benchmark: `pytest bench/bench_batch_norm.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_batch_norm(time_it: Callable[[], None]) -> None:
    time_it()
