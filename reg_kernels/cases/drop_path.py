"""Stochastic depth's inputs: odd sizes, every layout, with a residual, samples not to be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..reference._philox import half_words, tag
from ..reference.dropout import rate
from . import Case
from .dropout import P, _channels_last, _contiguous, _strided, _transposed, _values, state


def _kept(x: Tensor, element_offset: int, rng_state: Tensor | None = None) -> Tensor:
    rng_state = state() if rng_state is None else rng_state
    drawn = half_words(rng_state.to(x.device), tag("droppath"), element_offset, len(x))
    return (drawn < rate(P)[0]).view(-1, *[1] * (x.dim() - 1))


def _case(shape: tuple[int, ...], *what: str, layout: Any = _contiguous, offset: int = 0) -> Case:
    """`what`: with a "residual", "poisoned" by NaN in what is dropped, "unscaled", of one draw for
    the "batch"."""

    # Of one draw for all, these two are one that keeps and one that drops.
    drawn = state() + 1 if what == ("batch",) else state()

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = layout(_values(shape, device, dtype))
        x = torch.where(_kept(x, offset), x, torch.nan) if "poisoned" in what else x
        return (x, layout(_values(shape, device, dtype) + 1)) if "residual" in what else (x,)

    def function(x: Tensor, r: Tensor | None = None, first: int = 0, **backend: Any) -> Tensor:
        options = {"scale_by_keep": "unscaled" not in what, "rng_state": drawn, **backend}
        mode = "batch" if "batch" in what else "row"
        return F.drop_path(x, P, residual=r, mode=mode, sample_offset=offset + first, **options)

    def oracle(x: Tensor, r: Tensor | None = None) -> Tensor:
        scale = 1.0 if "unscaled" in what else rate(P)[1]
        kept = _kept(x[None], 0, drawn)[0] if "batch" in what else _kept(x, offset)
        branch = torch.where(kept, x * scale, 0)
        return branch if r is None else r + branch

    name = " ".join(["x".join(map(str, shape)), layout.__name__[1:], *what])
    facts = {"small": torch.Size(shape).numel() <= 2100, "draws": True}
    facts["differentiable"] = "poisoned" not in what
    if "residual" not in what and "batch" not in what:
        facts["shard"] = lambda x, first, **backend: function(x, None, first, **backend)
    return Case("drop_path", name, inputs, function, oracle, **facts)


CASES = [
    *(_case((1,)), _case((17, 3, 5)), _case((17, 3, 5), "unscaled"), _case((17, 65), "poisoned")),
    *(_case((9,), "residual"), _case((17, 3, 5), "residual"), _case((11, 33), offset=2**33 + 5)),
    *(_case((17, 3, 5), "residual", "unscaled"), _case((17, 65), "residual", "poisoned")),
    *(_case((7, 3, 5), "residual", layout=layout) for layout in (_transposed, _strided)),
    *(_case((33, 7, 33, 33), "residual"), _case((9, 3, 4, 4), "residual", layout=_channels_last)),
    _case((3, 64, 29, 27), layout=_channels_last),
    *(_case((5, 3, 7), "batch", "residual"), _case((5, 3, 4, 4), "batch", layout=_channels_last)),
]
