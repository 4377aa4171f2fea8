"""A study that processes share, stop and go on with: no trial twice, none lost."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from reg_kernels.cli import _study
from reg_kernels.cli._errors import UsageError
from reg_kernels.cli._study import Study, workers

SPACE = {"arm": CategoricalDistribution(["base", "l1"]), "seed": IntDistribution(0, 100)}
TASKS = [{"arm": arm, "seed": seed} for seed in range(3) for arm in ("base", "l1")]
ABOUT = {"data": "digits", "sizes": (300, 300)}


@pytest.fixture(params=["study.log"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A journal, which is made sooner than an SQLite file."""
    return str(tmp_path / request.param)


both = pytest.mark.parametrize("where", ["study.db", "study.log"], indirect=True)


def opened(where: str, **others: Any) -> Study:
    return Study(where, "compare", ABOUT, SPACE, **others)


def value_of(trial: Trial) -> float:
    return trial.params["seed"] + (trial.params["arm"] == "l1") / 2


def assert_all_done_once(study: Study) -> None:
    done = [t for t in study.trials() if t.state == TrialState.COMPLETE]
    assert sorted(t.value for t in done) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert all(t.value == t.params["seed"] + (t.params["arm"] == "l1") / 2 for t in done)


@both
def test_each_task_once_and_nothing_again(where: str) -> None:
    standing = opened(where).work(value_of, TASKS)
    assert [t.params for t in standing.done] == TASKS
    assert not (standing.running or standing.crashed or standing.free)

    def never(trial: Trial) -> float:
        raise AssertionError

    again = opened(where)
    assert len(again.work(never, TASKS).done) == 6
    assert len(again.trials()) == 6
    # More of them go on with what there is.
    more = [*TASKS, {"arm": "base", "seed": 3}]
    assert len(again.work(value_of, more).done) == 7


def test_ctrl_c_gives_the_trial_back(where: str) -> None:
    count = itertools.count()

    def interrupted(trial: Trial) -> float:
        if next(count) == 2:
            raise KeyboardInterrupt
        return value_of(trial)

    study = opened(where)
    with pytest.raises(KeyboardInterrupt):
        study.work(interrupted, TASKS)
    assert not study.standing(TASKS).running
    study = opened(where)
    standing = study.work(value_of, TASKS)
    assert not standing.crashed
    assert_all_done_once(study)
    assert [t.state for t in study.trials()].count(TrialState.FAIL) == 1


