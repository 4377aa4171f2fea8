"""Who looks at a call beside autograd: torch.func, torch.jit.trace, fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Inside it an op goes straight to its implementation. By a short name: the hot path looks it up.
below_autograd = torch._C._AutoDispatchBelowAutograd

_func_is_active = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks at what is called."""
    return _func_is_active() or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether x may stand for a batch: under torch.func's vmap, or as one of batched gradients."""
    return is_transformed() or torch._C._functorch.is_legacy_batchedtensor(x)


def is_fake() -> bool:
    """Whether tensors made now have shapes alone."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


tracing_state = torch._C._get_tracing_state  # by itself for the hot paths, to be held to None


def is_recorded() -> bool:
    """Whether torch.jit.trace records what is called.

    It then has to see an op as the dispatcher does: what an autograd Function does inside is not
    for its program, which records gradients anew at each of its runs.
    """
    return tracing_state() is not None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """For what is asked of arguments: torch.jit.trace would make tensors of the sizes it sees, and
    warn of each one that is compared."""
    state = tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)
