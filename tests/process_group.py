"""Processes that are the ranks of a gloo group on this machine, for tests of what ranks do.

A pool keeps its processes from test to test, since to start one and import torch takes seconds.
Each call gets a process group of its own, which ends with it. What a test sends to the ranks is a
function of its module, found there by its name; arguments and results are pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

_TIMEOUT = 120.0  # seconds: of a collective that waits for a rank
_STARTING = 60.0  # seconds more, in which a machine under load starts the processes


class Died(NamedTuple):
    """Stands for the result of a rank whose process ended without one."""

    exit_code: int | None


def _serve(tasks: Connection) -> None:
    """What a rank's process does: one call after the other, each in a group of its own."""
    torch.set_num_threads(1)
    while True:
        try:
            task = tasks.recv()
        except EOFError:
            return
        try:
            function, arguments, rank, size, path, timeout = task
            torch.manual_seed(0)
            dist.init_process_group(
                *("gloo", f"file://{path}"),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
            try:
                # One that ends at once would cut off another that is still connecting.
                meet("connected")
                answer = (True, function(*arguments))
            finally:
                dist.destroy_process_group()
        except BaseException as error:
            answer = (False, (f"{type(error).__name__}: {error}", traceback.format_exc()))
        tasks.send(answer)


class Ranks:
    """A pool of processes: `ranks(2, function, *arguments)` is what function(*arguments) returned
    on rank 0 and on rank 1.

    In the function `torch.distributed` has a default group, the generator is seeded with 0 and
    torch runs one thread.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def __call__(
        self,
        size: int,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float = _TIMEOUT,
    ) -> list[Any]:
        """The results in the order of ranks. The first rank that raised or died fails the call."""
        results = self.outcomes(size, function, *arguments, timeout=timeout)
        for rank, (well, result) in enumerate(results):
            if not well:
                text = result if isinstance(result, Died) else result[1]
                raise AssertionError(f"rank {rank} of {size}: {text}")
        return [result for _, result in results]

    def outcomes(
        self,
        size: int,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float = _TIMEOUT,
    ) -> list[tuple[bool, Any]]:
        """For each rank (True, its result), (False, (its error in a line, the traceback)), or
        (False, Died) where its process ended. Collectives wait for `timeout` seconds."""
        self._start(size)
        workers = self._workers[:size]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            for rank, (_, tasks) in enumerate(workers):
                tasks.send((function, arguments, rank, size, path, timeout))
            return self._gather(workers, time.monotonic() + timeout * 2 + _STARTING)

    def _gather(
        self, workers: Sequence[tuple[Any, Connection]], until: float
    ) -> list[tuple[bool, Any]]:
        results: dict[int, tuple[bool, Any]] = {}
        while len(results) < len(workers):
            open_ = {w[1]: rank for rank, w in enumerate(workers) if rank not in results}
            ready = wait(list(open_), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                raise AssertionError(f"ranks {sorted(open_.values())} gave no answer in time")
            for tasks in ready:
                rank = open_[tasks]  # type: ignore[index]
                try:
                    results[rank] = tasks.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    process = workers[rank][0]
                    process.join()
                    results[rank] = (False, Died(process.exitcode))
        if any(isinstance(result, Died) for _, result in results.values()):
            self.close()
        return [results[rank] for rank in range(len(workers))]

    def close(self) -> None:
        """Ends the processes; a next call starts others."""
        for process, tasks in self._workers:
            tasks.close()
            process.kill()
            process.join()
        self._workers = []


@contextmanager
def running_ranks() -> Iterator[Ranks]:
    """A pool for a test module: `@pytest.fixture(scope="module")` yields from it."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()


def store() -> Any:
    """Where ranks tell each other how far they are, past all collectives."""
    return dist.distributed_c10d._get_default_group().get_group_store()


def meet(name: str) -> None:
    """Waits until all ranks have come to the place of this name, without a collective."""
    store().set(f"{name} {dist.get_rank()}", "1")
    store().wait([f"{name} {rank}" for rank in range(dist.get_world_size())])


def die() -> None:
    """Ends this rank's process as a crash would, without a word to the others."""
    os._exit(9)


def stop(seconds: int) -> None:
    """Stops this rank's process, as a debugger would; another one continues it, in a session of its
    own, since torchrun ends a rank with all of its session."""
    continued = f"sleep {seconds}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", continued], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)
