"""A table of tensors as kernels read it: a chunk's place, pointers, and which program ends last.

csrc/include/reg_kernels/tensor_table.h states the layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tensor_table
from .._tensor_table import DTYPES, ROWS

CHUNK = tl.constexpr(_tensor_table.CHUNK)
GRAD = tl.constexpr(ROWS.index("grad"))
PARAM = tl.constexpr(ROWS.index("param"))
FIRST_MOMENT = tl.constexpr(ROWS.index("first_moment"))
SECOND_MOMENT = tl.constexpr(ROWS.index("second_moment"))
MAX_SECOND_MOMENT = tl.constexpr(ROWS.index("max_second_moment"))
EMA = tl.constexpr(ROWS.index("ema"))
COMPENSATION = tl.constexpr(ROWS.index("compensation"))
STEP = tl.constexpr(ROWS.index("step"))
NUMEL = tl.constexpr(ROWS.index("numel"))
ELEMENT_OFFSET = tl.constexpr(ROWS.index("element_offset"))
RUN = tl.constexpr(ROWS.index("run"))
RUN_STRIDE = tl.constexpr(ROWS.index("run_stride"))
GROUP = tl.constexpr(ROWS.index("group"))
FIRST_CHUNK = tl.constexpr(ROWS.index("first_chunk"))
CHUNKS = tl.constexpr(len(ROWS))  # behind the rows: each chunk's tensor

_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16}


def chunks_of(table: Tensor, count: int) -> int:
    """The number of chunks of a table of `count` tensors, by its length alone."""
    return table.numel() - len(ROWS) * count


def type_of(number: int) -> tl.dtype:
    """Triton's type for the number that the table's functions give to a dtype."""
    return _TYPES.get(DTYPES[number], tl.bfloat16)


class Chunk(NamedTuple):
    """A part of a tensor in a table, which one program takes."""

    table_ptr: Any
    count: Any  # of tensors
    tensor: Any
    first: Any  # the tensor's element that the chunk begins with
    rest: Any  # how many elements the chunk has


@triton.jit
def chunk_at(table_ptr, count, number):
    tensor = tl.load(table_ptr + CHUNKS * count + number)
    first = (number - tl.load(table_ptr + FIRST_CHUNK * count + tensor)) * CHUNK
    rest = tl.load(table_ptr + NUMEL * count + tensor) - first
    return Chunk(table_ptr, count, tensor, first, tl.minimum(rest, CHUNK).to(tl.int32))


@triton.jit
def row_at(chunk, ROW: tl.constexpr):
    """The entry of the chunk's tensor in a row of the table."""
    return tl.load(chunk.table_ptr + ROW * chunk.count + chunk.tensor)


@triton.jit
def address_at(chunk, ROW: tl.constexpr, T: tl.constexpr):
    """The address at which the chunk begins in the tensor's array of type T; 0 without an array."""
    address = row_at(chunk, ROW)
    return tl.where(address != 0, address + chunk.first * T.itemsize, 0)


@triton.jit
def pointer_to(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    """ALIGNED tells the compiler that the address is a multiple of 16 bytes. It knows nothing of an
    address that comes from memory, and would move single elements."""
    ptr = address.to(tl.pointer_type(T), bitcast=True)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def vectored_elements(count, addresses):
    """How many elements, from the first on, go in vectors of 16 bytes: all but up to 15, or none.

    `addresses` is a bitwise or of the arrays' addresses. The compiler sees that the result is a
    multiple of 16, so that a mask made of it has whole vectors in or out.
    """
    return tl.where(addresses % 16 == 0, count // 16, 0) * 16


@triton.jit
def is_last_program(scratch_ptr):
    """True in the last program of the grid to come here. That program sees what the others stored
    before, and may overwrite what they read.

    The ticket, in the first bytes of scratch, is 0 before the launch and again after it: the next
    launch and a graph's replay need nothing set up.
    """
    ticket_ptr = scratch_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.debug_barrier()  # all threads have read and stored; one of them takes the ticket
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
