"""What an op's arguments have to be before a kernel touches them: dtypes, sizes, layouts, devices,
numbers in range, memory that is there.

The public functions have validated their callers' arguments, but an op is also reached by saved
programs, by hooks and by compiled code. This is the twin, for the implementations in Python, of
csrc/torch/checks.h, by which the native ones check: tests/ops/test_hostile_calls.py holds the two
to refuse the same calls.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .._layout import is_channels_last
from ..backends import DTYPES
from ._arguments import named

_DTYPES = frozenset(DTYPES)


def described(x: Any) -> Any:
    """A tensor as messages name it; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    return f"{named(x.dtype)} of shape {tuple(x.shape)} and strides {x.stride()}"


class Call:
    """An op's call: its name, and the device that its tensors have to be on."""

    __slots__ = ("device", "op")

    def __init__(self, op: str, x: Tensor) -> None:
        self.op = op
        self.device = x.device

    def refuse(self, name: str, must: str, got: Any) -> NoReturn:
        raise RuntimeError(f"{self.op}: {name} must be {must}, got {described(got)}")

    def check_memory(self, x: Tensor, name: str, on_host: bool = False) -> None:
        """That a kernel may read or write x: here, or also on the CPU, and not freed."""
        if x.device != self.device and not (on_host and x.device.type == "cpu"):
            where = "on the CPU or on" if on_host else "on"
            self.refuse(name, f"{where} the tensors' device", "one on another device")
        if x.numel() == 0:
            return
        last = x.storage_offset()
        if x.is_contiguous():
            last += x.numel() - 1
        else:
            last += sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        if last >= x.untyped_storage().nbytes() // x.itemsize:
            self.refuse(name, "a tensor whose memory was not freed", x)
        if (address := x.data_ptr()) % x.itemsize:
            must = "at a multiple of its elements' size (a clone is)"
            self.refuse(name, must, f"address {address}")

    def check_floats(self, x: Tensor, name: str) -> None:
        if x.dtype not in _DTYPES:
            self.refuse(name, "one of float64, float32, float16, bfloat16", x)

    def check_vector(
        self, x: Tensor, dtype: torch.dtype, count: int, name: str, on_host: bool = False
    ) -> None:
        """`count` numbers of a type that lie side by side."""
        if x.dtype != dtype or x.numel() != count or not x.is_contiguous():
            self.refuse(name, f"contiguous {named(dtype)} of {count} elements", x)
        self.check_memory(x, name, on_host)

    def check_number(
        self, x: Tensor | None, dtype: torch.dtype, name: str, on_host: bool = False
    ) -> None:
        if x is None:
            return
        if x.dtype != dtype or x.numel() != 1:
            self.refuse(name, f"a tensor of one element, of {named(dtype)}", x)
        self.check_memory(x, name, on_host)

    def check_channels(self, x: Tensor, name: str = "input") -> None:
        """An input (N, C, ...): contiguous, or dense with the channels last."""
        if x.dim() < 2:
            self.refuse(name, "of at least 2 dimensions", x)
        if not x.is_contiguous() and not is_channels_last(x):
            self.refuse(name, "contiguous, or dense with the channels last", x)

    def check_probability(self, p: float) -> None:
        if not 0.0 <= p <= 1.0:
            self.refuse("p", "in [0, 1]", p)

    def check_rng_state(self, rng_state: Tensor) -> None:
        self.check_vector(rng_state, torch.int64, 2, "rng_state", on_host=True)

    def check_shares(self, lam: Tensor, samples: int) -> None:
        """One number, or one for each sample."""
        if lam.numel() not in (1, samples) or not lam.is_contiguous():
            self.refuse("lam", f"contiguous, of 1 element or of {samples}", lam)
        self.check_floats(lam, "lam")
        self.check_memory(lam, "lam")

    def check_apart(self, written: Tensor, other: Tensor | None, name: str) -> None:
        """That what an op writes is none of what it reads by; both are dense."""
        if other is None or written.device != other.device:
            return
        begin, own = other.data_ptr(), written.data_ptr()
        if own < begin + other.nbytes and begin < own + written.nbytes:
            self.refuse(name, "apart in memory from what is written", "a part of it")


def has_layout_of(x: Tensor, other: Tensor) -> bool:
    """Whether `other` has x's shape and strides; of one element a dimension's say nothing."""
    if x.shape != other.shape:
        return False
    if x.numel() == 0 or x.stride() == other.stride():
        return True
    strides = zip(x.shape, x.stride(), other.stride(), strict=True)
    return all(n <= 1 or a == b for n, a, b in strides)
