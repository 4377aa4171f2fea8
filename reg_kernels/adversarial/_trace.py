"""What an attack leaves of its calls of the model: nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from .._numbers import refuse

# Layers, or classes above them, of ours and of other packages, that look at their flag `training`
# and drop for no other reason; and those that drop by the number of this name.
_DROPPING = ("DropPath", "StochasticDepth", "StochasticDepthBlock", "GaussianDropout")
_SHARES = ("drop", "dropout")


def check_initialised(name: str, model: Any) -> None:
    """Raises ValueError, as torch does, of a model that has yet to see what it is for: its first
    call draws its parameters and makes its buffers, and no attack could put those back."""
    if not isinstance(model, nn.Module):
        return
    for named in (model.named_parameters(), model.named_buffers()):
        for of, x in named:
            if torch.nn.parameter.is_lazy(x):
                refuse(
                    name, "model", "initialised: call it once before", f"a lazy {of}", ValueError
                )


@contextlib.contextmanager
def leaving_no_trace(
    model: Any, device: torch.device, dropout: bool, preserve_rng_state: bool
) -> Iterator[None]:
    """Gradients are recorded inside, whatever is outside; buffers, such as running statistics, are
    then what they were. The flags `training` are not touched, but, without dropout, those of
    layers that drop.

    Buffers are written over past their versions: a graph that has saved one finds what it saved.
    """
    module = model if isinstance(model, nn.Module) else nn.Module()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if preserve_rng_state:
            devices = [device] if device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
        for each in module.modules():
            if isinstance(each, DistributedDataParallel):
                stack.enter_context(each.no_sync())  # else it prepares for an exchange of gradients
        if not dropout:
            stack.enter_context(_without_dropout(module))
        stack.enter_context(_restored(module))
        yield


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    saved = [
        (layer._buffers, name, x, x.detach().clone())
        for layer in module.modules()
        for name, x in layer._buffers.items()
        if x is not None
    ]
    try:
        yield
    finally:
        for buffers, name, x, before in saved:
            x.data.copy_(before)
            buffers[name] = x  # a forward may have put another tensor there


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    changed: list[tuple[nn.Module, str, Any]] = []

    def change(layer: nn.Module, name: str, value: Any) -> None:
        changed.append((layer, name, getattr(layer, name)))
        setattr(layer, name, value)

    try:
        for layer in module.modules():
            names = {cls.__name__ for cls in type(layer).__mro__}
            if isinstance(layer, _DropoutNd) or not names.isdisjoint(_DROPPING):
                change(layer, "training", False)
            for name in _SHARES:
                if type(getattr(layer, name, None)) is float:
                    change(layer, name, 0.0)
        yield
    finally:
        for layer, name, value in reversed(changed):
            setattr(layer, name, value)
