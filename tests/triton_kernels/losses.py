"""What the tests of the losses' Triton kernels share: targets, tolerances, small tiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from reg_kernels.triton import _loss

from support import DEVICE

NONE, MEAN, SUM = range(3)
# The interpreter's numpy speaks up at Inf - Inf and at the logarithm of nothing.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{words} encountered:RuntimeWarning")
    for words in ("invalid value", "divide by zero", "overflow", "All-NaN slice")
]
INTERPRETED = DEVICE == "cpu"
# Of one value, in units of its own size. The interpreter truncates to bfloat16: one ulp.
RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
}


def small_tiles(monkeypatch: Any) -> None:
    """Tiles that hold a few classes, as of logits of many: the classes take several."""
    for name, value in {"KEPT": 4, "PLANES": 4, "LOOPED": 32, "SECTOR": 16}.items():
        monkeypatch.setattr(_loss, name, value)


TILINGS = ["kept", "looped"]  # all classes of a position in one tile, or in several


def in_either_tiling(*options: list[Any]) -> list[tuple[Any, ...]]:
    """Each combination of the options, behind the tiling that it is tried in.

    The two take turns, so that any two options meet in both of them.
    """
    combinations = itertools.product(*map(enumerate, options))
    return [
        (TILINGS[sum(i for i, _ in of_options) % 2], *[value for _, value in of_options])
        for of_options in combinations
    ]


def logits(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    x = (3 * torch.randn(shape)).to(DEVICE, dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def target_of(
    x: Tensor,
    kind: str,
    weighted: bool = False,
    label_smoothing: float = 0.0,
    reduction: int = MEAN,
    ignore_index: int = -100,
) -> tuple[Any, ...]:
    """The ops' arguments from the target to the traced smoothing; some labels are ignored."""
    n, classes = x.shape[:2]
    partner = lam = None
    one_lam = 1.0
    if kind == "probabilities":
        target = torch.empty_like(x).copy_(torch.randn(x.shape).softmax(1))
    else:
        target, partner = (
            torch.randint(0, classes, (n, *x.shape[2:]), device=DEVICE) for _ in range(2)
        )
        target.view(-1)[::3] = ignore_index
        partner.view(-1)[::4] = ignore_index
        if kind == "labels":
            partner = None
        elif kind == "pair":
            lam = torch.rand(n, device=DEVICE)
        else:
            one_lam = 0.3
    weight = None
    if weighted:
        compute = torch.promote_types(x.dtype, torch.float32)
        weight = torch.rand(classes, dtype=compute, device=DEVICE) + 0.5
    of_target = (target, partner, lam, one_lam)
    return *of_target, weight, ignore_index, label_smoothing, reduction, None


KINDS = ["labels", "pair", "one lam", "probabilities"]


def in_double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    )


def assert_close(ours: Tensor, truth: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """Within the roundings of a computation in `dtype` on values about as large as `size`."""
    assert ours.shape == truth.shape
    own = RELATIVE[ours.dtype]
    absolute = RELATIVE[torch.promote_types(dtype, torch.float32)] * size
    torch.testing.assert_close(ours.double(), truth, rtol=own, atol=absolute, equal_nan=True)
