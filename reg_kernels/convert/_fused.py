"""Modules whose forward runs chains: the same objects under another class, which can be undone."""

from __future__ import annotations

import functools
import types
from typing import Any, SupportsIndex

from torch import nn
from torch.overrides import has_torch_function_unary

from ..nn._leaf import are_overridden
from ._chain import TWIN_NORMS, run


class Fused:
    """What `convert(fuse=True)` made of a module by giving its object another class."""

    _original: type[nn.Module]

    def take_apart(self) -> None:
        """Gives the object the class that it had; its layers were not changed."""
        set_class(self, self._original)


def set_class(module: Any, cls: type) -> None:
    # Past a __setattr__ of the user's.
    object.__setattr__(module, "__class__", cls)


def copies_itself(cls: type[nn.Module]) -> bool:
    """Whether a class decides on its own what copies and pickles of it are."""
    return any(
        getattr(cls, name, None) is not getattr(nn.Module, name, None)
        for name in ("__reduce_ex__", "__reduce__", "__deepcopy__", "__copy__")
    )


class FusedSequential(Fused, nn.Sequential):
    """nn.Sequential that runs each BatchNorm together with the layers behind it.

    It looks at what it holds at each call, so that layers may come, go and change as in any other.
    """

    _original = nn.Sequential

    def forward(self, input: Any) -> Any:
        # Who overrides torch's functions sees the layers.
        if has_torch_function_unary(input) and are_overridden(input):
            return nn.Sequential.forward(self, input)
        layers = list(self._modules.values())
        i = 0
        while i < len(layers):
            layer = layers[i]
            i += 1
            if type(layer) in TWIN_NORMS:
                input, i = run(layer, input, layers, i)
            else:
                input = layer(input)
        return input


class _FusedSequentialSubclass(FusedSequential):
    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new_sequential, (self._original,), self.__getstate__()


@functools.cache
def sequential_class(original: type[nn.Module]) -> type[nn.Module]:
    """FusedSequential for an nn.Sequential, or for a subclass with the same forward."""
    if original is nn.Sequential:
        return FusedSequential
    return subclass(original, _FusedSequentialSubclass, {})


def _new_sequential(original: Any) -> nn.Module:
    cls = sequential_class(original)
    return cls.__new__(cls)


def subclass(
    original: type[nn.Module], base: type[Fused], members: dict[str, Any]
) -> type[nn.Module]:
    """A class that is `base` first and `original` otherwise."""
    body = {
        # By its own name, since whoever looks at a model's classes knows that one.
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
        **members,
    }
    return types.new_class(
        original.__name__, (base, original), {}, lambda names: names.update(body)
    )
