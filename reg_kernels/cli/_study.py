"""An Optuna study that several processes work on, stop and go on with: for `compare` and `tune`.

A trial is told of its task by its parameters, and of who works on it by the user attribute "owner".
Nothing locks the storage as a whole, which may be a server's: a trial is created with its
parameters and its owner in one transaction, and of two that were created for one task the later one
gives way. What is left of a process that is gone is given back by the next that looks.

A trial ends COMPLETE or PRUNED, or FAIL: with the user attribute "error" if it crashed, without one
if it was given back.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from ._errors import UsageError, one_line
from ._files import output_file
from ._study_checks import DONE, ERROR, OWNER, check_database, check_journal, check_trial

ATTEMPTS = 2  # of what crashes, before it is left alone and reported
LOCK_SECONDS = 30.0  # that another process may keep an SQLite file locked
BEAT_SECONDS = 20.0  # between two signs of life of a trial
# Without a sign of life for so long a trial's process is taken for gone. On the same machine a
# process is seen to be gone at once; clocks of machines that share a storage have to agree to that.
SILENT_SECONDS = 120.0
WAIT_SECONDS = 0.5  # between two looks at what other processes do

SQLITE, JOURNAL = (".db", ".sqlite", ".sqlite3"), (".log", ".journal")
# Process numbers mean something on one machine, and there in one container.
_HERE = f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """How far a study is."""

    done: list[FrozenTrial]  # complete or pruned, by their number
    running: list[FrozenTrial]  # with a process at work on it
    crashed: dict[str, FrozenTrial]  # the last try of what was tried in vain, by `task_key`
    free: list[Params]  # tasks that anybody may begin


class Study:
    """An Optuna study, created or gone on with. It minimises.

    Args:
        where: a path of an SQLite file (.db) or of a journal (.log), or a URL of Optuna's.
        name: of the study; one storage can have several.
        about: what the results depend on, apart from a trial's parameters, as JSON has it. A study
            that has it otherwise is refused.
        space: the parameters of a trial. All of them are drawn or given as it begins.
        sampler: makes the sampler, of a seed that is another one each time that the study is gone
            on with: a sampler that began anew would draw again what it has drawn. Needed where
            there is no list of tasks.
        pruner: as Optuna has them; by default none.
        check: looks at a trial that is done, and raises ValueError where the file has it wrong.

    Raises:
        UsageError: one line, `--storage` of which cannot be read or written or is of another study.
    """

    def __init__(
        self,
        where: str,
        name: str,
        about: Mapping[str, Any],
        space: Mapping[str, BaseDistribution],
        sampler: Callable[[int], BaseSampler] | None = None,
        pruner: BasePruner | None = None,
        check: Callable[[FrozenTrial], None] | None = None,
    ) -> None:
        self.where, self._space = where, dict(space)
        # Through JSON, as it comes back: a tuple is a list there.
        about = json.loads(json.dumps(dict(about)))
        with _storage_errors(where, f"must be a whole {_kind(where)} of Optuna's"):
            kept: dict[str, Any] = {
                "storage": _open(where),
                "study_name": name,
                "sampler": optuna.samplers.RandomSampler(),
                "pruner": pruner or optuna.pruners.NopPruner(),
            }
            try:
                self._study = optuna.load_study(**kept)
            except KeyError:  # there is none; a storage that has one is not written to here
                self._study = optuna.create_study(**kept, load_if_exists=True)
            if not (attributes := self._study.user_attrs):
                self._study.set_user_attr("about", about)
                attributes = self._study.user_attrs
            found = self.trials()
        there = attributes.get("about")
        if not isinstance(there, dict):
            raise UsageError(
                f"--storage {where}: has a study {name} that is not of this command; name another "
                "one"
            )
        for key in (*about, *there):
            if there.get(key) != about.get(key):
                raise UsageError(
                    f"--storage {where}: is of another study: {key} {one_line(there.get(key))} "
                    f"there, {one_line(about.get(key))} here; name another one"
                )
        with _storage_errors(where, f"must be a whole {_kind(where)} of this command's"):
            for trial in found:
                check_trial(trial, space, check)
        # Crashes of earlier times are no reason not to try again.
        self._since = len(found)
        if sampler is not None:
            crowd = os.getpid() if any(_is_running(t) for t in found) else 0
            self._study.sampler = sampler((len(found) + 1_000_003 * crowd) % 2**32)

    @property
    def optuna(self) -> optuna.Study:
        """Optuna's own study, for importances and pictures."""
        return self._study

    def trials(self) -> list[FrozenTrial]:
        """All trials by their number, as they stand in the storage now. Not to be changed."""
        return self._study.get_trials(deepcopy=False)

    def standing(self, tasks: Sequence[Params] | None = None) -> Standing:
        """How far the study is with the tasks alone or, without a list, with all that was begun.

        What a process left that is gone is given back.
        """
        trials = self.trials()
        for trial in trials:
            if trial.state == TrialState.RUNNING and not _is_running(trial):
                self._end(trial.number, TrialState.FAIL)
        if tasks is None:
            begun = [t.params for t in trials if t.params.keys() == self._space.keys()]
            tasks = list({task_key(params): params for params in begun}.values())
        else:  # others may be at more of them, such as seeds, that nobody here waits for
            asked = {task_key(params) for params in tasks}
            trials = [trial for trial in trials if task_key(trial.params) in asked]
        running = [trial for trial in trials if _is_running(trial)]
        done = [trial for trial in trials if trial.state in DONE]
        taken = {task_key(trial.params) for trial in (*done, *running)}
        crashes = [t for t in trials if t.number >= self._since and _crashed(t)]
        times = Counter(task_key(trial.params) for trial in crashes)
        crashed = {
            key: trial
            for trial in crashes
            if times[key := task_key(trial.params)] >= ATTEMPTS and key not in taken
        }
        taken |= crashed.keys()
        free = [params for params in tasks if task_key(params) not in taken]
        return Standing(done, running, crashed, free)

    def work(
        self,
        objective: Callable[[Trial], float],
        tasks: Sequence[Params] | None = None,
        most: int | None = None,
        until: float = math.inf,
        wait: bool = True,
        show: Callable[[Standing], None] = lambda standing: None,
    ) -> Standing:
        """Runs trials until there is nothing left to begin, and returns how the study then stands.

        Args:
            objective: trains by `trial.params` and returns what is minimised; NaN counts as
                infinity. What else is worth keeping it sets as user attributes of the trial. It may
                raise `optuna.TrialPruned`; any other exception is a crash, which is tried once
                more. KeyboardInterrupt gives the trial back and goes through.
            tasks: the parameters of each trial that there is to be, each to be done once. Without
                it the sampler draws them, `most` in all processes together, and what was given back
                or crashed comes first.
            most: see there.
            until: the `time.monotonic()` after which no trial is begun.
            wait: whether to wait, at the end, for the trials of other processes, and to take over
                those of a process that is gone.
            show: is told how things stand, before each trial and while waiting.
        """
        with _storage_errors(self.where, "can no longer be used"):
            while True:
                trial, standing = None, self.standing(tasks)
                show(standing)
                try:
                    with uninterrupted():
                        trial = self._claim(standing, tasks, most, until)
                    if trial is not None:
                        self._run(trial, objective)
                except KeyboardInterrupt:
                    with uninterrupted():
                        if trial is not None:
                            self._end(trial.number, TrialState.FAIL)
                    raise
                if trial is None:
                    standing = self.standing(tasks)
                    if self._may_begin(standing, tasks, most, until):
                        continue  # some process has just given up what it was at
                    if not (wait and standing.running):
                        return standing
                    time.sleep(WAIT_SECONDS)

    @staticmethod
    def _may_begin(
        standing: Standing, tasks: Sequence[Params] | None, most: int | None, until: float
    ) -> bool:
        if time.monotonic() >= until:
            return False
        if tasks is not None:
            return bool(standing.free)
        return len(standing.done) + len(standing.running) + len(standing.crashed) < (most or 0)

    def _claim(
        self, standing: Standing, tasks: Sequence[Params] | None, most: int | None, until: float
    ) -> Trial | None:
        """A trial that is this process's to run; None if there is none to begin."""
        while self._may_begin(standing, tasks, most, until):
            # The first, unless others begin as well, who would all take it.
            among = standing.free[: 1 + len(standing.running)]
            params = random.choice(among) if among else None
            trial = self._begin(params)
            earlier = [t for t in self.trials() if t.number < trial.number and _is_taken(t)]
            late = params is not None and task_key(params) in {task_key(t.params) for t in earlier}
            if tasks is None:
                late |= len(earlier) + len(standing.crashed) >= (most or 0)
            if not late:
                return trial
            self._end(trial.number, TrialState.FAIL)
            standing = self.standing(tasks)
        return None

    def _begin(self, params: Params | None) -> Trial:
        """A new trial with these parameters, or with those that the sampler draws.

        `optuna.Study.ask` would take several steps to it, between which it is nobody's.
        """
        owner = _owner() | {"token": uuid.uuid4().hex}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=dict(params or {}),
                distributions={} if params is None else self._space,
                user_attrs={OWNER: owner},
            )
        )
        found = next(t for t in reversed(self.trials()) if t.user_attrs.get(OWNER) == owner)
        trial = Trial(self._study, found._trial_id)
        for name, distribution in self._space.items() if params is None else ():
            _draw(trial, name, distribution)
        return trial

    def _run(self, trial: Trial, objective: Callable[[Trial], float]) -> None:
        value, state = None, TrialState.COMPLETE
        try:
            with _beating(trial):
                value = objective(trial)
            value = math.inf if math.isnan(value) else value
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # silent for too long, such as by Ctrl-Z: it is another process's by now
        except Exception as error:
            state = TrialState.FAIL
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr(ERROR, error_line(error))
        with uninterrupted():
            self._end(trial.number, state, value)

    def _end(self, number: int, state: TrialState, value: float | None = None) -> None:
        # Another process may have ended it, or may just do so.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._study.tell(number, value, state, skip_if_finished=True)


