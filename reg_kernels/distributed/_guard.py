"""`guard`: when a rank dies, hangs or raises, the others end soon, with an error that names it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import distributed as dist

from .._rank_error import RankError, named
from ._connections import Ends, connections, hang_up
from ._ranks import Group, StoreLost

_POLL = 0.5  # seconds between a watcher's looks at the store
_MARGIN = 2.0  # seconds that a roll-call may take past its end, on a machine under load
_LENGTH = 200  # characters of another rank's error
_LISTED = 3  # errors of other ranks

_log = logging.getLogger(__name__)

# Where frames are of no help to a user: torch, this package, and what Python brings.
_NOT_THE_USERS = tuple(
    str(folder)
    for folder in (
        Path(torch.__file__).parent,
        Path(__file__).parent,
        sysconfig.get_path("stdlib"),
        "<frozen",
    )
)

# What the errors of gloo's and NCCL's collectives say, beside those with types of their own.
_OF_COLLECTIVES = ("gloo/", "NCCL")

RAISED = "raised"  # the rank's own error
TOLD = "told"  # a RankError, which names the ranks itself
CUT_OFF = "cut off"  # a collective failed


@dataclass(frozen=True)
class Fault:
    """What a rank that leaves its block by an error tells the others."""

    order: int  # in which ranks told theirs
    kind: str
    text: str  # the error, one line
    where: str  # in the user's code
    ranks: tuple[int, ...]  # that a RankError names


@contextlib.contextmanager
def guard(
    process_group: dist.ProcessGroup | None = None, *, timeout: float = 5.0
) -> Iterator[None]:
    """Around a training loop: the ranks that live end with an error that names the one at fault.

    A rank whose block raises tells the others through the group's store, and raises its error as
    ever. A thread of each rank looks there twice a second, and then closes this rank's connections
    with the others: what waits in a collective of gloo ends within a second, where it else waited
    for the group's timeout. A rank whose collective failed calls the roll, waits ``timeout``
    seconds at most, and raises what it found:

    - ``rank 1 raised ValueError: no such file, at train.py:41 in load``;
    - ``rank 1 died or is stopped: it did not answer within 5 s``;
    - ``rank 1 hangs, at train.py:41 in load: its process lives, but came to no collective``, after
      the group's timeout (``init_process_group(timeout=)``: 30 minutes with gloo if not set);
    - ``rank 1 left the guarded block before the others``: it had fewer batches;
    - ``no rank died or hangs: the collective of rank 0 failed first``: ranks called different ones.

    Ranks wait for each other at the block's begin, ``timeout`` seconds at most. It does nothing
    without a process group, or in a group of one. After an error the group is not
    usable: end the process, or destroy the group and make another. One block around the loop is
    meant, not one a step: each starts a thread and opens a connection to the store.

    With NCCL a rank that waits in a kernel cannot be made to raise: a warning tells what the other
    rank raised, and the process ends by NCCL's own watchdog or by torchrun. That is not measured.

    Args:
        process_group: The group of the block's collectives; None is the default group.
        timeout: Seconds in which the ranks that live answer each other.

    Raises:
        RankError: From the collective's own error, if another rank is the cause. KeyboardInterrupt
            and SystemExit pass through.
        ValueError: If ``timeout`` is not positive.
    """
    if not timeout > 0:
        raise ValueError(f"guard: timeout must be positive, got {timeout}")
    group = Group.of(process_group, "guard")
    if group is None:
        yield
        return
    watch = _Watch(group, timeout)
    try:
        watch.enter()
        yield
    except Exception as error:
        reason = watch.fail(error)
        if reason is not None:
            raise reason from error
        raise
    except BaseException as error:
        watch.interrupt(error)
        raise
    else:
        watch.leave()
    finally:
        watch.close()


def raise_known_faults(group: Group) -> None:
    """Raises RankError if a rank told of an error of its own."""
    if group.store.check(["fault/alarm"]):
        error = _of_raised(group, _told(group))
        if error is not None:
            raise error


class _Watch:
    """One rank's part in a guarded block, and the thread that listens to the others."""

    def __init__(self, group: Group, timeout: float) -> None:
        self._group = group
        self._timeout = timeout
        self._faults: dict[int, Fault] = {}
        self._told_of: set[Ends] = set()
        self._peers: set[Ends] = set()  # connections with other ranks
        self._block = 0  # which one of this rank's this is, from 1
        self._stop = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._listen, name="reg_kernels guard", daemon=True)

    def enter(self) -> None:
        """Begins to listen. A group in which a rank failed before is of no use any more."""
        store = self._group.store

        def begin() -> RankError | None:
            store.delete_key(f"fault/left/{self._group.rank}")
            self._block = store.add(f"fault/blocks/{self._group.rank}", 1)
            self._meet()
            store.add("fault/entered", 1)
            self._wait_for_the_others()
            self._meet()
            if not store.check(["fault/alarm"]):
                return None
            # The thread does not listen yet: the others would take this rank for dead.
            self._set("alive", "at the begin of its block")
            return self._call_the_roll()

        try:
            # It may wait for the others, and then for their answers.
            fault = self._group.ask(2 * self._timeout + _MARGIN, begin)
        except StoreLost as error:
            raise self._group.lost(error) from error
        if fault is not None:
            raise fault
        self._thread.start()

    def _all_have_entered(self) -> bool:
        return self._group.store.add("fault/entered", 0) >= self._group.size

    def _wait_for_the_others(self) -> None:
        """Until each rank has told of its connections, which those that came first could not find:
        the rank that holds the store may die in the first step, and tell nothing any more."""
        until = time.monotonic() + self._timeout
        while not self._all_have_entered() and time.monotonic() < until:
            if self._group.store.check(["fault/alarm"]):
                return
            time.sleep(0.01)

    def leave(self) -> None:
        """Says that this rank is through; by then the store may have gone with the rank that
        holds it."""
        with contextlib.suppress(StoreLost):
            self._group.ask(self._timeout, lambda: self._set("left", "1"))

    def interrupt(self, error: BaseException) -> None:
        """Tells the others of Ctrl-C or sys.exit(1), in no more time than it takes."""
        if isinstance(error, SystemExit) and not error.code:
            self.leave()
            return
        with contextlib.suppress(StoreLost):
            self._group.ask(self._timeout, lambda: self._tell(RAISED, error))

    def fail(self, error: Exception) -> RankError | None:
        """Tells the others of an error, and returns what stands in its place if they caused it."""
        kind = TOLD if isinstance(error, RankError) else RAISED
        if _is_of_a_collective(error):
            kind = CUT_OFF
        seconds = self._timeout + _MARGIN
        try:
            self._group.ask(seconds, lambda: self._tell(kind, error))
            reason = None
            if kind == CUT_OFF:
                reason = self._group.ask(seconds, self._call_the_roll)
            self._group.ask(seconds, lambda: self._see_off(reason))
        except StoreLost as lost:
            if kind != CUT_OFF:
                return None
            # The watcher may have heard what was told before the store went.
            return _of_raised(self._group, self._faults) or self._group.lost(lost)
        return reason

    def close(self) -> None:
        """Ends the thread; one that a stopped server keeps waiting is left behind."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_POLL)

    def _set(self, what: str, value: str) -> None:
        self._group.store.set(f"fault/{what}/{self._group.rank}", value)

    def _meet(self) -> None:
        """Tells of this rank's connections, and finds those of which another rank told from its
        end: they are to be closed when a rank fails, which may have been stopped by then."""
        store = self._group.store
        mine = connections(except_port=self._group.port)
        for local, remote in mine - self._told_of:
            store.set(f"fault/ends/{local}-{remote}", "1")
        self._told_of |= mine
        self._peers |= {
            (local, remote)
            for local, remote in mine - self._peers
            if store.check([f"fault/ends/{remote}-{local}"])
        }

    def _tell(self, kind: str, error: BaseException) -> None:
        group = self._group
        fault = Fault(
            order=group.store.add("fault/order", 1),
            kind=kind,
            text=error.reason if isinstance(error, RankError) else _line(error),
            where=_where_raised(error.__traceback__),
            ranks=error.ranks if isinstance(error, RankError) else (),
        )
        self._meet()
        self._set("told", json.dumps(asdict(fault)))
        group.store.add("fault/alarm", 1)

    def _call_the_roll(self) -> RankError:
        """What all ranks say happened. The first that knows writes it down: one that hung and
        comes later would take it otherwise."""
        store = self._group.store
        error = None if store.check(["fault/verdict"]) else self._look_for_silent_ranks()
        mine = json.dumps((error.reason, error.ranks)) if error is not None else ""
        reason, ranks = json.loads(store.compare_set("fault/verdict", "", mine))
        return RankError(reason, ranks)

    def _look_for_silent_ranks(self) -> RankError:
        """Waits until each rank has told its fault, or for the time that was set."""
        group = self._group
        until = time.monotonic() + self._timeout
        while True:
            faults = _told(group)
            self._faults.update(faults)
            raised = _of_raised(group, faults)
            if raised is not None:
                return raised
            silent = set(range(group.size)) - faults.keys()
            left = {rank for rank in silent if group.get(f"fault/left/{rank}")}
            # These may be about to come.
            behind = {r for r in left if group.store.add(f"fault/blocks/{r}", 0) < self._block}
            if silent == left - behind or time.monotonic() > until:
                break
            time.sleep(0.05)
        alive = {rank: group.get(f"fault/alive/{rank}") for rank in sorted(silent - left)}
        return _verdict(group, faults, left, behind, alive, self._timeout)

    def _see_off(self, reason: RankError | None) -> None:
        """The rank that holds the store goes last: until then the others read who is at fault."""
        group = self._group
        self._set("read", "1")
        until = time.monotonic() + self._timeout
        at_fault = reason.ranks if reason is not None else ()
        staying = [r for r in range(group.size) if group.global_ranks[r] not in at_fault]
        while group.holds_store and staying and time.monotonic() < until:
            done = ("fault/read", "fault/left")
            staying = [r for r in staying if not any(group.get(f"{key}/{r}") for key in done)]
            time.sleep(0.05)

    def _listen(self) -> None:
        """Until the block ends: hangs up on the others when a rank failed, and answers the
        roll-call."""
        store = self._group.store
        met = False
        looks = 0
        try:
            while not self._stop.wait(_POLL):
                if not met and self._all_have_entered():
                    self._meet()
                    met = True
                if store.check(["fault/alarm"]):
                    looks += 1
                    self._answer(looks)
        except RuntimeError:
            # The rank that held the store is dead, and not each rank waits for that one itself.
            if self._group.host in self._group.global_ranks and not self._stop.is_set():
                hang_up(self._peers)

    def _answer(self, looks: int) -> None:
        where = _where(_frames(sys._current_frames().get(self._main)))
        self._set("alive", where)
        self._meet()
        hang_up(self._peers)
        self._faults.update(_told(self._group))
        raised = _of_raised(self._group, self._faults)
        # By the second look this rank should have raised. It computes, or waits where no
        # connection was to be closed: its user hears what happened all the same.
        if raised is not None and looks == 2:
            _log.warning("guard: %s; this rank is still %s", raised, where)


def _told(group: Group) -> dict[int, Fault]:
    """What ranks, as the group counts them, have told so far."""
    faults = {}
    for rank in range(group.size):
        text = group.get(f"fault/told/{rank}")
        if text is not None:
            fields = json.loads(text)
            fields["ranks"] = tuple(fields["ranks"])
            faults[rank] = Fault(**fields)
    return faults


def _of_raised(group: Group, faults: dict[int, Fault]) -> RankError | None:
    """The error for ranks that raised one of their own, or told of others; None if none did."""
    told = sorted((f.order, rank) for rank, f in faults.items() if f.kind != CUT_OFF)
    if not told:
        return None
    first = faults[told[0][1]]
    if first.kind == TOLD:
        return RankError(first.text, first.ranks)
    raised = [rank for _, rank in told if faults[rank].kind == RAISED]
    said = [
        f"rank {group.global_ranks[rank]} raised {faults[rank].text}, {faults[rank].where}"
        for rank in raised[:_LISTED]
    ]
    if len(raised) > _LISTED:
        said.append(f"{len(raised) - _LISTED} other ranks raised")
    return RankError("; ".join(said), [group.global_ranks[rank] for rank in raised])


def _verdict(
    group: Group,
    faults: dict[int, Fault],
    left: set[int],
    behind: set[int],
    alive: dict[int, str | None],
    timeout: float,
) -> RankError:
    """Who is at fault where no rank told of an error of its own.

    `left` are ranks that left a block in peace, those of them `behind` one before this, `alive` the
    others that told nothing, with the place where their processes are. One that is dead explains
    the rest, and one that left explains why others wait; only then has a rank that lives and does
    not come been found to hang.
    """
    dead = [group.global_ranks[rank] for rank, where in alive.items() if where is None]
    if dead:
        verb, pronoun = ("is", "it") if len(dead) == 1 else ("are", "they")
        return RankError(
            f"{named(dead)} died or {verb} stopped: {pronoun} did not answer within {timeout:g} s",
            dead,
        )
    if behind:
        gone = [group.global_ranks[rank] for rank in sorted(behind)]
        return RankError(
            f"{named(gone)} left an earlier guarded block and did not come to this one: dead, "
            "ended, or busy between the two",
            gone,
        )
    if left:
        gone = [group.global_ranks[rank] for rank in sorted(left)]
        return RankError(
            f"{named(gone)} left the guarded block before the others: "
            f"do all ranks have the same number of batches?",
            gone,
        )
    if alive:
        said = [f"rank {group.global_ranks[rank]} hangs, {where}" for rank, where in alive.items()]
        return RankError(
            f"{'; '.join(said[:_LISTED])}: its process lives, but came to no collective",
            [group.global_ranks[rank] for rank in alive],
        )
    rank, first = min(faults.items(), key=lambda item: item[1].order)
    return RankError(
        f"no rank died or hangs: the collective of rank {group.global_ranks[rank]} failed first, "
        f"{first.where}, with {first.text}",
        [group.global_ranks[rank]],
    )


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from or after, is that of a collective or of the
    store: another rank may be its cause."""
    seen: list[BaseException] = []
    next_: BaseException | None = error
    while next_ is not None and next_ not in seen:
        if isinstance(next_, dist.DistError) or (
            isinstance(next_, RuntimeError) and any(w in str(next_) for w in _OF_COLLECTIVES)
        ):
            return True
        seen.append(next_)
        next_ = next_.__cause__ or next_.__context__
    return False


def _line(error: BaseException) -> str:
    """Type and message in a line of bounded length."""
    text = " ".join(str(error).split())
    if len(text) > _LENGTH:
        text = f"{text[:_LENGTH]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where_raised(trace: TracebackType | None) -> str:
    return _where(
        [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(trace)]
    )


def _frames(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """File, line and function of each frame, the innermost last."""
    stack = traceback.walk_stack(frame) if frame is not None else []
    return [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in stack][::-1]


def _where(frames: list[tuple[str, int, str]]) -> str:
    """The innermost line of the user's own code."""
    own = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)] or frames
    if not own:
        return "at an unknown place"
    file, line, function = own[-1]
    return f"at {Path(file).name}:{line} in {function}"
