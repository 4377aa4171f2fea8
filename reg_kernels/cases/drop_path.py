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


def _case(
    shape: tuple[int, ...],
    *what: str,
    layout: Any = _contiguous,
    offset: int = 0,
    scale: tuple[int, ...] | None = None,
) -> Case:
    """`what`: with a "residual", "poisoned" by NaN in what is dropped, "unscaled", of one draw for
    the "batch". `scale`: the shape of a layer scale."""

    # Of one draw for all, these two are one that keeps and one that drops.
    drawn = state() + 1 if what == ("batch",) else state()

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = layout(_values(shape, device, dtype))
        x = torch.where(_kept(x, offset), x, torch.nan) if "poisoned" in what else x
        r = [layout(_values(shape, device, dtype) + 1)] if "residual" in what else []
        return (x, *r) if scale is None else (x, *r, _values(scale, device, dtype))

    def beside(given: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        """The residual and the layer scale."""
        r = given[0] if "residual" in what else None
        return r, given[-1] if scale is not None else None

    def function(x: Tensor, *given: Tensor, first: int = 0, **backend: Any) -> Tensor:
        residual, layer_scale = beside(given)
        options = {"scale_by_keep": "unscaled" not in what, "rng_state": drawn, **backend}
        options |= {"mode": "batch" if "batch" in what else "row", "layer_scale": layer_scale}
        return F.drop_path(x, P, residual=residual, sample_offset=offset + first, **options)

    def oracle(x: Tensor, *given: Tensor) -> Tensor:
        residual, layer_scale = beside(given)
        factor = 1.0 if "unscaled" in what else rate(P)[1]
        kept = _kept(x[None], 0, drawn)[0] if "batch" in what else _kept(x, offset)
        branch = torch.where(kept, x * (factor if layer_scale is None else layer_scale * factor), 0)
        return branch if residual is None else residual + branch

    of_scale = [] if scale is None else ["scale", "x".join(map(str, scale))]
    name = " ".join(["x".join(map(str, shape)), layout.__name__[1:], *what, *of_scale])
    facts = {"small": torch.Size(shape).numel() <= 2100, "draws": True}
    facts |= {"differentiable": "poisoned" not in what, "exact": scale is None}
    if "residual" not in what and "batch" not in what and scale is None:
        facts["shard"] = function
    return Case("drop_path", name, inputs, function, oracle, **facts)


CASES = [
    *(_case((1,)), _case((17, 3, 5)), _case((17, 3, 5), "unscaled"), _case((17, 65), "poisoned")),
    *(_case((9,), "residual"), _case((17, 3, 5), "residual"), _case((11, 33), offset=2**33 + 5)),
    *(_case((17, 3, 5), "residual", "unscaled"), _case((17, 65), "residual", "poisoned")),
    *(_case((7, 3, 5), "residual", layout=layout) for layout in (_transposed, _strided)),
    *(_case((33, 7, 33, 33), "residual"), _case((9, 3, 4, 4), "residual", layout=_channels_last)),
    _case((3, 64, 29, 27), layout=_channels_last),
    *(_case((5, 3, 7), "batch", "residual"), _case((5, 3, 4, 4), "batch", layout=_channels_last)),
    *(_case((9, 3, 5), scale=(5,)), _case((9, 3, 5), "residual", "unscaled", scale=(1, 3, 1))),
    _case((5, 3, 4), "batch", "residual", scale=(4,)),
    *(_case((7, 6, 4), "poisoned", layout=_channels_last, scale=(6, 1)), _case((9, 4), scale=(1,))),
    *(
        _case((7, 4, 5), "residual", layout=layout, scale=(5,))
        for layout in (_transposed, _strided)
    ),
    _case((9, 33, 13, 29), "residual", scale=(33, 1, 1)),
    _case((9, 33, 13, 29), "residual", layout=_channels_last, scale=(33, 1, 1)),
]
