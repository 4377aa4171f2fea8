"""Ranks that die, hang, raise or differ: what the others say, and how soon. Kills are real.

Every message is compared whole. The file store of the pool outlives each rank; TCP stores end with
rank 0, which holds them.
"""

import contextlib
import datetime
import logging
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import Died, Ranks, die, meet, running_ranks, stop, store
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from two_hosts import Host

from reg_kernels.distributed import FiniteCheck, RankError, check_alike, guard, parameters_of

TRAINING = Path(__file__).parents[1] / "faulty_training.py"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks() as pool:
        yield pool


def _error(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Message and ranks of the RankError of a call; None if it raised none."""
    try:
        function(*arguments, **named)
    except RankError as error:
        assert str(error) == error.reason
        return error.reason, error.ranks
    return None


# Facts.


def _checks() -> list[Any]:
    rank = dist.get_rank()
    half = dist.new_group([1, 3])
    assert half is not None
    net = nn.Sequential(nn.Linear(4, 10 if rank < 3 else 11), nn.Linear(10, 2, bias=rank != 1))
    keys = store()
    found = [
        _error(check_alike, batches=12, lr=0.1, dtype=torch.half, nan=float("nan"), seeds=(1, 2)),
        _error(check_alike, **(dict(a=1, b=None) if rank else dict(b=None, a=1))),
        _error(check_alike, parameters=parameters_of(nn.Linear(2, 2)), name="net"),
    ]
    dist.barrier()
    # Each rank's count of calls stays.
    added = sum(key.startswith("reg_kernels") for key in keys.list_keys())
    dist.barrier()
    found += [
        added,
        _error(check_alike, batches=11 if rank == 1 else 12, epoch=3),
        _error(check_alike, seed=rank, dtype="bf16" if rank == 2 else "half"),
        _error(check_alike, **(dict(batches=1) if rank else dict(seed=1))),
        _error(check_alike, parameters=parameters_of(net)),
        _error(check_alike, process_group=half, batches=rank),
    ]
    if rank == 2:
        keys.wait([f"found {other}" for other in (0, 1, 3)])
    found.append(_error(check_alike, timeout=4, epoch=1))
    keys.set(f"found {rank}", "1")
    found.append(_error(check_alike, timeout=30, epoch=2))
    return found


def test_facts_that_differ_are_named_on_all_ranks(ranks: Ranks) -> None:
    alike = "must be the same on all ranks, got"
    outcome = [
        *(None, None, None, 4),
        (f"check_alike: batches {alike} 12 on ranks 0, 2 and 3, 11 on rank 1", (1,)),
        (
            f"check_alike: seed {alike} 0 on rank 0, 1 on rank 1, 2 on rank 2, others on rank 3; "
            f"dtype {alike} half on ranks 0, 1 and 3, bf16 on rank 2",
            (1, 2, 3),
        ),
        (
            f"check_alike: seed {alike} 1 on rank 0, nothing on ranks 1, 2 and 3; "
            f"batches {alike} nothing on rank 0, 1 on ranks 1, 2 and 3",
            (0,),
        ),
        (
            f"check_alike: parameters[0] {alike} 0.weight (10, 4) torch.float32 on ranks 0, 1 and "
            "2, 0.weight (11, 4) torch.float32 on rank 3",
            (3,),
        ),
        None,
        ("check_alike: rank 2 did not come within 4 s", (2,)),
        None,
    ]
    pair = (f"check_alike: batches {alike} 1 on rank 1, 3 on rank 3", (3,))
    in_pair = [*outcome[:8], pair, *outcome[9:]]
    assert ranks(4, _checks) == [outcome, in_pair, outcome, in_pair]


def test_alone_there_is_nobody_to_differ_from() -> None:
    check_alike(batches=12)
    with guard():
        check_alike(batches=11)
    with pytest.raises(ValueError, match="bad"), guard():
        raise ValueError("bad")


def test_what_is_no_fact_is_refused() -> None:
    message = (
        r"^check_alike: loss must be a number, a string, None, a dtype, a device or a sequence of "
        r"them, got Tensor$"
    )
    with pytest.raises(TypeError, match=message):
        check_alike(loss=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^check_alike: timeout must be positive, got 0$"):
        check_alike(timeout=0)
    with (
        pytest.raises(ValueError, match=r"^guard: timeout must be positive, got -1$"),
        guard(timeout=-1),
    ):
        pass
    with pytest.raises(ValueError, match=r"^FiniteCheck: every must be at least 1, got 0$"):
        FiniteCheck(every=0)
    with pytest.raises(
        ValueError, match=r"^FiniteCheck: value must have one element, got shape \(2,\)$"
    ):
        FiniteCheck()(torch.ones(2), 0)


# NaN.


def _nan(bad: dict[int, tuple[int, float]], dtype: torch.dtype) -> tuple[int, Any]:
    """The step in which FiniteCheck raised on this rank, and what."""
    finite = FiniteCheck(every=4)
    at, value = bad.get(dist.get_rank(), (-1, 0.0))
    for step in range(10):
        loss = torch.tensor([value if step == at else 1.0], dtype=dtype, requires_grad=True)
        found = _error(finite, loss, step)
        if found:
            return step, found
    return 10, _error(finite.read)


def test_a_loss_that_is_not_finite_ends_all_ranks_at_once(ranks: Ranks) -> None:
    nan, inf = float("nan"), float("inf")
    for bad, dtype, outcome in (
        ({}, torch.float32, (10, None)),
        ({1: (5, nan)}, torch.bfloat16, (7, ("nan on rank 1 at step 5", (1,)))),
        ({1: (6, nan), 0: (5, -inf)}, torch.float64, (7, ("-inf on rank 0 at step 5", (0,)))),
        (
            {1: (9, nan), 0: (9, nan)},
            torch.float32,
            (10, ("nan on ranks 0 and 1 at step 9", (0, 1))),
        ),
    ):
        step, found = outcome
        if found:
            found = (f"FiniteCheck: loss must be finite, got {found[0]}", found[1])
        assert ranks(2, _nan, bad, dtype) == [(step, found)] * 2


def _of_a_dtensor() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    finite = FiniteCheck(every=1)
    finite(DTensor.from_local(torch.tensor(1.0), mesh, [Replicate()], run_check=False), 0)
    return _error(lambda: finite(DTensor.from_local(torch.tensor(math.nan), mesh), 1))[0]


def test_a_loss_may_be_a_dtensor(ranks: Ranks) -> None:
    for said in ranks(2, _of_a_dtensor):
        assert said == "FiniteCheck: loss must be finite, got nan on ranks 0 and 1 at step 1"


def test_a_loss_is_checked_without_a_group_too() -> None:
    finite = FiniteCheck(name="penalty")
    finite(torch.tensor(float("inf")), 7)
    found = _error(finite.read)
    assert found == ("FiniteCheck: penalty must be finite, got inf on rank 0 at step 7", (0,))
    finite.read()
    finite(0.5, 8)
    finite(torch.tensor(0.5), 9)
    finite(math.nan, 10)
    found = _error(finite.read)
    assert found == ("FiniteCheck: penalty must be finite, got nan on rank 0 at step 10", (0,))


# Ranks that raise, hang, leave or die.

_HERE = "at test_faults.py:_ in _spoil"


def _held_by_rank_0() -> None:
    """Makes the default group anew, by a store that rank 0 holds, at a port which the system gives
    it: one that was looked for before may be somebody else's by then."""
    me, size, files = dist.get_rank(), dist.get_world_size(), store()
    if me == 0:
        held = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        files.set("port", str(held.port))
    else:
        held = dist.TCPStore("127.0.0.1", int(files.get("port")), size, is_master=False)
    meet("held")
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=held, rank=me, world_size=size)