def test_ctrl_c_while_a_trial_begins_waits_until_it_is_known(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, begin = opened(where), Study._begin

    def begin_and_signal(self: Study, params: Any) -> Trial:
        trial = begin(self, params)
        os.kill(os.getpid(), signal.SIGINT)
        return trial

    monkeypatch.setattr(Study, "_begin", begin_and_signal)
    # A shell's background job ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            study.work(value_of, TASKS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [t.state for t in study.trials()] == [TrialState.FAIL]


def test_a_crash_is_tried_once_more_and_then_reported(where: str) -> None:
    tries: dict[tuple[str, int], int] = {}

    def crashing(trial: Trial) -> float:
        key = (trial.params["arm"], trial.params["seed"])
        tries[key] = tries.get(key, 0) + 1
        if key == ("l1", 0) or (key == ("base", 2) and tries[key] == 1):
            raise ValueError("no more of it\nsecond line")
        return value_of(trial)

    study = opened(where)
    standing = study.work(crashing, TASKS)
    assert tries == {(t["arm"], t["seed"]): 1 for t in TASKS} | {("l1", 0): 2, ("base", 2): 2}
    (crashed,) = standing.crashed.values()
    assert crashed.params == {"arm": "l1", "seed": 0}
    assert crashed.user_attrs["error"] == "ValueError: no more of it"
    assert len(standing.done) == 5
    # The next time it is tried again: what was wrong may have been mended.
    study = opened(where)
    assert not study.work(value_of, TASKS).crashed
    assert_all_done_once(study)


def test_a_value_that_is_no_number_is_the_worst(where: str) -> None:
    standing = opened(where).work(lambda trial: float("nan"), TASKS[:1])
    assert standing.done[0].value == float("inf")


def test_a_trial_that_another_process_has_taken_over_does_not_count(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, other = opened(where), opened(where)
    values = iter([1.0, 2.0])

    def silent(trial: Trial) -> float:
        """Meanwhile another one finds no sign of life and does it."""
        with monkeypatch.context() as patch:
            patch.setattr(_study, "SILENT_SECONDS", -1.0)
            other.standing(TASKS[:1])
        assert len(other.work(lambda trial: next(values), TASKS[:1]).done) == 1
        return next(values)

    standing = study.work(silent, TASKS[:1])
    assert [t.value for t in standing.done] == [1.0]


def test_what_a_killed_process_left_is_done_by_another(where: str, tmp_path: Path) -> None:
    def stuck(trial: Trial) -> float:
        (tmp_path / "at it").touch()
        time.sleep(100)
        raise AssertionError

    process = multiprocessing.get_context("fork").Process(
        target=lambda: opened(where).work(stuck, TASKS)
    )
    process.start()
    while not (tmp_path / "at it").exists():
        assert process.is_alive()
        time.sleep(0.01)
    study = opened(where)
    assert [t.params for t in study.standing(TASKS).running] == TASKS[:1]
    process.kill()
    process.join()
    study.work(value_of, TASKS)
    assert_all_done_once(study)


def side_by_side(where: str, folder: str) -> None:
    def noted(trial: Trial) -> float:
        (Path(folder) / str(os.getpid())).touch()
        deadline = time.monotonic() + 240
        while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        trial.set_user_attr("pid", os.getpid())
        return value_of(trial)

    opened(where).work(noted, TASKS, wait=False)


@pytest.mark.parametrize("where", ["study.db"], indirect=True)
def test_two_processes_on_one_storage(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    with workers(side_by_side, 1, where, str(folder)):
        side_by_side(where, str(folder))
    study = opened(where)
    assert_all_done_once(study)
    assert len({t.user_attrs["pid"] for t in study.trials() if "pid" in t.user_attrs}) == 2


def note_blocked(path: str) -> None:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    Path(path).write_text(str(blocked))


def test_the_terminals_ctrl_c_does_not_reach_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first one either, with which Python starts a process of its own."""
    tracker = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    monkeypatch.setattr(tracker, "_fd", None)
    monkeypatch.setattr(tracker, "_pid", None)
    with workers(note_blocked, 1, str(tmp_path / "blocked")):
        pass
    os.close(tracker._fd)
    assert (tmp_path / "blocked").read_text() == "True"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@both
def test_of_two_that_begin_the_same_the_later_one_gives_way(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, other, begin = opened(where), opened(where), Study._begin
    done: list[Any] = []

    def begin_second(self: Study, params: Any) -> Trial:
        """Another process has just begun the same, unseen."""
        if not done:
            done.append(begin(other, params))
        return begin(self, params)

    monkeypatch.setattr(Study, "_begin", begin_second)
    standing = study.work(value_of, TASKS, wait=False)
    assert [t.params for t in standing.running] == TASKS[:1]
    assert sorted(TASKS.index(t.params) for t in standing.done) == [1, 2, 3, 4, 5]
    assert len(study.trials()) == 7


def test_what_others_are_at_besides_is_not_waited_for(where: str) -> None:
    study, other = opened(where), opened(where)
    more = [{"arm": arm, "seed": 7} for arm in ("base", "l1")]
    other.work(value_of, more[:1])
    trial = other._begin(more[1])
    assert [t.params for t in other.standing(more).running] == more[1:]
    standing = study.work(value_of, TASKS)  # ends
    assert not standing.running
    assert [t.params for t in standing.done] == TASKS
    assert trial.number not in [t.number for t in standing.done]


@both
def test_drawn_trials_end_at_most_and_go_on_with_others(where: str) -> None:
    space = {"p": FloatDistribution(0.0, 1.0)}
    seeds: list[int] = []

    def sampler(seed: int) -> optuna.samplers.BaseSampler:
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed)

    def study() -> Study:
        return Study(where, "tune", ABOUT, space, sampler)

    def pruning(trial: Trial) -> float:
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 3:
            raise KeyboardInterrupt
        return trial.params["p"]

    with pytest.raises(KeyboardInterrupt):
        study().work(pruning, most=5)
    standing = study().work(pruning, most=5)
    assert seeds == [0, 4]
    assert [t.state for t in standing.done].count(TrialState.PRUNED) == 1
    assert len(standing.done) == 5
    # What was given back is done by its own parameters, and nothing else is drawn twice.
    drawn = [t.params["p"] for t in study().trials()]
    assert drawn[4] == drawn[3]
    assert len(set(drawn)) == 5
    assert len(study().work(pruning, most=5, until=0.0).done) == 5


# Bad storages


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    return text


@both
def test_a_storage_of_another_study(where: str) -> None:
    opened(where)
    other = ABOUT | {"sizes": (200, 300)}
    said = refusal(lambda: Study(where, "compare", other, SPACE))
    expected = "is of another study: sizes [300, 300] there, [200, 300] here; name another one"
    assert said == f"--storage {where}: {expected}"
    optuna.create_study(storage=_study._open(where), study_name="mine").set_user_attr("a", 1)
    said = refusal(lambda: Study(where, "mine", ABOUT, SPACE))
    assert (
        said == f"--storage {where}: has a study mine that is not of this command; name another one"
    )


def test_storages_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_study, "LOCK_SECONDS", 0.1)
    assert refusal(lambda: opened("study.txt")) == (
        "--storage: must be a file that ends in .db, SQLite's, or in .log, a journal, or a URL, "
        "got study.txt"
    )
    for name, content, kind in (
        ("junk.db", b"no database at all" * 100, "SQLite file"),
        ("junk.log", b"no journal\nat all\n", "journal"),
        ("bytes.log", b"\xff\n\x80\n", "journal"),
    ):
        (path := tmp_path / name).write_bytes(content)
        said = refusal(lambda path=path: opened(str(path)))
        assert said.startswith(f"--storage {path}: must be a whole {kind} of Optuna's: ")
        assert path.read_bytes() == content
    with sqlite3.connect(path := tmp_path / "other.db") as other:
        other.execute("CREATE TABLE cats (name)")
    said = refusal(lambda: opened(str(path)))
    assert said == f"--storage {path}: is the database of another program; name another one"
    other.execute("BEGIN EXCLUSIVE")
    said = refusal(lambda: opened(str(path)))
    assert said.startswith(f"--storage {path}: is locked by another process, for more than 0.1 s")
    other.close()
    (tmp_path / "folder.db").mkdir()
    assert "must be a file" in refusal(lambda: opened(str(tmp_path / "folder.db")))
    said = refusal(lambda: opened("nodb://here/x"))
    assert said.startswith("--storage nodb://here/x: must be a whole storage of Optuna's: ")


def test_a_storage_that_is_lost_meanwhile(tmp_path: Path) -> None:
    where = str(tmp_path / "study.db")

    def losing(trial: Trial) -> float:
        Path(where).write_bytes(b"somebody else's" * 1000)
        return 0.0

    said = refusal(lambda: opened(where).work(losing, TASKS))
    assert said.startswith(f"--storage {where}: can no longer be used: ")
