"""Cross-entropy and its gradient in Triton, by the losses' kernels (_loss_kernels.py).

Bytes an element, s = sizeof(dtype), of class indices; class probabilities are read wherever x is:
    loss_kernel                    x                            1 s
      and keeps the gradient       x, gradient                  2 s; 3 s past what a tile holds
    loss_backward_kernel           x, gradient                  2 s
    rescale_kernel                 x, x, unless it is by 1      2 s or 0
A program has a block of positions and all of their classes. Up to 32768 of them (float32, without
weights) lie in one tile, which is read once; of more the softmax is gathered tile by tile, and they
are read again for the gradient, from the end, where the cache still has them. A mean needs to know
first how many labels count: a kernel of its own sums that up, 8 bytes a position.

Per-position losses are added up in float64, by program and then by torch, always in one order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, device_of, processors
from ._loss import TargetCall, launch_backward, launch_forward
from ._types import compute_type

BLOCK = 4096  # elements at a time of what is rescaled
PROGRAMS = 4  # that rescale, to a multiprocessor: they are done where there is nothing to do


@triton.jit
def rescale_kernel(
    x_ptr,  # [numel] in storage order
    factor_ptr,  # one number
    numel,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(x_ptr.dtype.element_ty)
    factor = tl.load(factor_ptr).to(COMPUTE)
    if factor != 1.0:
        blocks = tl.cdiv(numel, BLOCK)
        block = tl.program_id(0)
        while block < blocks:
            at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            if block < blocks - 1:  # without a mask, which would take vectors apart
                x = tl.load(x_ptr + at).to(COMPUTE) * factor
                tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty))
            else:
                x = tl.load(x_ptr + at, mask=at < numel).to(COMPUTE) * factor
                tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < numel)
            block += tl.num_programs(0)


def cross_entropy(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, of its schema's arguments: (loss, stats, gradient)."""
    *target, keep_gradient = arguments
    return launch_forward(input, TargetCall(*target), keep_gradient)


def cross_entropy_backward(
    grad_output: Tensor, input: Tensor, stats: Tensor, *target: Any
) -> Tensor:
    """The op's gradient by the input."""
    return launch_backward(grad_output, input, stats, TargetCall(*target))


def rescale_(x: Tensor, factor: Tensor) -> None:
    """The dense x times the one number in `factor`; where that is 1, x is not even read."""
    if x.numel() == 0:
        return
    programs = min(ceil_div(x.numel(), BLOCK), PROGRAMS * processors(x))
    with device_of(x):
        rescale_kernel[(programs,)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=8)
