"""How an op is registered with torch.

An op `name` has one overload for each implementation, all of one schema: `name` itself is the
native one, whose kernels csrc/ registers for the CPU and CUDA keys; `name.triton` and
`name.reference` are registered here. The caller picks the overload, so a compiled graph shows which
implementation it runs, and nothing is chosen behind the dispatcher's back.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends

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


_library = torch.library.Library("reg_kernels", "FRAGMENT")

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """A registered op."""

    name: str
    overloads: dict[str, Any] = field(repr=False)  # implementation name -> torch.ops overload
    fake: Callable[..., Any] = field(repr=False, compare=False)
    autograd: Callable[..., Any] = field(repr=False, compare=False)
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

    kernels = {"native": native, "triton": run_triton, "reference": reference}
    OPS[name] = _define(name, arguments, kernels, fake, autograd)
    return OPS[name]


def _define(
    name: str,
    arguments: str,
    kernels: dict[str, Callable[..., Any] | None],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
) -> Op:
    """An op of these implementations, by their names."""
    overloads = {}
    for backend, kernel in kernels.items():
        suffix = "" if backend == "native" else f".{backend}"
        qualified = f"{name}{suffix}"
        _library.define(f"{qualified}{arguments}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"reg_kernels::{qualified}", fake, lib=_library)
        if backend != "native":
            _library.impl(qualified, kernel, "CompositeExplicitAutograd")
        elif kernel is not None:
            for key in ("CPU", "CUDA"):
                _library.impl(qualified, kernel, key)
        packet = getattr(torch.ops.reg_kernels, name)
        overload = getattr(packet, suffix.removeprefix(".") or "default")
        overloads[backend] = overload
        _library.impl(qualified, _bind(autograd, overload), "Autograd")
    return Op(name, overloads, fake, autograd)


# Numbers that vary. A float is a constant of a compiled program, and each new value a recompile;
# when a second value comes, torch.compile makes a symbol of it, which a tensor can be made of. An
# op's twin takes such a tensor.


def varies(*numbers: float | None) -> bool:
    """Whether one of them is a symbol, in what torch.compile traces."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # which takes a second

    return not all(x is None or has_static_value(x) for x in numbers)


def as_tensor(*numbers: float | None) -> Tensor:
    """What a twin takes: float64 on the CPU, where a launcher reads it without a wait."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * (0.0 if x is None else x) for x in numbers])


def twin_by_numbers(op: Op) -> Op:
    """The op once more as `<name>_by_numbers`, with one more argument, `numbers`: the values of its
    floats, in their order, and perhaps more behind them. The floats themselves count no longer,
    but by being None or 0."""
    schema = op.overloads["native"]._schema
    kinds = [str(a.type) for a in schema.arguments]
    floats = [i for i, kind in enumerate(kinds) if kind in ("float", "Optional[float]")]
    arguments = str(schema).removeprefix(schema.name)
    inside, returns = arguments.rsplit(" -> ", 1)

    def kernel_of(overload: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            *rest, numbers = args
            for i, value in zip(floats, numbers.tolist(), strict=False):
                if rest[i] is not None:
                    rest[i] = value
            with below_autograd():
                return overload(*rest)

        return run

    twin = _define(
        f"{op.name}_by_numbers",
        f"{inside[:-1]}, Tensor numbers) -> {returns}",
        {backend: kernel_of(overload) for backend, overload in op.overloads.items()},
        lambda *args: op.fake(*args[:-1]),
        op.autograd,
    )
    return replace(twin, name=op.name)  # by which the choice of an implementation goes


def implementation_of(overload: Any) -> str:
    """The implementation that an overload is: `register` names them so."""
    return overload._overloadname.replace("default", "native")


def define_part(name: str, arguments: str) -> Any:
    """Declares what csrc/ registers for an op's use: no op by itself, and not to be compiled."""
    _library.define(f"{name}{arguments}")
    return getattr(torch.ops.reg_kernels, name).default


def _bind(function: Callable[..., Any], overload: Any) -> Callable[..., Any]:
    return lambda *args: function(overload, *args)
