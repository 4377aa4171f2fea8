"""Optimizers under pytest-benchmark: `pytest bench/bench_optimizer_step.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_optimizer_step(time_it: Callable[[], None]) -> None:
    time_it()
