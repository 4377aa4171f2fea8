"""A list of tensors in one int64 buffer, for the kernels that take whole lists.

csrc/include/reg_kernels/tensor_table.h states the layout. Building a table looks at every tensor;
afterwards `row` is there to be written to where something has moved. On CUDA the buffer is on the
device, and `send` brings a row there in stream order, without a synchronisation.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ._dtypes import DTYPES

ROWS = (
    *("grad", "param", "first_moment", "second_moment", "max_second_moment", "ema"),
    *("compensation", "step", "numel", "element_offset", "run", "run_stride", "group"),
    *("first_chunk", "first_work"),
)
CHUNK = 8192  # elements of a chunk
# As in csrc/torch/tensor_table.h: the bits of a seal for what it says.
_SEAL_BITS = 25
_SEAL_FACTORS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
_ROW_BITS = {name: 1 << 10 + i for i, name in enumerate(ROWS)}
_OVERHEAD = 64  # elements that a tensor's own cost weighs as much as

_address = Tensor.data_ptr


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where element 0 of each tensor lies; TypeError where one is none."""
    return list(map(_address, tensors))


def dtype_number(dtype: torch.dtype) -> int:
    """The number that the kernels know a dtype by: its place in DType of dtypes.h."""
    return DTYPES.index(dtype)


class TensorTable:
    """Addresses and sizes of N tensors.

    Attributes:
        count: N.
        data: the buffer that kernels read, on the tensors' device.
        seal: what the kernels' entries tell this buffer from any other tensor by.
        scratch: float64 [1 + chunks], all zero between calls up to what a kernel leaves in [1:]:
            partial sums, and a counter of blocks.
        head: data, count and seal, the first arguments of what takes a table.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        **rows: Sequence[int],
    ) -> None:
        """`dtypes`: the parameters' and, where there are some, the moments'; `rows`: those of ROWS
        that are known, N numbers each."""
        self.count = len(sizes)
        columns = {name: [0] * self.count for name in ROWS} | {"numel": sizes} | rows
        chunks = [-(-numel // CHUNK) for numel in sizes]
        columns["first_chunk"] = _sums_before(chunks)
        columns["first_work"] = _sums_before([work_units(numel) for numel in sizes])
        self.chunks = sum(chunks)
        numbers = array("q")
        for name in ROWS:
            numbers.extend(columns[name])
        for tensor, of_tensor in enumerate(chunks):
            numbers.extend([tensor] * of_tensor)
        self._numbers = memoryview(numbers)
        self._host = _tensor_of(numbers)
        self.data = self._host if device.type == "cpu" else self._host.to(device, non_blocking=True)
        self.seal = self._make_seal(dtypes, rows)
        self.head = (self.data, self.count, self.seal)
        self.scratch = torch.zeros(1 + self.chunks, dtype=torch.float64, device=device)
        # Where a graph copies a row from at its replays; allocated now, not while one is captured.
        self._for_capture = torch.empty(
            self.count if device.type == "cuda" else 0,
            dtype=torch.int64,
            device="cpu",
            pin_memory=device.type == "cuda",
        )
        self._captured: list[Tensor] = []
        self._sent: dict[str, bytes] = {}

    def _make_seal(self, dtypes: Sequence[torch.dtype], rows: dict[str, Sequence[int]]) -> int:
        """As csrc/torch/tensor_table.h states it."""
        groups = min(max(rows["group"], default=0) + 1, 63) if "group" in rows else 1
        kind = dtype_number(dtypes[0]) | dtype_number(dtypes[-1]) << 2 | groups << 4
        for name in rows:
            kind |= _ROW_BITS[name]
        data, (a, b, c, d) = self.data, _SEAL_FACTORS
        mixed = data.data_ptr() * a + data.numel() * b + self.count * c + kind * d
        return mixed % 2**64 >> _SEAL_BITS + 1 << _SEAL_BITS | kind

    def row(self, name: str) -> memoryview:
        """A row of the numbers, to be written to; `send` it then."""
        first = ROWS.index(name) * self.count
        return self._numbers[first : first + self.count]

    def send(self, name: str) -> None:
        """Lets the kernels see what was written to a row."""
        if self.data is self._host:
            return
        capturing = torch.cuda.is_current_stream_capturing()
        numbers = self.row(name).tobytes()
        # What a graph writes at its replays is not known here: then nothing counts as there.
        if self._sent.get(name) == numbers and not capturing and not self._captured:
            return
        first = ROWS.index(name) * self.count
        row = self._host[first : first + self.count]
        if capturing:
            if self._captured:  # by an earlier graph, which still copies from there
                self._for_capture = self._for_capture.clone().pin_memory()
            row = self._for_capture.copy_(row)
            self._captured.append(row)
        self.data[first : first + self.count].copy_(row, non_blocking=True)
        self._sent[name] = numbers


def work_units(numel: int) -> int:
    """What a tensor weighs where threads share a list, in elements; a multiple of 64."""
    return -(-numel // 64) * 64 + _OVERHEAD


def _sums_before(numbers: Sequence[int]) -> list[int]:
    sums, total = [], 0
    for number in numbers:
        sums.append(total)
        total += number
    return sums


def _tensor_of(numbers: array[int]) -> Tensor:
    if not numbers:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(numbers, dtype=torch.int64)
