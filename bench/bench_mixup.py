"""Mixup and CutMix under pytest-benchmark: `pytest bench/bench_mixup.py --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable


def test_mixup(time_it: Callable[[], None]) -> None:
    time_it()
