"""Curves for TensorBoard, which the extra `tensorboard` brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import UsageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOGS = "tensorboard"


def make_room(out: Path, resumed: bool) -> None:
    """Makes the folder of the curves. What an earlier training left there is removed, or kept
    where this one goes on with it."""
    folder = out / LOGS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    if not resumed:
        for path in folder.glob("*/events.out.tfevents.*"):
            path.unlink(missing_ok=True)


class Curves:
    """Writes each run's measures to a folder of its name below `out`, epoch by epoch."""

    def __init__(self, out: Path) -> None:
        self._folder = out / LOGS
        self._writers: dict[str, SummaryWriter] = {}

    def add(self, run: str, epoch: int, row: Mapping[str, float]) -> None:
        """Writes the measures `row` of a run's epoch, which counts from 1."""
        # Imported here: it takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        try:
            if run not in self._writers:
                # What a stopped training wrote of this epoch and later ones does not count.
                self._writers[run] = SummaryWriter(
                    str(self._folder / run.replace(", ", "_").replace(" ", "_")), purge_step=epoch
                )
            for name, value in row.items():
                self._writers[run].add_scalar(name.replace("_", "/", 1), value, epoch)
            self._writers[run].flush()
        except OSError as error:
            raise _unwritable(self._folder, error) from None

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"--tensorboard: cannot write to {folder}: {error.strerror or error}")
