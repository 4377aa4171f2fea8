"""What layers share: each is one call in a graph of torch.fx, and reads its own tensors fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


def call_in_graph(layer: nn.Module, *arguments: Any) -> Any:
    """The call of a layer as a node of the graph that is being traced, or None where none is.

    fx takes the layers of torch.nn for single calls by where their classes are defined, and traces
    into all others: their flag `training` would be a constant of the graph then. As with torch's, a
    layer that is traced by itself is traced into.
    """
    for argument in arguments:
        if isinstance(argument, fx.Proxy):
            tracer = argument.tracer
            if not isinstance(tracer, fx.Tracer) or getattr(tracer, "root", layer) is layer:
                return None
            return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, {})
    return None


def are_overridden(*arguments: Any) -> bool:
    """Whether one of the arguments overrides torch's functions, as a tracer's proxy does.

    torch's `has_torch_function` is true below a mode as well, such as a default device or
    torch.export, which changes nothing about the arguments. Ask it before: it is fast.
    """
    plain = torch._C._disabled_torch_function_impl
    return any(
        type(x) not in (Tensor, nn.Parameter)
        and getattr(type(x), "__torch_function__", plain) is not plain
        for x in arguments
    )


# Where a layer's attribute is a parameter or a buffer, Python searches elsewhere first, for half a
# microsecond. What is registered is found where it lies; what a parametrization makes is not.


def parameter(layer: nn.Module, name: str) -> Tensor | None:
    """layer.name, a parameter as a rule."""
    own = layer._parameters
    return own[name] if name in own else getattr(layer, name)


def buffer(layer: nn.Module, name: str) -> Tensor | None:
    """layer.name, a buffer as a rule."""
    own = layer._buffers
    return own[name] if name in own else getattr(layer, name)
