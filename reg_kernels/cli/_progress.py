"""How far a study is, and how the net in training does, shown while `compare` and `tune` work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.progress import Progress

from ._study import Standing

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 20  # characters of a curve


class Watch:
    """Two bars: the trials of a study, of all processes, and the epochs of this one's net.

    Args:
        progress: where they are shown.
        total: the trials that there are to be, None for as many as the time allows.
        note: what else to say of how things stand.
    """

    def __init__(
        self,
        progress: Progress,
        total: int | None,
        note: Callable[[Standing], str] = lambda standing: "",
    ) -> None:
        self._progress, self._total, self._note = progress, total, note
        self._trials = progress.add_task("", total=total)
        self._net = progress.add_task("", total=None, visible=False)
        self._start = time.monotonic()
        self._before: int | None = None  # done when this began

    def stands(self, standing: Standing) -> None:
        """As `Study.work` tells it."""
        done = len(standing.done) + len(standing.crashed)
        if self._before is None:
            self._before = done
        text = "trials"
        if (new := done - self._before) and self._total is not None:
            left = (time.monotonic() - self._start) / new * (self._total - done)
            text += f", {duration(left)} left"
        if standing.crashed:
            text += f", {len(standing.crashed)} crashed"
        text += self._note(standing)
        self._progress.update(self._trials, completed=done, description=text)
        if not standing.free and standing.running:
            self._progress.update(self._net, description="waiting for other processes")

    def begins(self, name: str, epochs: int) -> None:
        """A net, by name."""
        self._name = name
        self._progress.reset(self._net, total=epochs, description=name, visible=True)

    def epoch(self, done: int, losses: Sequence[float]) -> None:
        """After each of its epochs."""
        text = f"{self._name}, validation loss {losses[-1]:.3f} {sparkline(losses)}"
        self._progress.update(self._net, completed=done, description=text)


def sparkline(values: Sequence[float]) -> str:
    """A curve in a line of text, on a logarithmic scale; what is not positive and finite is
    blank."""
    step = max(1, math.ceil(len(values) / _WIDTH))
    shown = [math.log(v) if 0 < v < math.inf else None for v in values[step - 1 :: step]]
    there = [v for v in shown if v is not None]
    if not there:
        return ""
    low, wide = min(there), max(there) - min(there)
    scale = (len(_BARS) - 1) / wide if wide else 0.0
    return "".join(" " if v is None else _BARS[round((v - low) * scale)] for v in shown)


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