def _train(rank: int, fault: str, seconds: float, tcp: bool) -> Any:
    """Steps in which a rank commits a fault, collectives waiting for `seconds`: each rank's error,
    the ranks that it names, and the seconds it took. With `tcp`, rank 0 holds the store."""
    if tcp:
        _held_by_rank_0()
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    total = torch.ones(1000)
    start = time.monotonic()
    try:
        with guard(group, timeout=3):
            for step in range(5):
                if step == 3 and dist.get_rank() == rank:
                    if fault == "ends":
                        break
                    _spoil(fault, seconds)
                dist.all_reduce(total, group=group)
    except (RankError, ValueError, KeyboardInterrupt) as error:
        if fault == "raises and ends" and dist.get_rank() == rank:
            die()
        text = re.sub(r"(test_faults.py):\d+", r"\1:_", str(error))
        ranks = error.ranks if isinstance(error, RankError) else None
        return type(error).__name__, text, ranks, time.monotonic() - start
    finally:
        # Connections would close at the end of the call and tell the others.
        time.sleep(2)
    return "through", "", None, 0.0


def _spoil(fault: str, seconds: float) -> None:
    if fault.startswith("raises"):
        raise ValueError("no such\nfile")
    if fault == "is interrupted":
        raise KeyboardInterrupt
    if fault == "hangs":
        time.sleep(seconds + 8)
    if fault == "stops":
        stop(int(seconds) + 12)
    if fault == "dies":
        die()
    if fault == "checks":
        check_alike(batches=1, process_group=None, timeout=1)


