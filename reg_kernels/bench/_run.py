"""Measuring a list of cases, with progress, and starting again with a warm allocator."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _console
from . import _environment, _results
from ._measure import Benchmark, Budget, measure

FULL = Budget(seconds=4.0, least=7, most=40, sample=5e-3)
FULL_CUDA = Budget(seconds=1.0, least=7, most=40, sample=1e-3)
QUICK = Budget(seconds=0.3, least=3, most=10, sample=1e-3)

INTERRUPTED = 130  # the shell's exit code for a program that Ctrl-C ended


def full_budget(device: torch.device) -> Budget:
    return FULL_CUDA if device.type == "cuda" else FULL


def add_time_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start no benchmark later than this, and name those left out",
    )


def warm_allocator(device: torch.device, command: Sequence[str]) -> None:
    """Replaces this process by `command` with settings by which malloc keeps freed memory, unless
    this one has them.

    glibc reads the settings when a process starts, so this process cannot make them.
    """
    if device.type != "cpu" or _environment.allocator() or not _environment.has_glibc():
        return
    settings = " ".join(f"{name}={value}" for name, value in _environment.ALLOCATOR.items())
    print(f"started again with {settings}, so that fresh outputs cost no page faults", flush=True)
    sys.stderr.flush()
    environment = {**os.environ, **_environment.ALLOCATOR}
    os.execve(sys.executable, [sys.executable, *command], environment)


def measure_all(
    cases: Sequence[Benchmark],
    device: torch.device,
    budget: Callable[[Benchmark], Budget],
    options: dict[str, Any],
    time_limit: float | None = None,
) -> dict[str, Any]:
    """Measures `cases` in order and returns conditions and results, as JSON holds them.

    Args:
        cases: the benchmarks to measure.
        device: where to measure them.
        budget: how long to measure a benchmark.
        options: how the measurement was asked for; the results repeat it.
        time_limit: seconds after which no further benchmark is started; the results name those.
    """
    data = {
        "schema": _results.SCHEMA,
        **_environment.environment(device),
        "options": options,
        "benchmarks": [],
        "left_out": [],
    }
    begin = time.monotonic()
    torch.manual_seed(0)
    with _console.progress() as progress:
        bar = progress.add_task("", total=len(cases))
        for number, case in enumerate(cases, start=1):
            progress.update(bar, description=case.label)
            if time_limit is not None and time.monotonic() - begin > time_limit:
                data["left_out"].append({"label": _name(case), "reason": "the time was up"})
                continue

            def after_round(done: int, rounds: int, case: Benchmark = case) -> None:
                progress.update(bar, description=f"{case.label}, round {done} of {rounds}")

            try:
                data["benchmarks"].append(measure(case, device, budget(case), after_round))
            except torch.OutOfMemoryError:
                data["left_out"].append({"label": _name(case), "reason": "out of GPU memory"})
            progress.advance(bar)
            if progress.disable:
                print(f"{number}/{len(cases)} {case.label}", file=sys.stderr, flush=True)
    data["benchmarks"].sort(key=lambda benchmark: benchmark["op"])  # they took turns
    return data


def _name(case: Benchmark) -> str:
    return f"{case.series}: {case.label}" if case.series else case.label
