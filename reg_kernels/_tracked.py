"""What a BatchNorm in training updates, by name. Its op takes it as one list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Tracked(NamedTuple):
    """The tensors that a training forward updates, and None for those that it has not."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Tracked:
        """Names an op's list: the two averages, or the counter, or all three in this order, or
        none."""
        mean, var = tensors[:2] if len(tensors) > 1 else (None, None)
        return cls(mean, var, tensors[-1] if len(tensors) % 2 else None)
