"""Distillation under pytest-benchmark: `pytest bench/bench_distillation.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_distillation(time_it: Callable[[], None]) -> None:
    time_it()
