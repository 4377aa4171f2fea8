"""The memory that a call takes, apart from its time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def kept_bytes(call: Callable[[int], object]) -> int:
    """Bytes that a forward keeps for its backward: all storages that autograd saves, once each."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(0)
    del result  # alive until here: a freed storage's address could have come twice
    return sum(kept.values())


def peak_bytes(call: Callable[[int], object], device: torch.device) -> int:
    """Memory at the peak of a call, beyond what it returns."""
    result, peak, grown = follow_memory(call, device)
    outputs = result if isinstance(result, tuple) else (result,)
    # A result that was there before, such as the copy's destination, is no allocation of the call.
    tensors = [t for t in outputs if isinstance(t, Tensor)]
    returned = min(grown, sum(t.untyped_storage().nbytes() for t in tensors))
    return max(0, peak - returned)


def follow_memory(call: Callable[[int], object], device: torch.device) -> tuple[Any, int, int]:
    """A call's result, and the bytes by which memory had grown at its peak and at its end."""
    return (_cuda_memory if device.type == "cuda" else cpu_memory)(call, device)


def _cuda_memory(call: Callable[[int], object], device: torch.device) -> tuple[Any, int, int]:
    """The same on a GPU."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call(0)
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_allocated(device)
    return result, torch.cuda.max_memory_allocated(device) - before, after - before


def cpu_memory(call: Callable[[int], object], device: torch.device) -> tuple[Any, int, int]:
    """The same on the CPU: what torch's allocator gave, without scratch from the C library's."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or each profile writes two lines to stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call(0)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    grown = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        grown.append(grown[-1] + event.nbytes())
    return result, max(grown), grown[-1]
