"""Dropout under pytest-benchmark: `pytest bench/bench_dropout.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_dropout(time_it: Callable[[], None]) -> None:
    time_it()
