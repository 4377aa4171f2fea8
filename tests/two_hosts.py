"""Two hosts for tests of training over a network: namespaces of this machine, joined by a cable.

Each has a network of its own, with one address and the loopback; files and processes they share.
To make them takes Linux, root, and `ip` of iproute2.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "rk0"  # of each host, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
_numbers = itertools.count()


class NoHosts(Exception):
    """Says why this machine makes none."""


@dataclass(frozen=True)
class Host:
    """A network namespace and its address."""

    name: str
    address: str

    def start(
        self, command: Sequence[str | Path], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A process on this host, as subprocess.Popen starts it, with collectives on its cable."""
        interfaces = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), INTERFACE)
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env={**(env or os.environ), **interfaces},
            text=True,
            **options,
        )

    def unplug(self) -> None:
        """Takes the host's cable out: what it sends is lost, and nobody is told."""
        _ip("-n", self.name, "link", "set", INTERFACE, "down")

    def kill(self) -> None:
        """Ends all of its processes at once, as a loss of power does."""
        for pid in _ip("netns", "pids", self.name).split():
            # One may have ended by itself since they were listed, when its parent had gone.
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def running_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other; with their processes they end with the block.

    Raises:
        NoHosts: If this machine cannot make them.
    """
    if shutil.which("ip") is None:
        raise NoHosts("needs `ip` of iproute2")
    prefix = f"rk{os.getpid()}n{next(_numbers)}"
    hosts = Host(f"{prefix}a", "10.213.77.1"), Host(f"{prefix}b", "10.213.77.2")
    made: list[Host] = []
    try:
        try:
            for host in hosts:
                _ip("netns", "add", host.name)
                made.append(host)
            ends = ("name", INTERFACE, "netns")
            _ip(
                *("link", "add", *ends, hosts[0].name, "type", "veth"), "peer", *ends, hosts[1].name
            )
            for host in hosts:
                _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
                for interface in ("lo", INTERFACE):
                    _ip("-n", host.name, "link", "set", interface, "up")
        except subprocess.CalledProcessError as error:
            raise NoHosts(
                f"needs rights to make network namespaces: {error.stderr.strip()}"
            ) from None
        yield hosts
    finally:
        for host in made:
            host.kill()
            _ip("netns", "delete", host.name)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
