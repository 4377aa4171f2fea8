"""Stochastic depth's inputs: odd sizes, every layout, with a residual, samples not to be read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..reference._philox import half_words, tag
from ..reference.dropout import rate
from . import Case
from .dropout import P, _channels_last, _contiguous, _strided, _transposed, _values, state


def _kept(x: Tensor, element_offset: int) -> Tensor:
    drawn = half_words(state(x.device), tag("droppath"), element_offset, len(x))
    return (drawn < rate(P)[0]).view(-1, *[1] * (x.dim() - 1))


def _case(
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor] = _contiguous,
    *,
    residual: bool = False,
    poisoned: bool = False,  # NaN in what is dropped
    scale_by_keep: bool = True,
    element_offset: int = 0,
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = layout(_values(shape, device, dtype))
        x = torch.where(_kept(x, element_offset), x, torch.nan) if poisoned else x
        return (x, layout(_values(shape, device, dtype) + 1)) if residual else (x,)

    def function(x: Tensor, r: Tensor | None = None, first: int = 0, **backend: Any) -> Tensor:
        options = {"residual": r, "element_offset": element_offset + first, **backend}
        return F.drop_path(x, P, scale_by_keep=scale_by_keep, rng_state=state(), **options)

    def oracle(x: Tensor, r: Tensor | None = None) -> Tensor:
        scale = rate(P)[1] if scale_by_keep else 1.0
        branch = torch.where(_kept(x, element_offset), x * scale, 0)
        return branch if r is None else r + branch

    words = ["x".join(map(str, shape)), layout.__name__[1:]]
    words += ["residual"] * residual + ["poisoned"] * poisoned
    words += ["unscaled"] * (not scale_by_keep) + [f"from {element_offset}"] * (element_offset > 0)
    shard = None if residual else lambda x, first, **backend: function(x, None, first, **backend)
    facts = {"small": torch.Size(shape).numel() <= 2100, "differentiable": not poisoned}
    facts |= {"draws": True, "shard": shard}
    return Case("drop_path", " ".join(words), inputs, function, oracle, **facts)


_with_residual = functools.partial(_case, residual=True)
CASES = [
    *(_case((1,)), _case((17, 3, 5)), _case((17, 3, 5), scale_by_keep=False)),
    *(_case((11, 33), element_offset=2**33 + 5), _case((17, 65), poisoned=True)),
    *(_with_residual((9,)), _with_residual((17, 3, 5)), _with_residual((17, 65), poisoned=True)),
    *(_with_residual((9, 3, 4, 4), layout) for layout in (_channels_last, _transposed, _strided)),
    _with_residual((17, 3, 5), scale_by_keep=False),
    *(_with_residual((33, 7, 65, 33)), _case((3, 64, 55, 57), _channels_last)),
]
