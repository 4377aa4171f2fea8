"""Who looks at a call beside autograd: torch.compile, torch.func, torch.jit.trace, torch.onnx, fake
tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from .._compiler import constant

# Inside it an op goes straight to its implementation. By a short name: the hot path looks it up.
below_autograd = torch._C._AutoDispatchBelowAutograd

_func_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

COMPILE, FUNC, TRACE = "torch.compile", "torch.func", "torch.jit.trace"
ONNX = "torch.onnx"


# torch.compile takes torch's own answer for False, though torch.onnx may be what compiles.
@constant
def _for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def watcher() -> str | None:
    """COMPILE, FUNC, TRACE or ONNX where that looks at the call, None where it is an eager one.

    torch.func stands for forward-mode differentiation as well. torch.jit.trace has to see an op as
    the dispatcher does: what an autograd Function does inside is not for its program, which records
    gradients anew at each of its runs. torch.onnx exports by either of two, and knows torch's own
    operations alone.
    """
    if _is_compiling():
        return ONNX if _for_onnx() else COMPILE
    if _func_is_active() or forward_ad._current_level >= 0:
        return FUNC
    if _tracing_state() is None:
        return None
    return ONNX if _for_onnx() else TRACE


# Nobody looks at a call, nor a mode at its ops, where each answers None, False or 0.
QUESTIONS = (
    _func_is_active,
    lambda: forward_ad._current_level >= 0,
    _tracing_state,
    torch._C._len_torch_dispatch_stack,
)


def above_autograd() -> Any:
    """Inside it, an implementation's own operations are recorded, as they are outside of an op."""
    keys, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    include = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(include, excluded)


def unseen(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function whose tensors are torch.func's in no way, since they depend on none of a call's;
    so they may be kept, and have memory."""

    @functools.wraps(function)
    def called(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        if not _func_is_active():
            return function(*args, **options)
        with temporarily_clear_interpreter_stack():
            return function(*args, **options)

    return called


def is_transformed() -> bool:
    """Whether torch.func looks at a call, torch.compile or not."""
    return _func_is_active() or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether x may stand for a batch: under torch.func's vmap, or as one of batched gradients."""
    return is_transformed() or torch._C._functorch.is_legacy_batchedtensor(x)


def is_fake() -> bool:
    """Whether tensors made now have shapes alone."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def shows_values(x: Tensor, looks: str | None) -> bool:
    """Whether the values of what lies with x can be looked at without a wait."""
    return x.device.type == "cpu" and looks is not COMPILE and not is_fake()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """For what is asked of arguments: torch.jit.trace would make tensors of the sizes it sees, and
    warn of each one that is compared."""
    state = _tracing_state()
    set_tracing_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_tracing_state(None)
    try:
        yield
    finally:
        set_tracing_state(state)
