"""Runs programs that must not run for ever.

A watchdog is there for what hangs, not for what is slow, and a clock cannot tell them apart where
the machine has other work. So it is processor time that is limited, that of each process by itself.
What hangs without using any is stopped by a clock, which stands so far off that load alone never
gets there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

SECONDS = 600  # of processor time: several times what the longest compile takes on a slow machine
CLOCK = 10  # times as long a program may take by the clock

# The shell sets the limit before it becomes the program; in Python, that would run between fork and
# exec, where threads may hold locks. The soft one alone: it ends with a signal of its own.
_LIMITED = 'ulimit -c 0; ulimit -S -t "$0" && exec "$@"'


def run(
    command: Sequence[object],
    seconds: int = SECONDS,
    *,
    together: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """What a program printed and its exit code, once it is done.

    Args:
        command: the program, by its path or found on PATH, and its arguments.
        seconds: of processor time that each of its processes may take.
        together: stderr goes to stdout.
        options: of subprocess.Popen.

    Raises:
        TimeoutError: it took longer. All that it started has been killed by then.
    """
    words = [str(word) for word in command]
    process = subprocess.Popen(
        ["/bin/sh", "-c", _LIMITED, str(seconds), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if together else subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all it started can be killed with it
        **{"stdin": subprocess.DEVNULL} | options,
    )
    try:
        out, err = process.communicate(timeout=seconds * CLOCK)
        said = None
    except subprocess.TimeoutExpired:
        said = f"still ran after {seconds * CLOCK} s, {seconds} s of processor time not used up"
        _kill(process)
        out, err = process.communicate()
    except BaseException:
        _kill(process)
        process.communicate()
        raise
    if process.returncode == -signal.SIGXCPU:
        said = f"took more than {seconds} s of processor time"
    if said is not None:
        raise TimeoutError(f"{words[0]} {said}: {out}{err or ''}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
