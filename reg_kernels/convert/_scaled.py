"""The product with a layer scale before a dropped branch: found in a forward, and looked at again
at each call, where its factors may go on by themselves."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from inspect import CO_COROUTINE, CO_GENERATOR, CO_VARARGS, CO_VARKEYWORDS
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._dtypes import DTYPES
from ..ops.drop_path import broadcasts


class _LayerScale(nn.Module):
    """As timm and the models after it have it, each for itself."""

    gamma: Tensor
    inplace: bool

    def forward(self, x):  # type: ignore[no-untyped-def]
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class _LayerScale2d(_LayerScale):
    def forward(self, x):  # type: ignore[no-untyped-def]
        gamma = self.gamma.view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


def _text(code: CodeType) -> tuple[Any, ...]:
    """What a function does, whatever its file and its arguments' names."""
    kind = code.co_flags & (CO_VARARGS | CO_VARKEYWORDS | CO_GENERATOR | CO_COROUTINE)
    arguments = (code.co_argcount, code.co_kwonlyargcount, code.co_freevars, code.co_cellvars)
    return code.co_code, code.co_names, code.co_consts, kind, *arguments


_VIEWS: dict[tuple[Any, ...], tuple[int, ...]] = {
    _text(_LayerScale.forward.__code__): (-1,),
    _text(_LayerScale2d.forward.__code__): (1, -1, 1, 1),
}
_KNOWN: dict[type[nn.Module], tuple[int, ...] | None] = {}


def _view_of(layer: nn.Module) -> tuple[int, ...] | None:
    """The shape that a layer multiplies by its gamma in, or None of any other layer."""
    cls = type(layer)
    if cls not in _KNOWN and not torch.compiler.is_compiling():
        code = getattr(cls.forward, "__code__", None)
        own = cls.__call__ is nn.Module.__call__
        _KNOWN[cls] = _VIEWS.get(_text(code)) if own and code is not None else None
    return _KNOWN.get(cls)


@dataclass(frozen=True)
class Product:
    """A value that is not computed yet: x times another one, or what a layer makes of x."""

    x: Any
    by: Any
    of_layer: bool

    def value(self) -> Any:
        return self.by(self.x) if self.of_layer else self.x * self.by

    def parts(self) -> tuple[Any, Any]:
        """An input and its layer scale, or the value and None."""
        for x, scale in self._factors():
            if _goes_along(scale, x):
                return x, scale
        return self.value(), None

    def _factors(self) -> tuple[tuple[Any, Any], ...]:
        if not self.of_layer:
            return (self.x, self.by), (self.by, self.x)
        view = _view_of(self.by)
        if view is None or self.by.inplace or not isinstance(self.by.gamma, Tensor):
            return ()
        return ((self.x, self.by.gamma if len(view) == 1 else self.by.gamma.view(view)),)


def product(x: Any, by: Any) -> Product:
    return Product(x, by, False)


def scaled(x: Any, layer: Any) -> Product:
    return Product(x, layer, True)


def _goes_along(scale: Any, x: Any) -> bool:
    """Whether a product has x's shape and dtype, and is one with a layer scale."""
    return (
        isinstance(x, Tensor)
        and isinstance(scale, Tensor)
        and x.dtype in DTYPES
        and scale.dtype in DTYPES
        and (x.dtype == scale.dtype or torch.promote_types(x.dtype, scale.dtype) == x.dtype)
        and x.device == scale.device
        and x.dim() > 0
        and broadcasts(scale, x)
    )


def is_layer_scale(layer: nn.Module) -> bool:
    return _view_of(layer) is not None and not layer.inplace


def find_product(node: fx.Node, layers: dict[str, nn.Module]) -> fx.Node | None:
    """The product that a layer's call is given, if that is all it is for."""
    source = node.all_input_nodes[0]
    if len(source.users) != 1 or source.kwargs:
        return None
    nodes = [value for value in source.args if isinstance(value, fx.Node)]
    if len(nodes) != len(source.args):
        return None
    if source.op == "call_module":
        found = len(nodes) == 1 and is_layer_scale(layers[str(source.target)])
    else:
        found = len(nodes) == 2 and source.target in (operator.mul, torch.mul, "mul")
        found = found and any(map(_is_of_attributes, nodes))
    return source if found else None


def _is_of_attributes(node: fx.Node) -> bool:
    """Whether a value comes of the module's parameters and buffers alone, as a view of one does."""
    computed = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
    return node.op == "get_attr" or (computed and all(map(_is_of_attributes, node.all_input_nodes)))
