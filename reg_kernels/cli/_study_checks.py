"""What a study's file may not say. Its trials come from a file that anybody may have written."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from ._errors import UsageError, one_line

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
OWNER, ERROR, RESULT = "owner", "error", "result"  # user attributes of a trial
_RATIOS = ("seconds_per_epoch", "peak_bytes")  # measures that are compared by their logarithm
_COUNTS = ("weights", "zeros", "epochs", "best_epoch")


def check_database(path: Path, where: str, seconds: float) -> None:
    """Raises UsageError of an SQLite file that is another program's or would run something. Waits
    so long for one that is locked."""
    with contextlib.closing(sqlite3.connect(path, timeout=seconds)) as connection:
        rows = list(connection.execute("SELECT type, name FROM sqlite_master"))
    # Optuna would put its tables beside those of another program.
    if rows and ("table", "studies") not in rows:
        raise UsageError(f"--storage {where}: is the database of another program; name another one")
    # Which Optuna does not make, and SQLite would run.
    if more := [name for kind, name in rows if kind not in ("table", "index")]:
        raise UsageError(
            f"--storage {where}: must be without triggers and views, got {one_line(more[0])}"
        )


def check_journal(path: Path, where: str, seconds: float) -> None:
    """Raises UsageError of a journal that ends within a line, as after a full disk: the next line
    would be written behind that, and both be lost. Looks five times, so far apart: another process
    may be writing."""
    for _ in range(5):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                time.sleep(seconds)
                continue
        return
    raise UsageError(f"--storage {where}: must end with a whole line, got a part of one: remove it")


def check_trial(
    trial: FrozenTrial,
    space: Mapping[str, BaseDistribution],
    check: Callable[[FrozenTrial], None] | None,
) -> None:
    """Raises ValueError, unless a trial is as `Study` writes it; `check` looks at a done one."""
    _require(trial, isinstance(trial.user_attrs.get(ERROR, ""), str), "an error that is no text")
    owner = trial.user_attrs.get(OWNER)
    if owner is not None:
        is_whole = (
            isinstance(owner, dict)
            and isinstance(owner.get("host"), str)
            and type(owner.get("pid")) is int
            and 0 < owner["pid"] < 2**31
            and is_number(owner.get("beat"))
        )
        _require(trial, is_whole, "an owner that is none")
    is_whole = trial.params.keys() == space.keys()
    if is_whole or trial.state in DONE:
        right = is_whole and all(contains(space[k], v) for k, v in trial.params.items())
        _require(trial, right, "other parameters than are searched")
    if trial.state in DONE:
        losses = trial.intermediate_values.values()
        is_loss = trial.state == TrialState.PRUNED or is_number(trial.value, finite=False)
        is_loss = is_loss and all(is_number(loss, finite=False) for loss in losses)
        _require(trial, is_loss, "a loss that is no number")
        if check is not None:
            check(trial)


def check_measures(trial: FrozenTrial, result: Any) -> None:
    """Raises ValueError, unless `result` has the measures that `Setting.train` returns."""
    measures: Any = result.get("measures") if isinstance(result, dict) else None
    right = isinstance(measures, dict) and "validation_loss" in measures
    right = right and all(v is None or is_number(v) for v in measures.values())
    right = right and all(measures.get(name) is None or measures[name] > 0 for name in _RATIOS)
    _require(trial, right, "a result that no training has")


def check_history(trial: FrozenTrial, result: Any) -> None:
    """Raises ValueError, unless `result`, whose measures are right, has the counts among them and a
    curve for each measure, all of one length."""
    counts = [result["measures"].get(name) for name in _COUNTS]
    teacher = result.get("teacher", {"seconds": 0.0})
    right = None not in counts and counts[0] > 0
    right = right and isinstance(teacher, dict) and is_number(teacher.get("seconds"))
    history: Any = result.get("history")
    right = (
        right and isinstance(history, dict) and {"train_loss", "validation_loss"} <= history.keys()
    )
    for values in history.values() if right else ():
        right = right and isinstance(values, list)
        right = right and len(values) == len(history["validation_loss"])
        right = right and all(v is None or is_number(v) for v in values)
    _require(trial, right, "curves that no training has")


def check_strengths(trial: FrozenTrial, names: Mapping[str, Any]) -> None:
    """Raises ValueError, unless a trial of `tune` tells the strength of each method."""
    strengths: Any = trial.user_attrs.get("strengths")
    right = isinstance(strengths, dict) and strengths.keys() == names.keys()
    right = right and all(is_number(value) for value in strengths.values())
    _require(trial, right, "other methods than are searched")


def is_number(value: Any, finite: bool = True) -> bool:
    return isinstance(value, int | float) and (not finite or math.isfinite(value))


def contains(of: BaseDistribution, value: Any) -> bool:
    """Whether a distribution has this value."""
    if isinstance(of, CategoricalDistribution):
        return any(type(value) is type(choice) and value == choice for choice in of.choices)
    if isinstance(of, IntDistribution):
        return type(value) is int and of.low <= value <= of.high
    assert isinstance(of, FloatDistribution)
    return is_number(value) and bool(of.low <= value <= of.high)


def _require(trial: FrozenTrial, is_right: bool, otherwise: str) -> None:
    if not is_right:
        raise ValueError(f"trial {trial.number} has {otherwise}")
