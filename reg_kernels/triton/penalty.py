"""L1 and L2 penalties over a table of tensors in Triton.

A sum reads x, sizeof(T) bytes an element, in one launch; the gradient reads x and writes as much.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import device_of
from ._table import (
    GRAD,
    PARAM,
    address_at,
    chunk_at,
    chunks_of,
    is_last_program,
    pointer_to,
    type_name,
    vectored_elements,
)

BLOCK = 2048  # elements at a time: 16 bytes a thread and load, in bf16 with 8 warps
PARTIALS = 4096  # that the last program adds up at a time
UNSPECIALISED = ["count", "chunks"]  # no recompiling by value


@triton.jit
def penalty_values(x, POWER: tl.constexpr):
    """|x| or x^2, in float64."""
    x = x.to(tl.float64)
    return tl.abs(x) if POWER == 1 else x * x


@triton.jit
def penalty_gradients(x, g, POWER: tl.constexpr):
    """The gradient by x, of one dtype; g is in the type it computes in. At 0, and NaN, 0."""
    wide = x.to(g.dtype)
    if POWER == 1:
        wide = tl.where(wide > 0.0, g, tl.where(wide < 0.0, -g, 0.0 * g))
    else:
        wide = 2.0 * wide * g
    return wide.to(x.dtype)


@triton.jit
def sum_block(total, x_ptr, block, first, count, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """With elements `first` to count - 1, as far as they are in the block, each at its place: what
    is summed up in which order does not depend on how it can be loaded."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=(i >= first) & (i < count), other=0.0)
    return total + penalty_values(x, POWER)


@triton.jit(do_not_specialize=UNSPECIALISED)
def penalty_kernel(
    table_ptr,
    count,
    chunks,
    sum_ptr,  # float64, written
    scratch_ptr,  # float64 [1 + chunks]
    DTYPE: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    T: tl.constexpr = tl.dtype(DTYPE)
    chunk = tl.program_id(0)
    if chunk < chunks:
        tensor, first, rest = chunk_at(table_ptr, count, chunk)
        address = address_at(table_ptr, GRAD, count, tensor, first, T)
        total = tl.zeros([BLOCK], tl.float64)
        block, vectored = 0, vectored_elements(rest, address)
        x_ptr = pointer_to(address, T, True)
        while block * BLOCK < vectored:
            total = sum_block(total, x_ptr, block, 0, vectored, POWER, BLOCK)
            block += 1
        block = vectored // BLOCK
        x_ptr = pointer_to(address, T, False)
        while (block * BLOCK < rest) & (vectored < rest):
            total = sum_block(total, x_ptr, block, vectored, rest, POWER, BLOCK)
            block += 1
        tl.store(scratch_ptr + 1 + chunk, tl.sum(total, 0))
    if is_last_program(scratch_ptr):
        # By their place, whichever program is the last: two runs give the same bits.
        total = tl.zeros([PARTIALS], tl.float64)
        at = 0
        while at < chunks:
            i = at + tl.arange(0, PARTIALS)
            # Past the first-level cache, which may have older ones.
            total += tl.load(scratch_ptr + 1 + i, mask=i < chunks, other=0.0, cache_modifier=".cg")
            at += PARTIALS
        tl.store(sum_ptr, tl.sum(total, 0))


@triton.jit
def gradient_block(x_ptr, y_ptr, block, count, g, POWER: tl.constexpr, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count)
    tl.store(y_ptr + i, penalty_gradients(x, g, POWER), mask=i < count)


@triton.jit(do_not_specialize=UNSPECIALISED)
def penalty_backward_kernel(
    table_ptr,
    count,
    grad_output_ptr,  # float64 [1]
    DTYPE: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    T: tl.constexpr = tl.dtype(DTYPE)
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    g = tl.load(grad_output_ptr).to(COMPUTE)
    tensor, first, rest = chunk_at(table_ptr, count, tl.program_id(0))
    source = address_at(table_ptr, GRAD, count, tensor, first, T)
    target = address_at(table_ptr, PARAM, count, tensor, first, T)
    block, vectored = 0, vectored_elements(rest, source | target)
    x_ptr = pointer_to(source, T, True)
    y_ptr = pointer_to(target, T, True)
    while block * BLOCK < vectored:
        gradient_block(x_ptr, y_ptr, block, vectored, g, POWER, BLOCK)
        block += 1
    rest -= vectored
    block, x_ptr = 0, pointer_to(source, T, False) + vectored
    y_ptr = pointer_to(target, T, False) + vectored
    while block * BLOCK < rest:
        gradient_block(x_ptr, y_ptr, block, rest, g, POWER, BLOCK)
        block += 1


def penalty_table(
    table: Tensor,
    count: int,
    _seal: int,
    dtype: int,
    power: int,
    sums: Tensor,
    slot: int,
    scratch: Tensor,
) -> None:
    """sums[slot] = the sum of |x|^power over the table's first row."""
    chunks = chunks_of(table, count)
    with device_of(table):
        penalty_kernel[(max(chunks, 1),)](
            table,
            count,
            chunks,
            sums[slot],
            scratch,
            DTYPE=type_name(dtype),
            POWER=power,
            BLOCK=BLOCK,
            PARTIALS=PARTIALS,
            num_warps=8,
        )


def penalty_backward_table(
    table: Tensor, count: int, _seal: int, dtype: int, power: int, grad_output: Tensor
) -> None:
    """The gradient, of grad_output's one number, from the table's first row to its second."""
    chunks = chunks_of(table, count)
    if chunks == 0:
        return
    with device_of(table):
        penalty_backward_kernel[(chunks,)](
            table,
            count,
            grad_output,
            DTYPE=type_name(dtype),
            POWER=power,
            BLOCK=BLOCK,
            num_warps=8,
        )
