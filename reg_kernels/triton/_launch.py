"""What the launchers share: rng_state as kernel arguments, assertions, the device and its size."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

# With these a kernel is launched that asserts: what tl.device_assert says, not in addition that no
# sum of integers overflows.
ASSERTING = {"debug": True, "sanitize_overflow": False}


def state_arguments(rng_state: Tensor, x: Tensor) -> dict[str, Any]:
    """Arguments of `_random.load_state`: two integers from the host, or a pointer on the device."""
    on_device = rng_state.device.type != "cpu"
    seed, offset = (0, 0) if on_device else rng_state.tolist()
    # Where the state is on the host its pointer is not read; any pointer will do.
    return {
        "state_ptr": rng_state if on_device else x,
        "seed": seed,
        "offset": offset,
        "ON_DEVICE": on_device,
    }


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's device current: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def processors(x: Tensor) -> int:
    """How many programs run side by side at least: the device's multiprocessors."""
    return _multiprocessors(x.device.index) if x.is_cuda else 1


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
