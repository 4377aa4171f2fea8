"""Whole models under pytest-benchmark: `pytest bench/bench_models.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_models(time_it: Callable[[], None]) -> None:
    time_it()