def _draw(trial: Trial, name: str, of: BaseDistribution) -> None:
    if isinstance(of, CategoricalDistribution):
        trial.suggest_categorical(name, of.choices)
    elif isinstance(of, IntDistribution):
        trial.suggest_int(name, of.low, of.high, step=of.step, log=of.log)
    elif isinstance(of, FloatDistribution):
        trial.suggest_float(name, of.low, of.high, step=of.step, log=of.log)


def task_key(params: Params) -> str:
    """What tells tasks apart."""
    return json.dumps(dict(params), sort_keys=True)


def error_line(error: BaseException) -> str:
    """An exception in one line."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps Ctrl-C until the end of what must not be left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    asked = False

    def note(*_: Any) -> None:
        nonlocal asked
        asked = True

    # SIGTERM as well where it is a worker's Ctrl-C.
    signals = [s for s in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(s))]
    previous = {each: signal.signal(each, note) for each in signals}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    if asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def workers(work: Callable[..., object], count: int, *arguments: Any) -> Iterator[None]:
    """More processes that run `work(*arguments)` meanwhile, which works on the same study.

    They are interrupted when this one is, and when it is gone; otherwise the end waits for them.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_as_worker, args=(work, *arguments), daemon=True)
        for _ in range(count)
    ]
    # The terminal's Ctrl-C does not reach them, which they would not be ready for while they start.
    # The tracker that Python starts with the first of them would let signals through again.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        with uninterrupted():
            for process in processes:
                process.join()


