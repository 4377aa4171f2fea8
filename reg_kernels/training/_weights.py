"""A model's parameters and buffers, by name, and copies of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .._numbers import refuse

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def model_tensors(op: str, model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; those that go by several names, once."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        for name, x in chain(module._parameters.items(), module._buffers.items()):
            if x is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(x), (f"{path}.{name}" if path else name, x))
    tensors = dict(found.values())
    lazy = [name for name, x in tensors.items() if nn.parameter.is_lazy(x)]
    if lazy:
        refuse(op, "model", "initialised: call it once before", f"a lazy {lazy[0]}", ValueError)
    return tensors


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in tensors.items()}


def difference(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> str | None:
    """What the first difference is, in words."""
    for name, shape in expected.items():
        if name not in shapes:
            return f"none of the name {name}"
        if shapes[name] != shape:
            return f"{tuple(shapes[name])} for {name} of shape {tuple(shape)}"
    more = shapes.keys() - expected.keys()
    return f"one more, {min(more)}" if more else None


def copied(
    what: Mapping[str, Tensor], live: Mapping[str, Tensor], room: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of `what`, laid out as the model's tensors are, in `room` as far as it has some where
    and of the dtype that these are now."""
    copies = {}
    with torch.inference_mode(False):
        for name, x in live.items():
            mine = room.get(name)
            if mine is None or (mine.device, mine.dtype) != (x.device, x.dtype):
                mine = torch.empty_like(x, requires_grad=False)
            copies[name] = mine
    try:
        copy_all(copies, what)
    except KeyboardInterrupt:
        copy_all(copies, what)  # the rest, or what is put back would be a mix of two checks
        raise
    return copies


def copy_all(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """A launch for each pair of devices and dtypes."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    with torch.inference_mode(False), torch.no_grad():
        for name in to:
            x, y = _local(to[name]), _local(source[name])
            mine, theirs = groups[x.device, x.dtype, y.device, y.dtype]
            mine.append(x)
            theirs.append(y)
        for mine, theirs in groups.values():
            torch._foreach_copy_(mine, theirs)


def _local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x