LEFT = (
    "rank 1 left the guarded block before the others: do all ranks have the same number of batches?"
)
GONE = "the group's store, which it holds,"
DEAD = "rank 1 died or is stopped: it did not answer within 3 s"
HANGS = f"rank 1 hangs, {_HERE}: its process lives, but came to no collective"
ABSENT = "check_alike: ranks 0, 2 and 3 did not come within 1 s"


# A rank and what it does, the timeout of collectives, whether rank 0 holds the store; what it ends
# with itself, what the others are told, of whom, and in how many seconds. Those are generous: a
# machine under load takes some.
@pytest.mark.parametrize(
    ("rank", "fault", "seconds", "tcp", "own", "told", "named", "within"),
    [
        (1, "raises", 30, False, ("ValueError", "no such\nfile", None),
         f"rank 1 raised ValueError: no such file, {_HERE}", (1,), 25),
        (0, "raises and ends", 30, True, Died(9),
         f"rank 0 raised ValueError: no such file, {_HERE}", (0,), 25),
        (1, "is interrupted", 30, False, ("KeyboardInterrupt", "", None),
         f"rank 1 raised KeyboardInterrupt, {_HERE}", (1,), 25),
        (1, "ends", 30, False, ("through", "", None), LEFT, (1,), 25),
        (1, "checks", 30, False, ("RankError", ABSENT, (0, 2, 3)), ABSENT, (0, 2, 3), 25),
        (1, "hangs", 4, False, ("RankError", HANGS, (1,)), HANGS, (1,), 25),
        (0, "stops", 4, True, None, f"rank 0 hangs: {GONE} did not answer within 5 s", (0,), 25),
        (1, "dies", 30, False, Died(9), DEAD, (1,), 25),
        (0, "dies", 30, True, Died(9), f"rank 0 ended: {GONE} is gone", (0,), 25),
    ],
)  # fmt: skip
def test_the_others_end_with_an_error_that_names_the_rank(
    ranks: Ranks,
    rank: int,
    fault: str,
    seconds: float,
    tcp: bool,
    own: Any,
    told: str,
    named: tuple[int, ...],
    within: float,
) -> None:
    outcomes = [result for _, result in ranks.outcomes(4, _train, rank, fault, seconds, tcp)]
    itself = outcomes.pop(rank)
    if own is not None:
        assert (itself if isinstance(own, Died) else itself[:3]) == own
    assert [one[:3] for one in outcomes] == [("RankError", told, named)] * 3
    assert max(one[3] for one in outcomes) < within


def _dies_between(late: int) -> str:
    for _ in range(2):
        try:
            with guard(timeout=6):
                dist.all_reduce(torch.ones(3))
        except RankError as error:
            return str(error)
        meet("through")
        if dist.get_rank() == 1:
            die()
        if dist.get_rank() == late:
            time.sleep(0.1)  # comes when the others have seen it
    return "through"