def _as_worker(work: Callable[..., object], *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    # What fails here fails in the process that began it as well, which says so.
    with contextlib.suppress(KeyboardInterrupt, UsageError):
        work(*arguments)


# Whose a trial is


def _owner() -> dict[str, Any]:
    return {"host": _HERE, "pid": os.getpid(), "beat": time.time()}


@contextlib.contextmanager
def _beating(trial: Trial) -> Iterator[None]:
    """Gives signs of life meanwhile."""
    over = threading.Event()
    owner = trial.user_attrs[OWNER]

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            # A storage that cannot be reached now may be there the next time.
            with contextlib.suppress(Exception):
                trial.set_user_attr(OWNER, owner | {"beat": time.time()})

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_running(trial: FrozenTrial) -> bool:
    """Whether a process is at work on it."""
    if trial.state != TrialState.RUNNING:
        return False
    owner = trial.user_attrs.get(OWNER)
    if owner is None:  # nothing of ours
        return False
    if owner["host"] == _HERE and not _exists(owner["pid"]):
        return False
    # One from the time to come would keep everybody waiting.
    return bool(abs(time.time() - owner["beat"]) < SILENT_SECONDS)


def _is_taken(trial: FrozenTrial) -> bool:
    return trial.state in DONE or _is_running(trial)


def _crashed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and ERROR in trial.user_attrs


def _exists(pid: int) -> bool:
    multiprocessing.active_children()  # a worker that was killed is there until it is looked at
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# Where it is kept


def _kind(where: str) -> str:
    if "://" in where:
        return "storage"
    return "SQLite file" if Path(where).suffix in SQLITE else "journal"


def _open(where: str) -> optuna.storages.BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if "://" in where:
        return optuna.storages.get_storage(where)
    path = Path(where)
    if path.suffix not in (*SQLITE, *JOURNAL):
        raise UsageError(
            f"--storage: must be a file that ends in {SQLITE[0]}, SQLite's, or in {JOURNAL[0]}, a "
            f"journal, or a URL, got {where}"
        )
    output_file("--storage", path)
    if path.suffix in JOURNAL:
        check_journal(path, where, WAIT_SECONDS)
        return JournalStorage(JournalFileBackend(str(path)))
    if path.exists():
        check_database(path, where, LOCK_SECONDS)
    for left in reversed(range(5)):
        try:
            return optuna.storages.RDBStorage(
                URL.create("sqlite", database=str(path)).render_as_string(),
                engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}},
            )
        except SQLAlchemyError as error:
            # Some that make a new file at once: the later ones find what they were to make.
            if left == 0 or not any(w in str(error) for w in ("already exists", "UNIQUE")):
                raise
            time.sleep(WAIT_SECONDS)
    raise AssertionError


@contextlib.contextmanager
def _storage_errors(where: str, expected: str) -> Iterator[None]:
    """Says in one line why a storage cannot be used. What reads a damaged one raises anything."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        said = str(getattr(cause, "orig", None) or cause).strip().split("\n")[0]
        if "locked" in said:
            expected = f"is locked by another process, for more than {LOCK_SECONDS:g} s"
        raise UsageError(f"--storage {where}: {expected}: {one_line(said)}") from error
