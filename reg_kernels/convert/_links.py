"""What may follow a BatchNorm in a chain, as a node of a graph says it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import functional
from .. import nn as twins
from ..ops.batch_norm import SLOPE
from ._chain import ABSORBED, CHAINS
from ._trace import in_place_functions


def _named_like(layers: Iterable[type[nn.Module]]) -> dict[type[nn.Module], type[nn.Module]]:
    """torch's layers and our twins of them, by torch's."""
    found = {layer: layer for layer in layers}
    return found | {
        getattr(twins, layer.__name__): layer for layer in layers if hasattr(twins, layer.__name__)
    }


NORMS = _named_like(CHAINS)
ABSORBABLE = _named_like(ABSORBED)


RESIDUAL, ACTIVATION, DROPOUT = 1, 2, 3  # in the order of the chain


@dataclass
class Link:
    """One step behind a BatchNorm."""

    node: fx.Node
    place: int  # one of the above; 0 for an nn.Identity
    text: str
    layer: nn.Module | None = None
    residual: fx.Node | None = None
    in_place: bool = False
    activation: str | None = None
    slope: float = SLOPE
    drop: tuple[Any, Any] = (0.0, False)  # p and training, of a function


@dataclass
class Chain:
    """A BatchNorm's call in a forward and what follows it there."""

    node: fx.Node
    norm: nn.Module
    name: str  # of the BatchNorm in the model
    links: list[Link]

    def shorten(self, count: int) -> None:
        """To so many links, and no nn.Identity at the end."""
        del self.links[count:]
        while self.links and self.links[-1].place == 0:
            self.links.pop()

    def described(self) -> str:
        parts = ["+ residual" if k.place == RESIDUAL else k.text for k in self.links if k.place]
        return " → ".join([str(self.node.target), *parts])


_ADDITIONS = {operator.add, torch.add, "add", "add_", in_place_functions["iadd"]}
_FUNCTIONS = {
    **dict.fromkeys([torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"], "relu"),
    **dict.fromkeys([F.leaky_relu, F.leaky_relu_], "leaky_relu"),
    F.silu: "silu",
    F.gelu: "gelu",
}
_DROPOUTS = {F.dropout, torch.dropout, torch.dropout_, functional.dropout}


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def link_of(node: fx.Node, value: fx.Node, layers: dict[str, nn.Module]) -> Link | None:
    """What `node` does to the chain's `value`, if that is something a chain does."""
    if node.op == "call_module":
        alone = (node.args == (value,) and not node.kwargs) or node.kwargs == {"input": value}
        return _layer_link(node, layers[node.target]) if alone else None
    if node.op not in ("call_function", "call_method") or "out" in node.kwargs:
        return None
    if node.target in _ADDITIONS:
        return _addition(node, value)
    if _argument(node, 0, "input") is not value:
        return None
    if node.target in _FUNCTIONS:
        activation, slope = _FUNCTIONS[node.target], SLOPE
        if activation == "leaky_relu":
            slope = _argument(node, 1, "negative_slope", SLOPE)
        if activation == "gelu" and _argument(node, 1, "approximate", "none") != "none":
            return None
        if not isinstance(slope, (int, float)):
            return None
        return Link(node, ACTIVATION, f"{activation}()", activation=activation, slope=slope)
    if node.target in _DROPOUTS:
        if any(node.kwargs.get(name) is not None for name in ("rng_state", "backend")):
            return None
        if node.kwargs.get("element_offset", 0) != 0:
            return None
        flag = "train" if node.target in (torch.dropout, torch.dropout_) else "training"
        drop = (_argument(node, 1, "p", 0.5), _argument(node, 2, flag, True))
        return Link(node, DROPOUT, "dropout()", drop=drop)
    return None


def _layer_link(node: fx.Node, layer: nn.Module) -> Link | None:
    name = str(node.target)
    if type(layer) is nn.Identity:
        return Link(node, 0, name, layer)
    kind = ABSORBABLE.get(type(layer))
    if kind is None or (kind is nn.GELU and layer.approximate != "none"):
        return None
    if kind is nn.Dropout:
        return Link(node, DROPOUT, name, layer)
    activation = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu", nn.GELU: "gelu"}
    slope = getattr(layer, "negative_slope", SLOPE)
    return Link(node, ACTIVATION, name, layer, activation=activation[kind], slope=slope)


def _addition(node: fx.Node, value: fx.Node) -> Link | None:
    first, second = _argument(node, 0, "input"), _argument(node, 1, "other")
    in_place = node.target in ("add_", in_place_functions["iadd"])
    if len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1 or first is second:
        return None
    if first is value and isinstance(second, fx.Node):
        return Link(node, RESIDUAL, "residual", residual=second, in_place=in_place)
    if second is value and isinstance(first, fx.Node) and not in_place:
        return Link(node, RESIDUAL, "residual", residual=first)
    return None
