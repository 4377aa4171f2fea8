"""What the ranks of a process group tell each other through its store, past all collectives.

The store is the table of keys that torch's rendezvous hands to each rank: a server in torchrun's
agent or in rank 0, or a file. It answers while a collective hangs, whatever the device.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from .._numbers import refuse
from .._rank_error import RankError

if dist.is_available():
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

T = TypeVar("T")


class StoreLost(Exception):
    """The store is gone, or did not answer."""

    def __init__(self, seconds: float | None = None) -> None:
        self.gone = seconds is None
        super().__init__("is gone" if self.gone else f"did not answer within {seconds:g} s")


@dataclass(frozen=True)
class Group:
    """A rank's view of its process group.

    The store is a connection of this object's own: torch's is locked while another thread waits
    on it.
    """

    rank: int  # in the group, as all keys have it
    size: int
    global_ranks: tuple[int, ...]  # what messages name
    timeout: float  # seconds that a collective waits
    device: torch.device  # of numbers that a collective sends: the CPU where the group can
    store: Store
    host: int | str | None  # the global rank that holds the store, torchrun's address, or a file's
    port: int | None  # of the store's server

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None, op: str) -> Group | None:
        """None where this process has nobody to talk to: there is no group, it has one rank, or
        it is not this process's."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        if _is_of_others(process_group):
            return None
        check_group(op, process_group)
        group = process_group or dist.distributed_c10d._get_default_group()
        if group.size() == 1:
            return None
        server = store = group.get_group_store()
        while isinstance(server, PrefixStore):
            server = server.underlying_store
        host: int | str | None = None
        if isinstance(server, TCPStore):
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            host = f"{server.host}:{server.port}" if agent else 0
        devices = {device.type: device for device in group._device_types}
        device = devices.get("cpu", group._device_types[0])
        return cls(
            rank=group.rank(),
            size=group.size(),
            global_ranks=tuple(dist.get_process_group_ranks(group)),
            timeout=group._get_backend(device).options._timeout.total_seconds(),
            device=device,
            store=PrefixStore("reg_kernels", store.clone()),  # type: ignore[attr-defined]
            host=host,
            port=server.port if isinstance(server, TCPStore) else None,
        )

    @property
    def holds_store(self) -> bool:
        return self.host == self.global_ranks[self.rank]

    def get(self, key: str) -> str | None:
        """The value of a key, None where it has none yet."""
        return self.store.get(key).decode() if self.store.check([key]) else None

    def ask(self, seconds: float, question: Callable[[], T]) -> T:
        """What `question` returns, which talks to the store.

        Raises StoreLost where the store fails, or `seconds` pass: a server that is stopped, or
        cut off from the network, keeps its client waiting without end.
        """
        answers: list[T] = []
        errors: list[BaseException] = []

        def answer() -> None:
            try:
                answers.append(question())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=answer, name="reg_kernels store", daemon=True)
        thread.start()
        thread.join(seconds)
        if answers:
            return answers[0]
        if not errors:
            raise StoreLost(seconds)
        # torch raises a bare RuntimeError where it cannot use the file of a FileStore.
        if isinstance(errors[0], RankError) or not isinstance(errors[0], RuntimeError):
            raise errors[0]
        raise StoreLost from errors[0]

    def lost(self, error: StoreLost) -> RankError:
        """What it means that the store is lost."""
        if self.host is None:
            return RankError(f"the group's store, a file, {error}")
        if isinstance(self.host, str):
            return RankError(f"the group's store, in torchrun's agent at {self.host}, {error}")
        state = "ended" if error.gone else "hangs"
        return RankError(
            f"rank {self.host} {state}: the group's store, which it holds, {error}", [self.host]
        )


def _is_of_others(process_group: Any) -> bool:
    """Whether it is what new_group returns where this process is not in the group."""
    return process_group is not None and process_group is dist.GroupMember.NON_GROUP_MEMBER


def check_group(op: str, process_group: Any) -> None:
    """Raises unless it is None, or a group that this process is in."""
    if _is_of_others(process_group):
        refuse(op, "process_group", "one that this process is in", "another one", ValueError)
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        got = type(process_group).__name__
        refuse(op, "process_group", "a ProcessGroup or None", got, TypeError)


@dataclass(frozen=True)
class Gathered:
    """The ranks' values in their order; or else, which of the global ranks brought none."""

    values: list[str]
    absent: list[int]


def gather(
    group: Group, key: str, value: str, deadline: float, stop: Callable[[], None]
) -> Gathered:
    """Each rank's `value`, or which ranks brought none before `deadline` (time.monotonic).

    All ranks come to the same answer, a late one too: the first that has one writes it down.
    `stop` is called while this rank waits and raises where that is in vain.
    """
    store = group.store
    store.set(f"{key}/{group.rank}", value)
    keys = [f"{key}/{rank}" for rank in range(group.size)]
    pause = 0.001
    while not store.check(keys) and not store.check([f"{key}/verdict"]):
        if time.monotonic() > deadline:
            absent = [str(rank) for rank, one in enumerate(keys) if not store.check([one])]
            store.compare_set(f"{key}/verdict", "", " ".join(absent) or "all")
            break
        stop()
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    verdict = store.compare_set(f"{key}/verdict", "", "all").decode()
    if verdict != "all":
        return Gathered([], [group.global_ranks[int(rank)] for rank in verdict.split()])
    values = [one.decode() for one in store.multi_get(keys)]
    # The last reader clears the table, so that a job of many epochs does not fill it.
    if store.add(f"{key}/read", 1) == group.size:
        for one in (*keys, f"{key}/verdict", f"{key}/read"):
            store.delete_key(one)
    return Gathered(values, [])


def digest(text: str) -> str:
    """A short stand-in for a text that may be long."""
    return hashlib.sha256(text.encode()).hexdigest()
