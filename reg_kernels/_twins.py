"""The layers that stand in for torch's: which class is the twin of which."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

TWINS: dict[type[nn.Module], type[nn.Module]] = {}


def twin_of(
    layer: type[nn.Module], *, base: type[nn.Module] | None = None
) -> Callable[[type[Module]], type[Module]]:
    """Class decorator: the fused class that `convert` swaps `layer` for.

    The class must be a subclass of `layer` that keeps its state as it is, with a class attribute
    `backend`: a swap changes a module's class and nothing else, so its parameters, buffers, hooks
    and flags stay the very objects they were. With `base`, a class that `layer` has its state from,
    it may be a subclass of that instead.
    """
    base = layer if base is None else base

    def register(fused: type[Module]) -> type[Module]:
        if not issubclass(fused, base) or not issubclass(layer, base):
            raise TypeError(f"twin_of: {fused.__name__} must be a subclass of {base.__name__}")
        TWINS[layer] = fused
        return fused

    return register
