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


def state_arguments(rng_state: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Arguments of `_random.load_state`: a pointer on the device, or two integers from the host."""
    if rng_state is None or rng_state.device.type != "cpu":
        return rng_state, 0, 0
    return None, *rng_state.tolist()


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's device current: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# Triton's own take two microseconds each on the host.


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The first from n on."""
    return 1 << (n - 1).bit_length()


def processors(x: Tensor) -> int:
    """How many programs run side by side at least: the device's multiprocessors."""
    return _multiprocessors(x.device.index) if x.is_cuda else 1


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
