"""A BatchNorm and what follows it, or a dropped branch and its shortcut, run in one pass where its
parts let it be one at that call.

A fused module keeps its layers as they are and hands them over at each call: what was replaced,
hooked, frozen or moved since is called by itself, and the rest goes on together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as torch_functional
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional as F
from .. import nn as twins
from ..nn.stochastic_depth import DropsPaths
from ..ops.batch_norm import SLOPE
from ._scaled import Product

# The layers of a chain, by torch's; fused are their twins, and activations, which have none.
NORMS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    nn.SyncBatchNorm,
)
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}
TWIN_NORMS = (twins.BatchNorm1d, twins.BatchNorm2d, twins.BatchNorm3d, twins.SyncBatchNorm)


# In the order of a chain, in which each may stand once; a link of place 0 does nothing.
RESIDUAL, ACTIVATION, DROPOUT = 1, 2, 3

# What a forward does by functions is a link (name, argument, ...), of these and of
# ("dropout", p, training, inplace).
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "+": operator.add,  # residual
    "+=": operator.iadd,  # residual
    "relu": torch_functional.relu,  # inplace
    "leaky_relu": torch_functional.leaky_relu,  # negative_slope, inplace
    "silu": torch_functional.silu,  # inplace
    "gelu": torch_functional.gelu,
}
_PLACES: dict[Any, int] = {
    nn.Identity: 0,
    **dict.fromkeys(["+", "+="], RESIDUAL),
    **dict.fromkeys([*ACTIVATIONS, *ACTIVATIONS.values()], ACTIVATION),
    **dict.fromkeys([twins.Dropout, "dropout"], DROPOUT),
}


def is_bare(module: nn.Module) -> bool:
    """Whether calling a layer is no more than its class's forward."""
    state = module.__dict__
    return "forward" not in state and not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def _fits(residual: Any, input: Any) -> bool:
    """Whether a residual can be added in the same pass; torch would broadcast or promote others."""
    return (
        isinstance(residual, Tensor)
        and isinstance(input, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def _parameters(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias. To ask a module for them takes as long as all checks of a chain together;
    where they are no parameters, as in the replicas of DataParallel, there is no other way."""
    own = norm._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return norm.weight, norm.bias  # type: ignore[return-value]


def run(norm: Any, input: Any, links: Sequence[Any], start: int) -> tuple[Any, int]:
    """The result of a layer and of as many of links[start:] as it can do, and the next link.

    Args:
        norm: what stands where a BatchNorm did, or a layer of stochastic depth; any layer.
        input: of a layer of stochastic depth also a Product.
        links: layers, which may be any, and functions with their arguments.
    """
    by_itself = not is_bare(norm) or _has_any_global_hook()
    scale = None
    if type(input) is Product:
        bare = not by_itself and isinstance(norm, DropsPaths)
        bare = bare and (not input.of_layer or is_bare(input.by))
        input, scale = input.parts() if bare else (input.value(), None)
    if by_itself:
        return norm(input), start
    if isinstance(norm, DropsPaths):
        link = links[start] if start < len(links) else None
        given = () if scale is None else (None, scale)
        # What += would write over is a product that nothing else sees, or the branch's own.
        sums = ("+",) if scale is None else ("+", "+=")
        if type(link) is tuple and link[0] in sums and _fits(link[1], input):
            return norm(input, link[1], *given[1:]), start + 1
        return norm(input, *given), start
    if type(norm) not in TWIN_NORMS:
        return norm(input), start
    residual: Any = None
    activation: Any = None
    slope, p, dropping = SLOPE, 0.0, False
    place, end = 0, start
    for i in range(start, len(links)):
        link = links[i]
        is_function = type(link) is tuple
        kind = link[0] if is_function else type(link)
        here = _PLACES.get(kind)
        if here is None or 0 < here <= place or not (is_function or is_bare(link)):
            break
        if here == RESIDUAL:
            if not _fits(link[1], input):
                break
            residual = link[1]
        elif here == ACTIVATION:
            if kind is nn.GELU and link.approximate != "none":
                break
            activation = kind if is_function else ACTIVATIONS[kind]
            if activation == "leaky_relu":
                slope = link[1] if is_function else link.negative_slope
        elif here == DROPOUT:
            if is_function:
                p, dropping = link[1], link[2]
            elif link.backend is None or link.backend == norm.backend:
                p, dropping = link.p, link.training
            else:
                break
        if here:
            place, end = here, i + 1
    if end == start:
        return norm(input), start
    norm._check_input_dim(input)
    running_mean, running_var, training, momentum, counter = norm._statistics()
    output = F.batch_norm_act(
        *(input, running_mean, running_var, *_parameters(norm), residual),
        *(training, momentum, norm.eps),
        activation=activation,
        negative_slope=slope,
        drop=p if dropping and training else 0.0,
        num_batches_tracked=counter,
        process_group=norm.across(input),
        backend=norm.backend,
    )
    if dropping and not training:  # frozen statistics do not stop a dropout
        output = F.dropout(output, p, backend=norm.backend)
    return output, end


def chain(norm: Any, input: Any, *links: Any) -> Any:
    """What comes of a layer's call and of the links behind it, as much as can be in one pass."""
    output, done = run(norm, input, links, 0)
    for link in links[done:]:
        if type(link) is not tuple:
            output = link(output)
        elif link[0] == "dropout":  # which is ours, and a layer's implementation may be forced
            output = F.dropout(output, *link[1:], backend=getattr(norm, "backend", None))
        else:
            output = _FUNCTIONS[link[0]](output, *link[1:])
    return output
