"""TCP connections between the processes of a group: which there are, and how to end them.

A rank that waits in a collective of gloo gives up when a connection closes, and not before its
timeout otherwise. gloo has no call that ends a collective (`abort` and `shutdown` leave it waiting,
torch 2.13), and its connections stay open while anything holds the group, which a model under
DistributedDataParallel does. So a rank that was told of another's failure closes its connections
with the other ranks itself: what waits on them ends as it would if their processes had died.

Linux lists a process's connections in /proc. Elsewhere there are none to see, and a rank waits for
the group's timeout.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

_ESTABLISHED = "01"
_PROC = Path("/proc/self")


def connections(*, except_port: int | None = None) -> list[tuple[str, str]]:
    """The local and the remote end of each TCP connection of this process, as /proc writes them.

    Connections with `except_port` at either end, the store's, are left out.
    """
    return sorted(set(_by_descriptor(except_port).values()))


def hang_up(theirs: Iterable[tuple[str, str]]) -> int:
    """Shuts down this process's ends of the connections that another process listed as its own,
    and returns how many they were."""
    mirrored = {(remote, local) for local, remote in theirs}
    count = 0
    for descriptor, ends in _by_descriptor(None).items():
        if ends in mirrored:
            # A duplicate is shut down and closed: the descriptor itself is left to its owner.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as mine:
                mine.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _by_descriptor(except_port: int | None) -> dict[int, tuple[str, str]]:
    """Both ends of the connection that each of this process's descriptors stands for."""
    ends = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                _, local, remote, state, *_, inode = line.split()[:10]
                if state == _ESTABLISHED:
                    ends[f"socket:[{inode}]"] = (_plain(local), _plain(remote))
    found = {}
    with contextlib.suppress(OSError):
        for link in (_PROC / "fd").iterdir():
            # A descriptor may have been closed since the folder was listed.
            with contextlib.suppress(OSError):
                pair = ends.get(str(link.readlink()))
                if pair and except_port not in {_port(end) for end in pair}:
                    found[int(link.name)] = pair
    return found


def _plain(end: str) -> str:
    """An end in IPv4's form if it is an IPv4 address that IPv6's table lists: the two ends of a
    connection may stand in different tables."""
    return end.removeprefix("0000000000000000FFFF0000")


def _port(end: str) -> int:
    return int(end.rpartition(":")[2], 16)
