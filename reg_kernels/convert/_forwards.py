"""The forwards of a model, each read by itself, and what in them may be written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ._chain import is_bare
from ._fused import Fused
from ._links import Chain
from ._trace import CannotTrace, Trace, in_place_functions, trace


def why_not_touched(module: nn.Module) -> str | None:
    """Why another layer may not do this one's work, or None where it may."""
    if is_bare(module):
        return None
    if "forward" in vars(module):
        return "has a forward of its own on the object"
    return "has hooks"


def why_opaque(module: nn.Module) -> str | None:
    """Why a module is left as it is, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript's, compiled as it was"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy, and what it will be is known after its first call"
    return None


@dataclass
class Forward:
    """A module whose forward was read, and the chains in it."""

    module: nn.Module
    name: str
    trace: Trace
    layers: dict[str, nn.Module]
    chains: list[Chain] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._own = {id(layer) for layer in _own_layers(self.module)}

    def owns(self, layer: nn.Module) -> bool:
        """Whether no other module with a forward holds a layer."""
        return id(layer) in self._own

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        for node in self.trace.graph.nodes:
            if node.op == "call_module":
                yield node, self.layers[str(node.target)]


def is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def is_container(module: nn.Module) -> bool:
    """Whether it only holds others, as nn.ModuleList does."""
    return getattr(type(module), "forward", None) is nn.Module.forward


def has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of the user's, or one that runs its layers in turn."""
    if is_container(module) or isinstance(module, Fused) or why_opaque(module) is not None:
        return False
    return is_sequential(module) or not type(module).__module__.startswith("torch.nn.")


def read_forwards(
    modules: Iterable[tuple[str, nn.Module]],
    contains: Callable[[nn.Module], bool],
    evaluation_only: bool = False,
) -> tuple[list[Forward], list[tuple[str, nn.Module, str]]]:
    """The forwards of those modules that have a layer which `contains` asks for, and the modules
    (name, module, reason) that cannot be read though such a layer has no other forward above it."""
    forwards, failed = [], []
    for name, module in modules:
        if not any(contains(layer) for layer in module.modules() if layer is not module):
            continue
        try:
            layers = dict(module.named_modules())
            forwards.append(Forward(module, name, trace(module, evaluation_only), layers))
        except CannotTrace as error:
            if any(contains(layer) for layer in _own_layers(module)):
                failed.append((name, module, str(error)))
    return forwards, failed


def _own_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that no module with a forward between holds."""
    for child in module.children():
        yield child
        if is_container(child):
            yield from _own_layers(child)


# What may be written to: a chain runs where its last link stood


def changes_its_input(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return any(
            not type(m).__module__.startswith(("torch.nn.", "reg_kernels."))
            or getattr(m, "inplace", False)
            for m in layers[str(node.target)].modules()
        )
    name = str(getattr(node.target, "__name__", node.target))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "__setitem__")
        or name in in_place_functions
        or name.removeprefix("__").removesuffix("__") in in_place_functions
        or "out" in node.kwargs
        # As `inplace` is passed, by name or by place.
        or any(argument is True for argument in (*node.args, *node.kwargs.values()))
    )


def memory_of(node: fx.Node, layers: dict[str, nn.Module]) -> set[object]:
    """The values that a value may be a view of, itself included; one for all from outside."""
    found: set[object] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node in found:
            continue
        if node.op in ("placeholder", "get_attr"):
            found.add("outside")
            continue
        found.add(node)
        fresh = node.op == "call_module" and (
            type(layers[str(node.target)]).__module__
            in ("torch.nn.modules.conv", "torch.nn.modules.linear", "torch.nn.modules.batchnorm")
        )
        if not fresh or type(layers[str(node.target)]) is nn.Identity:
            todo += node.all_input_nodes
    return found
