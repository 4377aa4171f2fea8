"""How an op is registered with torch.

An op `name` has one overload for each implementation, all of one schema: `name` itself is the
native one, whose kernels csrc/ registers for the CPU and CUDA keys; `name.triton` and
`name.reference` are registered here. The caller picks the overload, so a compiled graph shows which
implementation it runs, and nothing is chosen behind the dispatcher's back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import backends

# Inside it an op goes straight to its implementation. By a short name: the hot path looks it up.
below_autograd = torch._C._AutoDispatchBelowAutograd

_func_is_active = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks at what is called."""
    return _func_is_active() or forward_ad._current_level >= 0


def is_fake() -> bool:
    """Whether tensors made now have shapes alone."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_recorded() -> bool:
    """Whether torch.jit.trace records what is called.

    It then has to see an op as the dispatcher does: what an autograd Function does inside is not
    for its program, which records gradients anew at each of its runs.
    """
    return torch._C._get_tracing_state() is not None


_library = torch.library.Library("reg_kernels", "FRAGMENT")

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """A registered op."""

    name: str
    overloads: dict[str, Any] = field(repr=False)  # implementation name -> torch.ops overload
    _chosen: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    def traced_overload(self, device: torch.device, dtype: torch.dtype, backend: str | None) -> Any:
        """The overload to call; raises BackendUnavailable where a forced one cannot run."""
        return self.overloads[backends.choose(self.name, device.type, dtype, backend)]

    def overload(self, device: torch.device, dtype: torch.dtype, backend: str | None) -> Any:
        """The same for eager calls: what can run stays so, and need not be found out each time."""
        key = (device, dtype, backends.forced_by() if backend is None else backend)
        overload = self._chosen.get(key)
        if overload is None:
            overload = self._chosen[key] = self.traced_overload(device, dtype, backend)
        return overload


def register(
    name: str,
    arguments: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    triton: str | Callable[..., Any],
    autograd: Callable[..., Any],
    native: Callable[..., Any] | None = None,
) -> Op:
    """Registers an op and its implementations.

    Args:
        name: the op's name; its kernels in csrc/ carry the same one.
        arguments: the schema after the name, as "(Tensor input, float p) -> Tensor".
        fake: shapes and strides of the result, for compilation.
        reference: the implementation in plain PyTorch.
        triton: "module:function" below reg_kernels.triton, imported at the first call; or what
            calls one.
        autograd: called as autograd(overload, *args) above the implementation, to record a
            gradient where one is wanted.
        native: what runs it natively where csrc/ has no kernel of its name and schema but parts of
            it, which `define_part` declares.
    """

    def run_triton(*args: Any) -> Any:
        if not isinstance(triton, str):
            return triton(*args)
        module, function = triton.split(":")
        return getattr(importlib.import_module(f"reg_kernels.triton.{module}"), function)(*args)

    kernels: dict[str, tuple[str, Callable[..., Any] | None]] = {
        "native": ("", None),
        "triton": (".triton", run_triton),
        "reference": (".reference", reference),
    }
    overloads = {}
    for backend, (suffix, kernel) in kernels.items():
        qualified = f"{name}{suffix}"
        _library.define(f"{qualified}{arguments}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"reg_kernels::{qualified}", fake, lib=_library)
        if kernel is not None:
            _library.impl(qualified, kernel, "CompositeExplicitAutograd")
        elif native is not None:
            for key in ("CPU", "CUDA"):
                _library.impl(qualified, native, key)
        packet = getattr(torch.ops.reg_kernels, name)
        overload = getattr(packet, suffix.removeprefix(".") or "default")
        overloads[backend] = overload
        _library.impl(qualified, _bind(autograd, overload), "Autograd")
    OPS[name] = Op(name, overloads)
    return OPS[name]


def implementation_of(overload: Any) -> str:
    """The implementation that an overload is: `register` names them so."""
    return overload._overloadname.replace("default", "native")


def define_part(name: str, arguments: str) -> Any:
    """Declares what csrc/ registers for an op's use: no op by itself, and not to be compiled."""
    _library.define(f"{name}{arguments}")
    return getattr(torch.ops.reg_kernels, name).default


def _bind(function: Callable[..., Any], overload: Any) -> Callable[..., Any]:
    return lambda *args: function(overload, *args)
