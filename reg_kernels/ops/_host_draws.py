"""What is drawn on the host for a whole batch: in C++, or by the reference where that is not built,
and where what looks at the call, as torch.func, has tensors without memory.

They are no ops: nothing of them is on a device, has a gradient or is compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._extension import extension
from ..reference import _host_draws as reference
from ._modes import watcher


def draw_words(key: int, epoch: int, indices: Tensor, groups: Tensor) -> Tensor:
    """Philox words of counters (index, group, epoch), over 2^32: float64 (4 G, N), in [0, 1).

    Args:
        key: of 64 bits, not negative.
        epoch: below 2^32.
        indices: int64 (N,), on the CPU, contiguous.
        groups: int64 (G,), below 2^32, likewise.
    """
    if _C is None or watcher() is not None:
        return reference.draw_words(key, epoch, indices, groups)
    count, samples = len(groups), len(indices)
    out = torch.empty(4 * count, samples, dtype=torch.float64)
    places = (indices.data_ptr(), samples, groups.data_ptr(), count, out.data_ptr())
    _C.draw_words(key, epoch, *places)
    return out


def first_rectangle(
    u: Tensor, stretches: Tensor, size: Tensor, low: float, span: float, is_crop: bool
) -> tuple[Tensor, int]:
    """Of ten rectangles of a share of an area, the first that fits, anywhere with the same
    probability: top, left, height and width, float64 (4, N), and how many samples have one.

    With a share a = u span + low of the area and a stretch r the sides are sqrt(a r) and
    sqrt(a / r), rounded: of a crop, which is at most as large as the whole, the width and the
    height; else, for what is smaller than the whole both ways, the height and the width. Where
    none fits or the width is 0 the height is 0, and where none fits the width is that of the last.

    Args:
        u: float64 (22, N), in [0, 1): of the shares, ten others, and of top and left.
        stretches: float64 (10, N).
        size: float64 (2, N), height and width of the whole. All are contiguous, on the CPU.
    """
    if _C is None or watcher() is not None:
        return reference.first_rectangle(u, stretches, size, low, span, is_crop)
    samples = u.shape[1]
    out = torch.empty(4, samples, dtype=torch.float64)
    places = (u.data_ptr(), stretches.data_ptr(), size.data_ptr(), samples)
    return out, _C.first_rectangle(*places, low, span, is_crop, out.data_ptr())


_C = extension()
