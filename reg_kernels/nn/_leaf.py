"""What makes a layer one call in a graph of torch.fx, as torch's layers are."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


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
