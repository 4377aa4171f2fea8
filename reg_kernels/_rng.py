"""Random state: where it comes from, and what the implementations derive from it.

`rng_state` is an int64 tensor [seed, offset], saved by a forward for its backward to draw the same
numbers again. csrc/include/reg_kernels/philox.h states the contract that turns it into masks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
import torch._functorch.config
import torch.fx.traceback
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from ._dtypes import named

GROUP = 8  # mask elements drawn by one Philox call


def tag(letters: str) -> int:
    """What is xored into the seed, so that no two kinds of op share draws: 8 ASCII letters, the
    first one highest. As in philox.h."""
    return int.from_bytes(letters.encode("ascii"), "big")


TAG_DROPOUT = tag("dropout1")
TAG_ROUNDING = tag("rounding")

_CPU = torch.device("cpu")
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_advancing = threading.Lock()  # two threads of ours must not take one offset
_CUDA_OFFSET = 4  # what a call takes from a CUDA generator; its offsets are multiples of 4


def draw_state(device: torch.device, host: Tensor | None = None) -> Tensor:
    """A fresh `rng_state` from torch's default generator of `device`, under `torch.manual_seed`.

    On CUDA it comes on the host, with no launch and no synchronisation; while a CUDA graph is being
    captured it is drawn on the device, so that each replay draws anew. What comes on the host is
    written to `host`, if one is given.
    """
    if device == _CPU:
        if host is not None:
            return host.random_()
        if torch._C._len_torch_dispatch_stack() == 0:
            return draw_host_state()
    elif device.type == "cuda" and _generator_is_at_hand():
        state = _advance_cuda_generator(device)
        return state if host is None else host.copy_(state)
    return torch.empty(2, dtype=torch.int64, device=device).random_()


def draw_host_state() -> Tensor:
    """The same on the CPU, for a call that no mode sees."""
    return torch.empty_like(_template()).random_()  # torch.empty takes a fifth longer


@functools.cache
def _template() -> Tensor:
    """What a state on the CPU is made like."""
    return torch.empty(2, dtype=torch.int64, device=_CPU)


def drawer(device: torch.device) -> Callable[[], Tensor]:
    """What draws a state for inputs on a device, for calls that no mode sees."""
    return draw_host_state if device == _CPU else functools.partial(draw_state, device)


def _generator_is_at_hand() -> bool:
    """Not while a graph is captured, which must draw by itself, nor for fake tensors."""
    fake = torch._C._get_dispatch_mode(_FAKE)
    return fake is None and not torch.cuda.is_current_stream_capturing()


def draw_traced_state(device: torch.device) -> Tensor:
    """The same as an operation of a program that is being traced, drawn anew at each of its runs;
    and for torch.func, whose vmap decides whether the samples share it."""
    if torch.compiler.is_compiling():
        return torch.ops.reg_kernels.draw_state(device)
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def _draw_what_is_saved(device: torch.device) -> Tensor:
    """torch.randint, marked as what a backward must be given.

    With an activation_memory_budget below 1 a backward computes anew what it was not given, and
    would draw another state. The mark is one that AOTAutograd, which runs this to learn what
    draw_state consists of, leaves on the operations it records meanwhile.
    """
    marks = torch.fx.traceback.current_meta
    if not torch.fx.traceback.has_preserved_node_meta() or "recompute" in marks:
        return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)
    if torch._functorch.config.activation_memory_budget == 0 and torch.is_grad_enabled():
        raise RuntimeError(
            "dropout: activation_memory_budget must be above 0, where not even the 16 bytes that a "
            "mask is drawn from are saved for the backward, got 0"
        )
    marks["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)
    finally:
        del marks["recompute"]


_library = torch.library.Library("reg_kernels", "FRAGMENT")
_library.define("draw_state(Device device) -> Tensor")
_library.impl("draw_state", _draw_what_is_saved, "CompositeImplicitAutograd")


def _advance_cuda_generator(device: torch.device) -> Tensor:
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    with _advancing:
        offset = generator.get_offset()
        generator.set_offset(offset + _CUDA_OFFSET)
    return torch.tensor([_as_int64(generator.initial_seed()), _as_int64(offset)], device=_CPU)


def _as_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def checked_state(rng_state: Tensor, device: torch.device, op: str) -> Tensor:
    """`rng_state` as the kernels take it for an input on `device`; raises where it is none."""
    if not isinstance(rng_state, Tensor):
        raise TypeError(
            f"{op}: rng_state must be an int64 tensor [seed, offset], "
            f"got {type(rng_state).__name__}"
        )
    if rng_state.dtype != torch.int64 or tuple(rng_state.shape) != (2,):
        raise RuntimeError(
            f"{op}: rng_state must be an int64 tensor of shape (2,), "
            f"got {named(rng_state.dtype)} of shape {tuple(rng_state.shape)}"
        )
    if rng_state.device.type != "cpu" and rng_state.device != device:
        raise RuntimeError(
            f"{op}: rng_state must be on the CPU or on {device} like the input, "
            f"got {rng_state.device}"
        )
    return rng_state.contiguous()
