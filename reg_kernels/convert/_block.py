"""A module whose forward is its graph: as a subclass of its class, which can be undone."""

from __future__ import annotations

import functools
import itertools
import linecache
import operator
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.overrides import has_torch_function
from torch.package.importer import sys_importer

from .._compiler import not_compiled
from ..nn._leaf import are_overridden
from ._chain import chain
from ._forwards import Forward, is_container
from ._fused import Fused, subclass
from ._links import Chain, link_of
from ._scaled import product, scaled
from ._trace import Trace


@dataclass(frozen=True)
class _Plan:
    """A forward as source: what a fused block's class is made from, again after unpickling."""

    source: str
    optional: tuple[tuple[str, Any], ...]
    fixed: tuple[tuple[str, Any], ...]
    layers: tuple[tuple[str, tuple[str, ...]], ...]
    classes: tuple[tuple[str, type[nn.Module]], ...]


def _same(value: object, plain: object) -> bool:
    return value is plain or (not isinstance(value, torch.Tensor) and bool(value == plain))


def layers_of(module: nn.Module) -> tuple[str, ...]:
    return tuple([name for name, layer in module._modules.items() if layer is not None])


class FusedBlock(Fused):
    """A module whose forward was replaced by its graph with fused chains."""

    _plan: _Plan

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new_block, (self._original, self._plan), self.__getstate__()

    @not_compiled
    def _one_by_one(self) -> Any:
        """Goes back to the block's own forward, for good."""
        warnings.warn(
            f"{type(self).__name__}: a call differs from what convert(fuse=True) read, in an "
            "attribute or a layer that changed or in its arguments; its layers run one by one from "
            "here on",
            stacklevel=3,
        )
        self.take_apart()
        return self


def block_class(forward: Forward) -> type[nn.Module]:
    """The class of a module that runs the chains of its forward, whose graph is used up.

    Raises ObjNotFoundError or ObjMismatchError, of torch.package, where it calls what no import
    finds again.
    """
    graph, traced = forward.trace.graph, forward.trace
    called = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    for found in forward.chains:
        _replace(graph, found, forward.layers)
    reached = _Reached.by(forward.module, [*called, *_owners(traced.fixed)])
    plan = _Plan(
        _source(traced, reached),
        tuple(traced.optional.items()),
        tuple(traced.fixed.items()),
        tuple(reached.layers.items()),
        tuple(reached.classes.items()),
    )
    original: Any = type(forward.module)
    return _block_class(original, plan)