@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_dies_between_two_blocks_is_not_told_to_have_had_fewer_batches(
    ranks: Ranks, late: int
) -> None:
    outcomes = [result for _, result in ranks.outcomes(3, _dies_between, late)]
    assert outcomes.pop(1) == Died(9)
    for told in outcomes:
        assert told.startswith("rank 1 left an earlier guarded block and did not come to this one")


def _computes() -> list[str]:
    """What the first rank is warned of while it computes, and the second one has raised."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("reg_kernels.distributed")
    logger.addHandler(handler)
    keys = store()
    with contextlib.suppress(ValueError), guard(timeout=3):
        if dist.get_rank() == 1:
            # In a rank that is still about to enter its block, the block raises.
            keys.wait(["computes"])
            _spoil("raises", 0)
        keys.set("computes", "1")
        until = time.monotonic() + 20
        while not records and time.monotonic() < until:
            time.sleep(0.05)
    logger.removeHandler(handler)
    return [re.sub(r":\d+", ":_", record.getMessage()) for record in records]


def test_a_rank_that_computes_is_warned_of_another_that_raised(ranks: Ranks) -> None:
    assert ranks(2, _computes)[0] == [
        f"guard: rank 1 raised ValueError: no such file, {_HERE}; "
        "this rank is still at test_faults.py:_ in _computes"
    ]


def _again() -> list[Any]:
    """A guarded block that ends well, one in which rank 1 raises when the others are through, and
    the next one."""
    keys, rank = store(), dist.get_rank()
    with guard():
        dist.barrier()
    with contextlib.suppress(ValueError), guard():
        dist.barrier()
        if rank == 1:
            keys.wait(["through"])
            raise ValueError("too late")
    keys.set("raised" if rank == 1 else "through", "1")
    keys.wait(["raised"])

    def block() -> None:
        with guard():
            dist.barrier()

    return [_error(block)]


def test_a_group_in_which_a_rank_raised_is_not_entered_again(ranks: Ranks) -> None:
    error, blamed = ranks(2, _again)[0][0]
    assert re.sub(r":\d+", ":_", error) == (
        "rank 1 raised ValueError: too late, at test_faults.py:_ in _again"
    )
    assert blamed == (1,)


# What a user of torchrun sees.


def _torchrun(fault: str) -> subprocess.Popen[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", str(TRAINING), "1", fault],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_torchrun_shows() -> None:
    # At once, since most of their time is for waiting.
    runs = {fault: _torchrun(fault) for fault in ("raises", "dies", "ends", "stops")}
    shown = {fault: run.communicate(timeout=240)[0] for fault, run in runs.items()}
    assert {run.returncode for run in runs.values()} == {1}, shown
    # The launcher names the first rank that failed, and ends the others.
    assert "ValueError: no such file" in shown["raises"].partition("Root Cause")[2]
    assert re.search(r"Root Cause(.|\n)*rank +: 1 (.|\n)*Signal 9 \(SIGKILL\)", shown["dies"])
    for fault, message in (("ends", LEFT), ("stops", DEAD)):
        assert f"reg_kernels.distributed.RankError: {message}" in shown[fault]


# Two hosts.


def _on(hosts: tuple[Host, Host], rank: int, fault: str) -> list[subprocess.Popen[str]]:
    """A launcher on each host, which has one rank; the first host's holds the store."""
    started = []
    for number, host in enumerate(hosts):
        launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2")
        meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29400")
        where = ("--rdzv-conf", f"is_host={1 - number}", "--local-addr", host.address)
        started.append(
            host.start(
                [*launcher, *meeting, *where, str(TRAINING), str(rank), fault],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def test_two_hosts_train_until_one_loses_power(two_hosts: tuple[Host, Host]) -> None:
    runs = _on(two_hosts, 1, "waits")
    lines = []
    for line in runs[1].stdout or ():
        lines.append(line)
        if line == "waiting at 14\n":  # three steps, in which both take part
            break
    else:
        raise AssertionError("".join(lines))
    # First its cable, so that no closing connection tells of it.
    two_hosts[1].unplug()
    two_hosts[1].kill()
    shown = runs[0].communicate(timeout=240)[0]
    assert f"RankError: {DEAD}" in shown
    assert runs[0].returncode == 1
    runs[1].communicate()
