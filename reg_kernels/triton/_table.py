"""A table of tensors as kernels read it: the place of a chunk, pointers, who is the last to finish.

csrc/include/reg_kernels/tensor_table.h states the layout.
"""

from __future__ import annotations

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
GROUP = tl.constexpr(ROWS.index("group"))
FIRST_CHUNK = tl.constexpr(ROWS.index("first_chunk"))
CHUNKS = tl.constexpr(len(ROWS))  # behind the rows: each chunk's tensor

_TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16"}


def chunks_of(table: Tensor, count: int) -> int:
    """The number of chunks of a table of `count` tensors, by its length alone."""
    return table.numel() - len(ROWS) * count


def type_name(number: int) -> str:
    """Triton's name of a dtype that the table's functions number."""
    return _TYPES.get(DTYPES[number], "bf16")


@triton.jit
def chunk_at(table_ptr, count, chunk):
    """(tensor, its element that the chunk begins with, elements of the chunk)."""
    tensor = tl.load(table_ptr + CHUNKS * count + chunk)
    first = (chunk - row_at(table_ptr, FIRST_CHUNK, count, tensor)) * CHUNK
    rest = row_at(table_ptr, NUMEL, count, tensor) - first
    return tensor, first, tl.minimum(rest, CHUNK).to(tl.int32)


@triton.jit
def row_at(table_ptr, ROW: tl.constexpr, count, tensor):
    return tl.load(table_ptr + ROW * count + tensor)


@triton.jit
def address_at(table_ptr, ROW: tl.constexpr, count, tensor, first, T: tl.constexpr):
    """Where element `first` of an array of type T of the tensor's lies; 0 where there is none."""
    address = row_at(table_ptr, ROW, count, tensor)
    return tl.where(address != 0, address + first * T.itemsize, 0)


@triton.jit
def pointer_to(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    """ALIGNED tells the compiler, which knows nothing of an address from memory, that it is one of
    16 bytes; else it would move single elements."""
    ptr = address.to(tl.pointer_type(T), bitcast=True)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def vectored_elements(count, addresses):
    """How many elements, from the first on, go in vectors of 16 bytes: all but up to 15, or none.

    `addresses` is a bitwise or of the arrays' addresses. The compiler sees what the result is a
    multiple of, and so that of a mask it makes whole vectors are in or out.
    """
    return tl.where(addresses % 16 == 0, count // 16, 0) * 16


@triton.jit
def is_last_program(scratch_ptr):
    """True in the last program of the grid to come here: what the others have stored before is then
    there, and nobody reads any more what it overwrites.

    The ticket, in the first bytes of scratch, is 0 before the launch and again after it: the next
    launch and a graph's replay need nothing set up.
    """
    ticket_ptr = scratch_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.debug_barrier()  # all threads have read and stored; one of them takes the ticket
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
