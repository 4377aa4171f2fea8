"""How an op is registered with torch.

An op `name` has one overload for each implementation, all of one schema: `name` itself is the
native one, whose kernels csrc/ registers for the CPU and CUDA keys; `name.triton` and
`name.reference` are registered here. The caller picks the overload, so a compiled graph shows which
implementation it runs, and nothing is chosen behind the dispatcher's back.
"""

from __future__ import annotations

import collections
import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .. import backends
from ._modes import COMPILE, below_autograd

_library = torch.library.Library("reg_kernels", "FRAGMENT")

OPS: dict[str, Op] = {}
# What csrc/ registers kernels for; csrc/schemas.inc declares it for programs without Python.
NATIVE_SCHEMAS: list[str] = []
# The implementation that an overload is, by its id: hashing one is a call into Python.
_IMPLEMENTATIONS: dict[int, str] = {}


@dataclass(frozen=True)
class Op:
    """A registered op."""

    name: str
    schema: str = field(repr=False)
    overloads: dict[str, Any] = field(repr=False)  # implementation name -> torch.ops overload
    fake: Callable[..., Any] = field(repr=False, compare=False)
    # A Route, or what is called as one is: above(overload, *arguments).
    route: Any = field(repr=False, compare=False)
    # Raises RuntimeError where a kernel must not be given these arguments.
    check: Callable[..., None] | None = field(default=None, repr=False, compare=False)
    _chosen: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def argument_names(self) -> list[str]:
        return [argument.name for argument in self.overloads["native"]._schema.arguments]

    def overload(
        self,
        device: torch.device,
        dtype: torch.dtype,
        backend: str | None,
        watcher: str | None = None,
    ) -> Any:
        """The overload to call; raises BackendUnavailable where a forced one cannot run."""
        if watcher is COMPILE:
            return self.overloads[backends.choose(self.name, device.type, dtype, backend)]
        # What can run stays so, and need not be found out at each call.
        key = (device, dtype, backends.forced_by() if backend is None else backend)
        overload = self._chosen.get(key)
        if overload is None:
            chosen = backends.choose(self.name, device.type, dtype, backend)
            overload = self._chosen[key] = self.overloads[chosen]
        return overload

    def like(self, overload: Any) -> Any:
        """This op's overload of the implementation that another op's overload is."""
        return self.overloads[_IMPLEMENTATIONS[id(overload)]]

    def run_like(self, overload: Any, inputs: tuple[Any, ...], rest: tuple[Any, ...]) -> Any:
        """This op by its route, in the implementation that another op's overload is."""
        return self.route.call(None, self.like(overload), inputs, rest)


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    triton: str | Callable[..., Any],
    route: Callable[..., Any],
    native: Callable[..., Any] | None = None,
    check: Callable[[str, Any], None] | None = None,
    takes: dict[str, tuple[torch.dtype, ...]] | None = None,
) -> Op:
    """Registers an op and its implementations.

    Args:
        name: the op's name; its kernels in csrc/ carry the same one.
        schema: what follows the name, as "(Tensor input, float p) -> Tensor".
        fake: shapes and strides of the result, for compilation.
        reference: the implementation in plain PyTorch.
        triton: "module:function" below reg_kernels.triton, imported at the first call; or what
            calls one.
        route: called as route(overload, *args) above the implementation: a Route, or another one
            that records a gradient where one is wanted.
        native: what runs it natively where csrc/ has no kernel of its name and schema but parts of
            it, which `define_part` declares.
        check: called as check(name, arguments), the schema's by their names, before what is in
            Python: raises RuntimeError where a kernel must not be given them. An op of lists has
            none here and checks by itself.
        takes: of implementations that compute in fewer types than others, those types.
    """

    def run_triton(*args: Any) -> Any:
        if not isinstance(triton, str):
            return triton(*args)
        module, function = triton.split(":")
        return getattr(importlib.import_module(f"reg_kernels.triton.{module}"), function)(*args)

    kernels: dict[str, Any] = {"native": native, "triton": run_triton, "reference": reference}
    by_position = None
    if check is not None:
        by_position = _by_position(name, schema, check)
        for implementation, kernel in kernels.items():
            if kernel is not None:
                kernels[implementation] = functools.partial(_checked, by_position, kernel)
    for implementation, dtypes in (takes or {}).items():
        backends.takes(name, implementation, dtypes)
    OPS[name] = _define(name, schema, kernels, fake, route, by_position)
    return OPS[name]


def _by_position(name: str, schema: str, check: Callable[[str, Any], None]) -> Callable[..., None]:
    """The check of arguments that come by their places, as the dispatcher hands them on."""
    arguments = torch._C.parse_schema(f"{name}{schema}").arguments
    defaults = [a.default_value for a in arguments if a.has_default_value()]
    named = collections.namedtuple("named", [a.name for a in arguments], defaults=defaults)  # type: ignore[misc]
    return lambda *args: check(name, named(*args))


