"""Residual branches of a subset of samples: odd sizes, every layout, all kept, none kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.subset import Subset, add_of_subset
from . import Case
from .dropout import _channels_last, _contiguous, _misaligned, _strided, _transposed, _values


def _case(
    op: str,
    shape: tuple[int, ...],
    kept: int,
    layout: Callable[[Tensor], Tensor] = _contiguous,
    weighted: bool = False,
) -> Case:
    """Of the `op`, as a block calls it. `weighted`: the branch has a parameter, of the last
    dimension's size."""
    samples = shape[0]
    # Not in order, but as a permutation has them.
    order = torch.tensor(sorted(range(samples), key=lambda n: n * 7919 % 31), dtype=torch.int64)
    scale = samples / max(kept, 1)

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = layout(_values(shape, device, dtype))
        return (x, _values(shape[-1:], device, dtype)) if weighted else (x,)

    def branch(x: Tensor, *weight: Tensor) -> Tensor:
        return x * weight[0] if weighted else -x

    def function(x: Tensor, *weight: Tensor, backend: str | None = None) -> Tensor:
        rows = order.to(x.device)
        subset = Subset(rows[:kept], rows[kept:])
        return add_of_subset(x, lambda x: branch(x, *weight), subset, scale, backend)

    def oracle(x: Tensor, *weight: Tensor) -> Tensor:
        rows = order[:kept].to(x.device)
        return x.index_add(0, rows, branch(x.index_select(0, rows), *weight) * scale)

    name = f"{'x'.join(map(str, shape))} {layout.__name__[1:]} {kept} kept"
    facts: dict[str, Any] = {"small": torch.Size(shape).numel() <= 2100, "draws": True}
    facts["exact"] = not weighted
    return Case(op, name + " weighted" * weighted, inputs, function, oracle, **facts)


CASES = [
    *(_case("subset", shape, kept) for shape, kept in (((2,), 1), ((17, 3, 5), 8), ((9, 65), 4))),
    *(_case("subset", (1, 5), kept) for kept in (0, 1)),
    *(_case("subset", (7, 3, 5), 3, layout) for layout in (_transposed, _strided, _misaligned)),
    *(_case("subset", shape, kept) for shape, kept in (((0, 3), 0), ((4, 0), 2), ((5, 3), 5))),
    _case("subset_add", (5, 2), 2, weighted=True),
    _case("subset_add", (9, 3, 4, 4), 5, _channels_last, weighted=True),
    _case("subset_add", (3, 64, 29, 27), 1, _channels_last, weighted=True),
    _case("subset_add", (33, 7, 33, 33), 16),
]