def _owners(attributes: Iterable[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in attributes]


@dataclass
class _Reached:
    """The modules through which a forward reaches what it calls, for it to look at again."""

    layers: dict[str, tuple[str, ...]]  # the names in each, over which it may have looped
    classes: dict[str, type[nn.Module]]  # of those with other methods, which it may have called
    aliases: dict[str, str]  # other names of what it calls; which of them it used is not known

    @classmethod
    def by(cls, module: nn.Module, names: list[str]) -> _Reached:
        paths = {path for name in names for path in _prefixes(name)}
        modules = dict(module.named_modules())
        used = {id(modules[path]) for path in (*paths, *names) if path in modules}
        first = {id(layer): name for name, layer in modules.items()}
        aliases = {
            name: first[id(layer)]
            for name, layer in module.named_modules(remove_duplicate=False)
            if id(layer) in used and first[id(layer)] != name
        }
        paths |= {path for name in aliases for path in _prefixes(name)}
        holders = {path: module.get_submodule(path) for path in sorted(paths)}
        classes = {
            path: holder._original if isinstance(holder, Fused) else type(holder)
            for path, holder in holders.items()
            if path and not is_container(holder)
        }
        return cls({path: layers_of(holder) for path, holder in holders.items()}, classes, aliases)


def _prefixes(name: str) -> set[str]:
    """The paths of the modules around a name: of layers.0.weight "", layers and layers.0."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))}


def _replace(graph: fx.Graph, found: Chain, layers: dict[str, nn.Module]) -> None:
    """One call of the chain's parts, where the last of them stands."""
    last = found.links[-1].node
    with graph.inserting_before(last.next):
        # By _modules, since to ask a module for a layer takes 30 times as long.
        layers_now = graph.get_attr("_modules")
        layer = _looked_up(graph, layers_now, str(found.node.target))
        arguments: list[Any] = [layer, _input(graph, found, layers_now)]
        previous = found.node
        for old in found.links:
            # Read again: a chain that was replaced before this one may be its residual.
            link = link_of(old.node, previous, layers)
            assert link is not None
            previous = link.node
            if link.layer is not None:
                arguments.append(_looked_up(graph, layers_now, str(link.node.target)))
            else:
                arguments.append(link.function)
        call = graph.call_function(chain, tuple(arguments))
    last.replace_all_uses_with(call)
    for node in [*(link.node for link in reversed(found.links)), found.node]:
        graph.erase_node(node)
    if found.product is not None:
        graph.erase_node(found.product)


def _input(graph: fx.Graph, found: Chain, layers_now: fx.Node) -> fx.Node:
    """What the chain's layer is given, or the factors of that."""
    if found.product is None:
        return found.node.all_input_nodes[0]
    if found.product.op == "call_module":
        layer = _looked_up(graph, layers_now, str(found.product.target))
        return graph.call_function(scaled, (found.product.args[0], layer))
    return graph.call_function(product, found.product.args)


def _looked_up(graph: fx.Graph, layers: fx.Node, path: str) -> fx.Node:
    """A layer as it is at the call."""
    *holders, name = path.split(".")
    for holder in holders:
        found = graph.call_function(operator.getitem, (layers, holder))
        layers = graph.call_function(getattr, (found, "_modules"))
    return graph.call_function(operator.getitem, (layers, name))


def _source(traced: Trace, reached: _Reached) -> str:
    code = traced.graph.python_code("self")
    given = [*traced.required, *(f"{name}={name}" for name in traced.optional)]
    defaults = [f"{name}=_optional[{name!r}]" for name in traced.optional]
    differences = [f"{name} is None" for name in traced.required]
    differences += [f"not _same({name}, _optional[{name!r}])" for name in traced.optional]
    # From the outside in, so that nothing is looked for in what is not there any more.
    differences += [
        f"_layers_of({_module(path)}) != _layers[{path!r}]"
        + (
            f" or not isinstance({_module(path)}, _classes[{path!r}])"
            if path in reached.classes
            else ""
        )
        for path in reached.layers
    ]
    differences += [f"{_module(a)} is not {_module(b)}" for a, b in reached.aliases.items()]
    differences += [f"not _same({_attribute(name)}, _fixed[{name!r}])" for name in traced.fixed]
    arguments = "".join(f"{name}, " for name in (*traced.required, *traced.optional))
    return "\n".join(
        [
            _format_import_block(code.globals, sys_importer),
            code.src.strip().replace("def forward(", "def fused(", 1),
            "",
            f"def forward(self, {', '.join([*traced.required, *defaults])}):",
            f"    if has_torch_function(({arguments})) and are_overridden({arguments}):",
            # Who overrides torch's functions, such as a tracer of fx, sees the layers.
            f"        return self._original.forward(self, {', '.join(given)})",
            f"    if {' or '.join(differences) or 'False'}:",
            f"        return self._one_by_one().forward({', '.join(given)})",
            f"    return fused(self, {', '.join(traced.required)})",
            "",
        ]
    )


def _module(path: str) -> str:
    """layers.0 as source."""
    return "self" + "".join(f"._modules[{name!r}]" for name in path.split(".") if name)


def _attribute(name: str) -> str:
    """layers.0.stride as source."""
    owner, _, attribute = name.rpartition(".")
    return f"{_module(owner)}.{attribute}"


_numbers = itertools.count()


@functools.cache
def _block_class(original: type[nn.Module], plan: _Plan) -> type[nn.Module]:
    file = f"<reg_kernels: fused forward {next(_numbers)} of {original.__name__}>"
    linecache.cache[file] = (len(plan.source), None, plan.source.splitlines(True), file)
    scope: dict[str, Any] = {
        "_same": _same,
        "_layers_of": layers_of,
        "has_torch_function": has_torch_function,
        "are_overridden": are_overridden,
        "_optional": dict(plan.optional),
        "_fixed": dict(plan.fixed),
        "_layers": dict(plan.layers),
        "_classes": dict(plan.classes),
    }
    exec(compile(plan.source, file, "exec"), scope)
    forward = scope["forward"]
    forward.__doc__ = original.forward.__doc__
    return subclass(original, FusedBlock, {"_plan": plan, "forward": forward})


def _new_block(original: Any, plan: _Plan) -> nn.Module:
    cls = _block_class(original, plan)
    return cls.__new__(cls)
