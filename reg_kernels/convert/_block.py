"""A module whose forward is its graph: as a subclass of its class, which can be undone."""

from __future__ import annotations

import functools
import itertools
import linecache
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from ._forwards import Forward
from ._layers import Fused, swap_for_twin
from ._links import DROPOUT, RESIDUAL, Chain, link_of
from ._trace import Trace


@dataclass(frozen=True)
class _Plan:
    """A forward as source: what a fused block's class is made from, again after unpickling."""

    source: str
    optional: tuple[tuple[str, Any], ...]
    fixed: tuple[tuple[str, Any], ...]
    layers: tuple[str, ...]  # those that changed


def _same(value: object, plain: object) -> bool:
    return value is plain or (not isinstance(value, torch.Tensor) and bool(value == plain))


class FusedBlock(Fused):
    """A module whose forward was replaced by its graph with fused chains."""

    _original: type[nn.Module]
    _plan: _Plan

    def take_apart(self) -> None:
        self.__class__ = self._original

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _new_block, (self._original, self._plan), self.__getstate__()

    @torch.compiler.disable
    def _one_by_one(self) -> nn.Module:
        """Goes back to the block's own forward and layers, for good."""
        warnings.warn(
            f"{type(self).__name__}: a call differs from what convert(fuse=True) read, in an "
            "attribute that changed or in its arguments; its layers run one by one from here on",
            stacklevel=3,
        )
        layers = [self.get_submodule(name) for name in self._plan.layers]
        for layer in layers:
            if isinstance(layer, Fused):
                layer.take_apart()
            swap_for_twin(layer)
        self.take_apart()
        return self


def give_forward(forward: Forward) -> None:
    """Puts the chains of a forward together and makes that its module's forward."""
    graph, traced = forward.trace.graph, forward.trace
    layers = []
    for chain in forward.chains:
        layers += [chain.node.target, *(k.node.target for k in chain.links if k.layer is not None)]
        _replace(graph, chain, forward.layers)
    plan = _Plan(
        _source(traced),
        tuple(traced.optional.items()),
        tuple(traced.fixed.items()),
        tuple(dict.fromkeys(map(str, layers))),
    )
    forward.module.__class__ = _block_class(type(forward.module), plan)


def _replace(graph: fx.Graph, chain: Chain, layers: dict[str, nn.Module]) -> None:
    """One call of the BatchNorm, where the chain's last link stands."""
    arguments: list[Any] = [chain.node.all_input_nodes[0], None, 0.0, False]
    previous = chain.node
    for old in chain.links:
        # Read again: a chain that was replaced before this one may be its residual.
        link = link_of(old.node, previous, layers)
        previous = link.node
        if link.place == RESIDUAL:
            arguments[1] = link.residual
        elif link.place == DROPOUT and link.layer is None:
            arguments[2:] = link.drop
    while len(arguments) > 1 and arguments[-1] in (None, False, 0.0):
        arguments.pop()
    last = chain.links[-1].node
    with graph.inserting_after(last):
        call = graph.call_module(chain.node.target, tuple(arguments))
    last.replace_all_uses_with(call)
    for node in [*(link.node for link in reversed(chain.links)), chain.node]:
        graph.erase_node(node)


def _source(traced: Trace) -> str:
    code = traced.graph.python_code("self")
    given = [*traced.required, *(f"{name}={name}" for name in traced.optional)]
    defaults = [f"{name}=_optional[{name!r}]" for name in traced.optional]
    differences = [f"{name} is None" for name in traced.required]
    differences += [f"not _same({name}, _optional[{name!r}])" for name in traced.optional]
    differences += [f"not _same(self.{_path(name)}, _fixed[{name!r}])" for name in traced.fixed]
    return "\n".join(
        [
            _format_import_block(code.globals, sys_importer),
            code.src.strip().replace("def forward(", "def fused(", 1),
            "",
            f"def forward(self, {', '.join([*traced.required, *defaults])}):",
            f"    if {' or '.join(differences) or 'False'}:",
            f"        return self._one_by_one().forward({', '.join(given)})",
            f"    return fused(self, {', '.join(traced.required)})",
            "",
        ]
    )


def _path(name: str) -> str:
    """layers.0.stride as source behind `self.`."""
    owner, _, attribute = name.rpartition(".")
    return f"get_submodule({owner!r}).{attribute}" if owner else attribute


_numbers = itertools.count()


@functools.cache
def _block_class(original: type[nn.Module], plan: _Plan) -> type[nn.Module]:
    file = f"<reg_kernels: fused forward {next(_numbers)} of {original.__name__}>"
    linecache.cache[file] = (len(plan.source), None, plan.source.splitlines(True), file)
    scope: dict[str, Any] = {
        "_same": _same,
        "_optional": dict(plan.optional),
        "_fixed": dict(plan.fixed),
    }
    exec(compile(plan.source, file, "exec"), scope)
    forward = scope["forward"]
    forward.__doc__ = original.forward.__doc__
    body = {
        # By its own name, since whoever looks at a model's classes knows that one.
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
        "_plan": plan,
        "forward": forward,
    }
    return types.new_class(
        original.__name__, (FusedBlock, original), {}, lambda names: names.update(body)
    )


def _new_block(original: type[nn.Module], plan: _Plan) -> nn.Module:
    cls = _block_class(original, plan)
    return cls.__new__(cls)
