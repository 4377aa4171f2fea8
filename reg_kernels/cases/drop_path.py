"""Stochastic depth's inputs: batches of every layout and of odd sizes, with and without a residual,
and samples that must not be read."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from ..reference._philox import half_words, tag
from ..reference.dropout import rate
from . import Case
from .dropout import P, _channels_last, _contiguous, _strided, _transposed, _values, state


def _kept(count: int, device: torch.device, element_offset: int) -> Tensor:
    return half_words(state(device), tag("droppath"), element_offset, count) < rate(P)[0]


def _case(
    shape: tuple[int, ...],
    layout=_contiguous,
    *,
    residual: bool = False,
    scale_by_keep: bool = True,
    element_offset: int = 0,
    poisoned: bool = False,
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = layout(_values(shape, device, dtype))
        if poisoned:
            dropped = ~_kept(len(x), device, element_offset)
            x[dropped] = float("nan")
        return (x, layout(_values(shape, device, dtype) + 1)) if residual else (x,)

    def function(x: Tensor, r: Tensor | None = None, backend: str | None = None) -> Tensor:
        options = {"scale_by_keep": scale_by_keep, "residual": r, "rng_state": state()}
        return F.drop_path(x, P, element_offset=element_offset, backend=backend, **options)

    def oracle(x: Tensor, r: Tensor | None = None) -> Tensor:
        kept = _kept(len(x), x.device, element_offset).view(-1, *[1] * (x.dim() - 1))
        branch = torch.where(kept, x * (rate(P)[1] if scale_by_keep else 1.0), 0)
        return branch if r is None else r + branch

    words = [
        *("x".join(map(str, shape)), layout.__name__[1:]),
        *(["residual"] if residual else []),
        *([] if scale_by_keep else ["unscaled"]),
        *([f"offset {element_offset}"] if element_offset else []),
        *(["poisoned"] if poisoned else []),
    ]
    return Case(
        op="drop_path",
        name=" ".join(words),
        inputs=inputs,
        function=function,
        oracle=oracle,
        small=torch.Size(shape).numel() <= 2100,
        differentiable=not poisoned,
    )


CASES = [
    _case((1,)),
    _case((9,), residual=True),
    _case((17, 3, 5)),
    _case((17, 3, 5), residual=True),
    _case((17, 3, 5), scale_by_keep=False),
    _case((17, 3, 5), residual=True, scale_by_keep=False),
    _case((9, 3, 4, 4), _channels_last, residual=True),
    _case((7, 3, 5), _transposed, residual=True),
    _case((7, 3, 5), _strided, residual=True),
    _case((11, 33), element_offset=2**33 + 5),
    _case((17, 65), poisoned=True),
    _case((17, 65), residual=True, poisoned=True),
    _case((33, 7, 65, 33), residual=True),
    _case((3, 64, 55, 57), _channels_last),
]
