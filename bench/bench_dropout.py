"""Dropout under pytest-benchmark: `python -m pytest bench/bench_dropout.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import torch

ROUNDS = 5


def test_dropout(benchmark: Any, contender: Any) -> None:
    case, way = contender
    on_gpu = torch.cuda.is_available()

    def call() -> None:
        way.call(0)
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.group = case.label
    benchmark.extra_info["bytes"] = case.bytes
    with way.within():
        benchmark.pedantic(call, rounds=ROUNDS, iterations=100 if case.host else 1, warmup_rounds=1)
