"""How `train` keeps what it has trained, and goes on from there."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._errors import UsageError
from ._files import write_result
from ._trainer.checkpoint import load_checkpoint, save_checkpoint
from ._trainer.parallel import Ranks
from ._trainer.training import Training

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY = 10.0  # seconds: what a kill may lose


class Checkpoint:
    """The state at the end of the last epoch: kept in memory, written now and then. Of several
    ranks the first one does both."""

    def __init__(
        self,
        path: Path,
        options: dict[str, Any],
        training: Training,
        ranks: Ranks,
        on_disk: bool,
    ) -> None:
        self.path = path
        self.on_disk = on_disk  # whether the file is of this run, perhaps of an earlier epoch
        self._options = options
        self._training = training
        self._ranks = ranks
        self._state = training.state()
        self._written = time.monotonic()

    def take(self) -> None:
        """Notes the end of an epoch; an interruption from here on goes back no further."""
        # One assignment: Ctrl-C while the state is copied leaves the previous one whole.
        self._state = self._training.state()

    def write_in_time(self) -> None:
        if time.monotonic() - self._written >= CHECKPOINT_EVERY:
            self.write()

    def write(self) -> None:
        write_result(self.path, lambda path: save_checkpoint(path, self._options, self._state))
        self._written = time.monotonic()
        self.on_disk = True

    def keep(self) -> UsageError | None:
        """Writes it as the last thing. Returns a failure, which leaves the file as it was."""
        if not self._ranks.first:
            return None
        try:
            self.write()
        except UsageError as error:
            return error
        return None


def resume(training: Training, path: Path, options: dict[str, Any], ranks: Ranks) -> None:
    """Brings `training` to the state of the checkpoint at `path`, which must be of this run."""
    try:
        saved, state = ranks.from_first(lambda: load_checkpoint(path))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--resume: must name a checkpoint, got {path}: {reason}") from None
    except ValueError:
        raise _damaged(path) from None
    for name, here in options.items():
        there = saved.get(name)
        # Only values that print on one line are shown; all of ours do.
        if type(there) is not type(here) or not str(there)[:100].isprintable():
            raise _damaged(path)
        if there != here:
            where = f"{str(there)[:100]} there, {here} here"
            raise UsageError(f"--resume: {path} is of another run: {name} {where}")
    try:
        training.restore(state)
    except Exception:  # a wrong state may raise anything
        raise _damaged(path) from None


def _damaged(path: Path) -> UsageError:
    return UsageError(
        f"--resume: must name a whole checkpoint of `train`, got a damaged or other file: {path}"
    )


@contextlib.contextmanager
def no_interrupt() -> Iterator[None]:
    """Keeps an impatient second Ctrl-C from stopping what saves the work of the first, and so a
    launcher's."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(kind, signal.SIG_IGN) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, previous, strict=True):
            signal.signal(kind, handler)
