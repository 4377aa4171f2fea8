"""What a pipeline drew for a batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Params:
    """What a `Pipeline` drew for a batch, to do the same to masks, boxes and points.

    Attributes:
        table: float64 (N, columns), on the CPU: a row for each sample.
        columns: the columns' names: index and epoch, which the draws are keyed by, and height and
            width of the image; then those of each transform, as "RandomRotation.angle", the second
            of its kind as "RandomRotation2.angle". Where a transform has a `p` below 1, its column
            `applied` is 1 or 0. The transforms' documentation says what the others mean. Of a Mixup
            they are Mixup.partner, a row of the batch; lam, what the sample's own pixels weigh
            outside of the box; x1, y1, x2, y2, the partner's box, empty for none; and label_lam,
            what its own label weighs.
        pipeline: what drew them: the transforms, as a string, and how it does their geometry.

    It may be saved by `torch.save` and loaded by `torch.load`.
    """

    def __init__(self, table: Tensor, columns: tuple[str, ...], pipeline: str) -> None:
        self.table = table
        self.columns = columns
        self.pipeline = pipeline

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, column: str) -> Tensor:
        """A column, (N,), by its name."""
        if column not in self.columns:
            raise KeyError(f"Params: column must be one of {', '.join(self.columns)}, got {column}")
        return self.table[:, self.columns.index(column)]

    def __repr__(self) -> str:
        return f"Params({len(self)} samples of {len(self.columns)} columns)"


torch.serialization.add_safe_globals([Params])