def _checked(check: Callable[..., None], kernel: Callable[..., Any], *args: Any) -> Any:
    check(*args)
    return kernel(*args)


def _define(
    name: str,
    schema: str,
    kernels: dict[str, Callable[..., Any] | None],
    fake: Callable[..., Any],
    route: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> Op:
    """An op of these implementations, by their names."""
    overloads = {}
    for implementation, kernel in kernels.items():
        suffix = "" if implementation == "native" else f".{implementation}"
        qualified = f"{name}{suffix}"
        if implementation == "native" and kernel is None:
            _declare_native(f"{qualified}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        else:
            _library.define(f"{qualified}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"reg_kernels::{qualified}", fake, lib=_library)
        if implementation != "native":
            _library.impl(qualified, kernel, "CompositeExplicitAutograd")
        elif kernel is not None:
            for key in ("CPU", "CUDA"):
                _library.impl(qualified, kernel, key)
        packet = getattr(torch.ops.reg_kernels, name)
        overload = getattr(packet, suffix.removeprefix(".") or "default")
        overloads[implementation] = overload
        _IMPLEMENTATIONS[id(overload)] = implementation
        _library.impl(qualified, _bind(route, overload), "Autograd")
        if not overload._schema.returns:
            _library.impl(qualified, _of_negated(name, overload), "Negative")
    return Op(name, schema, overloads, fake, route, check)


def _of_negated(name: str, overload: Any) -> Callable[..., None]:
    """What an op without results does with views that stand for negated values. torch's own way
    takes results from where there are none, which raises or, in torch 2.11, breaks memory."""
    arguments = overload._schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]

    def run(*args: Any) -> None:
        for argument, writes, value in zip(arguments, written, args, strict=False):
            for x in value if isinstance(value, list | tuple) else (value,):
                if writes and isinstance(x, torch.Tensor) and x.is_neg():
                    raise RuntimeError(
                        f"{name}: {argument.name} must hold its own values, got a view that "
                        "negates others: call resolve_neg() before"
                    )
        overload(*tree_map_only(torch.Tensor, torch.Tensor.resolve_neg, args))

    return run


def _declare_native(schema: str, tags: tuple[torch.Tag, ...] = ()) -> None:
    """Declares an op of csrc/, unless a program has loaded libreg_kernels.so before Python."""
    NATIVE_SCHEMAS.append(schema)
    wanted = torch._C.parse_schema(f"reg_kernels::{schema}")
    declared = [
        each
        for each in torch._C._jit_get_schemas_for_operator(wanted.name)
        if not each.overload_name
    ]
    if not declared:
        _library.define(schema, tags=tags)
    elif declared != [wanted]:
        raise ImportError(
            "reg_kernels: the libreg_kernels.so that this process has loaded must be the one "
            f"beside this package: it declares {declared[0]}, expected {wanted}"
        )


def _bind(route: Callable[..., Any], overload: Any) -> Callable[..., Any]:
    """The route of all arguments: the dispatcher leaves defaults at their end away. It takes no
    result of an op whose schema has none, as the route of one in place has."""
    schema = overload._schema.arguments
    defaults = [x.default_value for x in schema if x.has_default_value()]
    first = len(schema) - len(defaults)

    def run(*args: Any) -> Any:
        outputs = route(overload, *args, *defaults[len(args) - first :])
        return outputs if overload._schema.returns else None

    return run


def register_by_numbers(op: Op, *numbers: str, backward: Op | None = None) -> Op:
    """The op once more as `<name>_by_numbers`, for compiled programs, of which a float would be a
    constant, and each new value a recompile.

    Its schema has one more argument at the end, `numbers`: a tensor of the values of the arguments
    that are named here, in their order, and perhaps more behind them. The floats themselves count
    no longer, but by being None or 0. `backward`: the op of its gradient, if it is none itself.
    """
    names = op.argument_names
    places = [names.index(number) for number in numbers]

    def kernel_of(overload: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            *given, values = args
            for place, value in zip(places, values.tolist(), strict=False):
                if given[place] is not None:
                    given[place] = value
            with below_autograd():
                return overload(*given)

        return run

    route = copy.copy(op.route)
    route.backward = backward
    twin = _define(
        f"{op.name}_by_numbers",
        op.schema.replace(") -> ", ", Tensor numbers) -> "),
        {implementation: kernel_of(overload) for implementation, overload in op.overloads.items()},
        lambda *args: op.fake(*args[:-1]),
        route,
    )
    return replace(twin, name=op.name)  # by which the choice of an implementation goes


def implementation_of(overload: Any) -> str:
    """The implementation that an overload is."""
    return _IMPLEMENTATIONS[id(overload)]


def define_part(name: str, schema: str) -> Any:
    """Declares what csrc/ registers for an op's use: no op by itself, and not to be compiled."""
    _declare_native(f"{name}{schema}")
    part = getattr(torch.ops.reg_kernels, name).default
    if not part._schema.returns:
        _library.impl(name, _of_negated(name, part), "Negative")
    return part
