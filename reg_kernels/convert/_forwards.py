"""The forwards of a model, each read by itself, and who calls which layer in them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from ._layers import Fused
from ._links import Chain
from ._trace import CannotTrace, Trace, in_place_functions, trace

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_touched(module: nn.Module) -> str | None:
    """Why another layer may not do this one's work, or None where it may."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if "forward" in vars(module):
        return "has a forward of its own on the object"
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

    @property
    def simple(self) -> bool:
        """Whether every call does what the graph shows, so that its own forward may stay."""
        return len(self.trace.required) == 1 and not (self.trace.fixed or self.trace.optional)

    @functools.cached_property
    def must_stay(self) -> bool:
        """Whether the class cannot be replaced by one with another forward."""
        try:
            _format_import_block(self.trace.graph.python_code("self").globals, sys_importer)
        except Exception:  # it calls what no import finds again
            return True
        cls = type(self.module)
        copies_itself = any(
            getattr(cls, name, None) is not getattr(nn.Module, name, None)
            for name in ("__reduce_ex__", "__reduce__", "__deepcopy__", "__copy__")
        )
        return is_sequential(self.module) or copies_itself

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        for node in self.trace.graph.nodes:
            if node.op == "call_module":
                yield node, self.layers[node.target]


def is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_container(module: nn.Module) -> bool:
    """Whether it only holds others, as nn.ModuleList does."""
    return type(module).forward is nn.Module.forward


def _is_read(module: nn.Module) -> bool:
    if _is_container(module) or isinstance(module, Fused):
        return False
    return is_sequential(module) or not type(module).__module__.startswith("torch.nn.")


def read_forwards(
    model: nn.Module, contains: Callable[[nn.Module], bool], evaluation_only: bool = False
) -> tuple[list[Forward], list[tuple[str, nn.Module, str]]]:
    """The forwards of all modules that have a layer which `contains` asks for, and the modules
    (name, module, reason) that cannot be read though such a layer has no other forward above it."""
    forwards, failed = [], []
    for name, module in list(model.named_modules()):
        if not _is_read(module):
            continue
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
        if _is_container(child):
            yield from _own_layers(child)


class Uses:
    """Where layers stand in a model and who calls them, as far as forwards were read."""

    def __init__(self, model: nn.Module, forwards: list[Forward]) -> None:
        self._calls = Counter(id(layer) for f in forwards for _, layer in f.calls())
        self._places = Counter(
            id(child) for m in model.modules() for child in m._modules.values() if child is not None
        )
        self._values_read = {
            id(f.layers[owner])
            for f in forwards
            for node in f.trace.graph.nodes
            if node.op == "get_attr" and (owner := str(node.target).rpartition(".")[0])
        }

    def why_not_once(self, layer: nn.Module, forward: Forward) -> str | None:
        """Why a layer may do something else where `forward` does not call it, or None."""
        if self._calls[id(layer)] > 1:
            return "is called more than once"
        if self._places[id(layer)] > 1:
            return "stands in more than one place"
        if id(layer) in self._values_read:
            return "has its values read by a forward"
        if not forward.owns(layer):
            return "is called by another module than the one that holds it"
        return None

    def are_all(self, calls: int, layer: nn.Module, forward: Forward) -> bool:
        """Whether so many calls in a forward are all that there are."""
        alone = self._calls[id(layer)] == calls and self._places[id(layer)] == 1
        return alone and forward.owns(layer)


# What may be written to: a chain runs where its last link stood


def changes_its_input(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return any(
            not type(m).__module__.startswith(("torch.nn.", "reg_kernels."))
            or getattr(m, "inplace", False)
            for m in layers[node.target].modules()
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
            type(layers[node.target]).__module__
            in ("torch.nn.modules.conv", "torch.nn.modules.linear", "torch.nn.modules.batchnorm")
        )
        if not fresh or type(layers[node.target]) is nn.Identity:
            todo += node.all_input_nodes
    return found
