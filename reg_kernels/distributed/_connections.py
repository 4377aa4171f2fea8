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
from collections.abc import Collection
from pathlib import Path

_ESTABLISHED = "01"
_PROC = Path("/proc/self")


Ends = tuple[str, str]  # the local and the remote end, as /proc writes them


def connections(*, except_port: int | None = None) -> set[Ends]:
    """The TCP connections of this process, but for those with `except_port`, the store's, at either
    end."""
    return {
        ends
        for ends in _by_descriptor().values()
        if except_port not in {int(end.rpartition(":")[2], 16) for end in ends}
    }


def hang_up(ends: Collection[Ends]) -> None:
    """Shuts down these connections of this process."""
    for descriptor, pair in _by_descriptor().items():
        if pair in ends:
            # A duplicate is shut down and closed: the descriptor itself is left to its owner.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as mine:
                mine.shutdown(socket.SHUT_RDWR)


def _by_descriptor() -> dict[int, Ends]:
    """The connection that each of this process's descriptors stands for."""
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
                if pair:
                    found[int(link.name)] = pair
    return found


def _plain(end: str) -> str:
    """An end in IPv4's form if it is an IPv4 address that IPv6's table lists: the two ends of a
    connection may stand in different tables."""
    return end.removeprefix("0000000000000000FFFF0000")
