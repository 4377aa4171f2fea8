"""Subsets of samples in Triton: reads the residual, where there is one, and x, and writes y.

Of a sample that is kept 2 or 3 sizeof(dtype) bytes an element, of another one 1 or 2. A program
takes a tile of one sample.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._layout import empty_samples
from ._launch import ASSERTING, ceil_div, device_of, next_power_of_2
from ._random import product_apart
from ._types import compute_type

TILE = 4096  # elements a program at most


@triton.jit(do_not_specialize=["scale"])
def subset_kernel(
    x_ptr,  # [N, L] where GATHERS, else [K, L]
    residual_ptr,  # [N, L], or None: zeros
    y_ptr,  # [K, L] where GATHERS, else [N, L]
    kept_ptr,  # int64 [K]
    dropped_ptr,  # int64 [N - K]
    K,
    N,
    L,
    scale: tl.float64,
    GATHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    COMPUTE: tl.constexpr = compute_type(DTYPE)
    blocks = tl.cdiv(L, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    i = program // blocks
    kept = i < K
    row = tl.load(kept_ptr + i, mask=kept, other=0)
    if not GATHERS:
        row += tl.load(dropped_ptr + (i - K), mask=i >= K, other=0)
    tl.device_assert((row >= 0) & (row < N), "kept and dropped must be samples")
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < L
    source, target = (row, i) if GATHERS else (i, row)
    x = tl.load(x_ptr + source * L + at, mask=inside & kept, other=0.0).to(COMPUTE)
    y = product_apart(x, tl.full([1], scale, tl.float64).to(COMPUTE))
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + target * L + at, mask=inside).to(COMPUTE)
        y = tl.where(kept, residual + y, residual)
    tl.store(y_ptr + target * L + at, y.to(DTYPE), mask=inside)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    kept: Tensor,
    dropped: Tensor,
    scale: float,
    gathers: bool,
) -> Tensor:
    if y.numel() == 0:
        return y
    length = y[0].numel()
    block = min(next_power_of_2(length), TILE)
    samples = len(kept) + len(dropped)
    with device_of(x):
        subset_kernel[(len(y) * ceil_div(length, block),)](
            *(x, residual, y, kept, dropped, len(kept), samples, length, scale, gathers, block),
            **ASSERTING,
            num_warps=8,
        )
    return y


def subset(input: Tensor, kept: Tensor, dropped: Tensor, scale: float) -> Tensor:
    y = empty_samples(input, len(kept))
    return _launch(input, None, y, kept, dropped, scale, True)


def subset_add(
    input: Tensor, residual: Tensor | None, kept: Tensor, dropped: Tensor, scale: float
) -> Tensor:
    y = empty_samples(input if residual is None else residual, len(kept) + len(dropped))
    return _launch(input, residual, y, kept, dropped, scale, False)
