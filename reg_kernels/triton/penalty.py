"""L1 and L2 penalties over a table of tensors in Triton.

A sum reads x, sizeof(T) bytes an element, in one launch; the gradient reads x and writes as much.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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
    type_of,
    vectored_elements,
)
from ._types import compute_type

BLOCK = 2048  # elements at a time: 16 bytes a thread and load, in bf16 with 8 warps
PARTIALS = 4096  # that the last program adds up at a time
UNSPECIALISED = ["count", "chunks"]  # no recompiling by value


class PenaltyForm(NamedTuple):
    """What kernels are compiled for: one constexpr, FORM."""

    T: tl.dtype
    POWER: int
    BLOCK: int
    PARTIALS: int


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
def sum_block(total, x_ptr, block, first, count, FORM: tl.constexpr):
    """With elements `first` to count - 1, as far as they are in the block, each at its place: what
    is summed up in which order does not depend on how it can be loaded."""
    i = block * FORM.BLOCK + tl.arange(0, FORM.BLOCK)
    x = tl.load(x_ptr + i, mask=(i >= first) & (i < count), other=0.0)
    return total + penalty_values(x, FORM.POWER)


@triton.jit(do_not_specialize=UNSPECIALISED)
def penalty_kernel(
    table_ptr,
    count,
    chunks,
    sum_ptr,  # float64, written
    scratch_ptr,  # float64 [1 + chunks]
    FORM: tl.constexpr,
):
    BLOCK: tl.constexpr = FORM.BLOCK
    PARTIALS: tl.constexpr = FORM.PARTIALS
    program = tl.program_id(0)
    if program < chunks:
        chunk = chunk_at(table_ptr, count, program)
        address, rest = address_at(chunk, GRAD, FORM.T), chunk.rest
        total = tl.zeros([BLOCK], tl.float64)
        block, vectored = 0, vectored_elements(rest, address)
        x_ptr = pointer_to(address, FORM.T, True)
        while block * BLOCK < vectored:
            total = sum_block(total, x_ptr, block, 0, vectored, FORM)
            block += 1
        block = vectored // BLOCK
        x_ptr = pointer_to(address, FORM.T, False)
        while (block * BLOCK < rest) & (vectored < rest):
            total = sum_block(total, x_ptr, block, vectored, rest, FORM)
            block += 1
        tl.store(scratch_ptr + 1 + program, tl.sum(total, 0))
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
def gradient_block(x_ptr, y_ptr, block, count, g, FORM: tl.constexpr):
    i = block * FORM.BLOCK + tl.arange(0, FORM.BLOCK)
    x = tl.load(x_ptr + i, mask=i < count)
    tl.store(y_ptr + i, penalty_gradients(x, g, FORM.POWER), mask=i < count)


@triton.jit(do_not_specialize=UNSPECIALISED)
def penalty_backward_kernel(
    table_ptr,
    count,
    grad_output_ptr,  # float64 [1]
    FORM: tl.constexpr,
):
    g = tl.load(grad_output_ptr).to(compute_type(FORM.T))
    chunk = chunk_at(table_ptr, count, tl.program_id(0))
    source, target = address_at(chunk, GRAD, FORM.T), address_at(chunk, PARAM, FORM.T)
    block, vectored = 0, vectored_elements(chunk.rest, source | target)
    x_ptr = pointer_to(source, FORM.T, True)
    y_ptr = pointer_to(target, FORM.T, True)
    while block * FORM.BLOCK < vectored:
        gradient_block(x_ptr, y_ptr, block, vectored, g, FORM)
        block += 1
    rest = chunk.rest - vectored
    block, x_ptr = 0, pointer_to(source, FORM.T, False) + vectored
    y_ptr = pointer_to(target, FORM.T, False) + vectored
    while block * FORM.BLOCK < rest:
        gradient_block(x_ptr, y_ptr, block, rest, g, FORM)
        block += 1


@functools.cache
def _form(dtype: int, power: int, partials: int) -> PenaltyForm:
    return PenaltyForm(type_of(dtype), power, BLOCK, partials)


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
            *(table, count, chunks, sums[slot], scratch, _form(dtype, power, PARTIALS)),
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
            *(table, count, grad_output, _form(dtype, power, PARTIALS)),
            num_warps=8,
        )
