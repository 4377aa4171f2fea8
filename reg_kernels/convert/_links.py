"""What may follow a BatchNorm in a chain, as a node of a graph says it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import functional
from .._twins import TWINS
from ..nn.stochastic_depth import DropsPaths
from ..ops.batch_norm import SLOPE
from ._chain import ACTIVATION, ACTIVATIONS, DROPOUT, NORMS, RESIDUAL
from ._trace import in_place_functions


def is_norm(layer: object) -> bool:
    """Whether a layer is a BatchNorm that a chain may start with, torch's or its twin."""
    return any(type(layer) in (norm, TWINS[norm]) for norm in NORMS)


def drops_paths(layer: object) -> bool:
    """Whether it is a layer of stochastic depth, ours or one that has a twin: a shortcut may be
    added in its pass."""
    cls = type(layer)
    return issubclass(TWINS.get(cls, cls), DropsPaths)  # type: ignore[arg-type]


def is_head(layer: object) -> bool:
    """Whether a chain may start with it."""
    return is_norm(layer) or drops_paths(layer)


def place_of(layer: object) -> int | None:
    """A layer's place in a chain, if it has one."""
    cls = type(layer)
    if cls is nn.Identity:
        return 0
    if cls in (nn.Dropout, TWINS[nn.Dropout]):
        return DROPOUT
    if cls in ACTIVATIONS and getattr(layer, "approximate", "none") == "none":
        return ACTIVATION
    return None


@dataclass
class Link:
    """One step behind a BatchNorm."""

    node: fx.Node
    place: int  # as in `_chain`: 0 for an nn.Identity
    text: str
    layer: nn.Module | None = None
    function: tuple[Any, ...] = ()  # as `_chain` takes it, where there is no layer

    @property
    def residual(self) -> fx.Node | None:
        return self.function[1] if self.place == RESIDUAL else None


@dataclass
class Chain:
    """A BatchNorm's call in a forward and what follows it there."""

    node: fx.Node
    norm: nn.Module
    name: str  # of the BatchNorm in the model
    links: list[Link]
    product: fx.Node | None = None  # with a layer scale, that is a dropped branch's input

    @property
    def first(self) -> fx.Node:
        return self.node if self.product is None else self.product

    def shorten(self, count: int) -> None:
        """Cuts the chain to `count` links, and takes each nn.Identity off its end."""
        del self.links[count:]
        while self.links and self.links[-1].place == 0:
            self.links.pop()

    def parts(self) -> list[tuple[str, nn.Module | None]]:
        """The name of each part in the forward, and its layer, as a report shows them."""
        links = [k for k in self.links if k.place]
        texts = ["+ residual" if k.place == RESIDUAL else k.text for k in links]
        named = zip(texts, (k.layer for k in links), strict=True)
        scale = [] if self.product is None else [("× layer scale", None)]
        return [(str(self.node.target), self.norm), *scale, *named]


_ADDITIONS = {operator.add, torch.add, "add", "add_", in_place_functions["iadd"]}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys([torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"], "relu"),
    **dict.fromkeys([F.leaky_relu, F.leaky_relu_], "leaky_relu"),
    F.silu: "silu",
    F.gelu: "gelu",
}
_DROPOUTS = {F.dropout, torch.dropout, torch.dropout_, functional.dropout}
_IN_PLACE = {torch.relu_, F.relu_, "relu_", F.leaky_relu_, torch.dropout_, "add_"}
_IN_PLACE |= {in_place_functions["iadd"]}
# Where `inplace` is among a function's arguments.
_INPLACE_AT = {F.relu: 1, F.silu: 1, F.leaky_relu: 2, F.dropout: 3, functional.dropout: 3}


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def link_of(node: fx.Node, value: fx.Node, layers: dict[str, nn.Module]) -> Link | None:
    """What `node` does to the chain's `value`, if that is something a chain does."""
    if node.op == "call_module":
        alone = (node.args == (value,) and not node.kwargs) or node.kwargs == {"input": value}
        return _layer_link(node, layers[str(node.target)]) if alone else None
    if node.op not in ("call_function", "call_method") or "out" in node.kwargs:
        return None
    if node.target in _ADDITIONS:
        return _addition(node, value)
    if _argument(node, 0, "input") is not value:
        return None
    in_place = node.target in _IN_PLACE
    if node.target in _INPLACE_AT:
        in_place = _argument(node, _INPLACE_AT[node.target], "inplace", False)
        if not isinstance(in_place, bool):
            return None
    if node.target in _FUNCTIONS:
        activation, slope = _FUNCTIONS[node.target], SLOPE
        if activation == "leaky_relu":
            slope = _argument(node, 1, "negative_slope", SLOPE)
        if activation == "gelu" and _argument(node, 1, "approximate", "none") != "none":
            return None
        if not isinstance(slope, (int, float)):
            return None
        arguments = {"relu": (in_place,), "leaky_relu": (slope, in_place), "silu": (in_place,)}
        function = (activation, *arguments.get(activation, ()))
        return Link(node, ACTIVATION, f"{activation}()", function=function)
    if node.target in _DROPOUTS:
        if any(node.kwargs.get(name) is not None for name in ("rng_state", "backend")):
            return None
        if node.kwargs.get("element_offset", 0) != 0:
            return None
        flag = "train" if node.target in (torch.dropout, torch.dropout_) else "training"
        p, training = _argument(node, 1, "p", 0.5), _argument(node, 2, flag, True)
        return Link(node, DROPOUT, "dropout()", function=("dropout", p, training, in_place))
    return None


def _layer_link(node: fx.Node, layer: nn.Module) -> Link | None:
    place = place_of(layer)
    return None if place is None else Link(node, place, str(node.target), layer)


def _addition(node: fx.Node, value: fx.Node) -> Link | None:
    first, second = _argument(node, 0, "input"), _argument(node, 1, "other")
    in_place = node.target in _IN_PLACE
    if len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1 or first is second:
        return None
    if first is value and isinstance(second, fx.Node):
        name = "+=" if in_place else "+"
        return Link(node, RESIDUAL, "residual", function=(name, second))
    if second is value and isinstance(first, fx.Node) and not in_place:
        return Link(node, RESIDUAL, "residual", function=("+", first))
    return None
