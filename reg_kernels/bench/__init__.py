"""Microbenchmarks: what is measured, and how.

Each public module here holds the benchmarks of the op of the same name, as a function
`cases(scope) -> list[Benchmark]`; adding the file is all that a new op needs.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Iterable

from . import _isas
from ._measure import (
    Benchmark,
    Budget,
    Contender,
    Goal,
    Scope,
    Skipped,
    WrongValues,
    contenders,
    measure,
)

__all__ = [
    "Benchmark",
    "Budget",
    "Contender",
    "Goal",
    "Scope",
    "Skipped",
    "WrongValues",
    "all_cases",
    "contenders",
    "measure",
    "modules",
    "on_each_isa",
    "take_turns",
]


def modules() -> list[str]:
    """The modules that hold benchmarks, by the basename of their op."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def all_cases(scope: Scope) -> list[Benchmark]:
    """Every benchmark of every op, in the order in which they run.

    The ops take turns, so that what a time limit leaves is not one op's alone.
    """
    return take_turns(
        importlib.import_module(f".{name}", __name__).cases(scope) for name in modules()
    )


def on_each_isa(cases: Iterable[Benchmark]) -> list[Benchmark]:
    """`cases`, those with goals by each instruction set of this machine."""
    isas = _isas.here()
    return [dataclasses.replace(case, isas=isas) if case.goals else case for case in cases]


def take_turns(lists: Iterable[list[Benchmark]]) -> list[Benchmark]:
    """The first case of each list, then the second ones, and so on."""
    turns = itertools.zip_longest(*lists)
    return [case for turn in turns for case in turn if case is not None]
