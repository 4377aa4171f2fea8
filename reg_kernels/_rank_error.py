"""The error that names ranks, for whoever finds that they differ or fail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LISTED = 8  # ranks, before a message counts the others


class RankError(RuntimeError):
    """Raised on each rank that lives when ranks died, hang, raised or differ.

    Attributes:
        ranks: The ranks at fault, as the default group counts them, in order. It is empty where
            no rank is: the launcher that holds the group's store is gone.
        reason: The message, one line.
    """

    __module__ = "reg_kernels.distributed"  # where users find it, and tracebacks say it is

    def __init__(self, reason: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.ranks = tuple(sorted(ranks))

    def __reduce__(self) -> tuple[type[RankError], tuple[str, tuple[int, ...]]]:
        return type(self), (self.reason, self.ranks)


def named(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 0, 2 and 3`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    words = [str(rank) for rank in ranks]
    if len(words) > _LISTED:
        words[_LISTED:] = [f"{len(words) - _LISTED} others"]
    return f"ranks {', '.join(words[:-1])} and {words[-1]}"
