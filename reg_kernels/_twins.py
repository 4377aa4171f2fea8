"""The layers that stand in for torch's: which class is the twin of which."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

TWINS: dict[type[nn.Module], type[nn.Module]] = {}


def twin_of(layer: type[nn.Module]) -> Callable[[type[Module]], type[Module]]:
    """Class decorator: the fused class that `convert` swaps `layer` for.

    The class must be a subclass of `layer` that keeps its state as it is, with a class attribute
    `backend`: a swap changes a module's class and nothing else, so its parameters, buffers, hooks
    and flags stay the very objects they were.
    """

    def register(fused: type[Module]) -> type[Module]:
        if not issubclass(fused, layer):
            raise TypeError(f"twin_of: {fused.__name__} must be a subclass of {layer.__name__}")
        TWINS[layer] = fused
        return fused

    return register
