"""Folding BatchNorm in evaluation into the layer before it: y = w x + b stays one multiply-add.

With frozen statistics BatchNorm multiplies channel c by s = weight / sqrt(running_var + eps) and
adds bias - running_mean s, which a convolution or linear layer before it does as well with the
weights s w and the bias s (b - running_mean) + bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from .. import functional as F
from .. import nn as fused_nn
from .._activation import NUMBERS
from ..reference.batch_norm import activate
from ._forwards import Forward, has_forward, read_forwards, why_not_touched, why_opaque
from ._fused import Fused
from ._layers import check_model, copied, set_classes
from ._links import is_norm
from ._report import qualified

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WITH_ACTIVATION = (
    fused_nn.BatchNormAct1d,
    fused_nn.BatchNormAct2d,
    fused_nn.BatchNormAct3d,
    fused_nn.SyncBatchNormAct,
)

_AFTER_LINEAR = (
    *(nn.BatchNorm1d, nn.SyncBatchNorm),
    *(fused_nn.SyncBatchNorm, fused_nn.SyncBatchNormAct),
)


@dataclass
class Folding:
    """What `fold_batch_norm` did. It prints as a list of layers.

    Attributes:
        folded: (name of the BatchNorm, name of the layer that it went into) of each pair.
        left: (name, class, reason) of each BatchNorm that stayed.
    """

    folded: list[tuple[str, str]] = field(default_factory=list)  # BatchNorm, the layer it is now in
    left: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, reason

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} folded, {len(self.left)} left as they were"]
        lines += [f"  {name} into {layer}" for name, layer in self.folded]
        lines += [f"  {name or '(model)'}: {cls} left: {why}" for name, cls, why in self.left]
        return "\n".join(lines)


class FoldedBatchNorm(nn.Module):
    """What is left of a folded BatchNorm: dropout(activation(input + residual)), and one check.

    Args:
        norm: the layer that was folded.
        after_linear: whether to insist on (N, C). A linear layer's features are the last dimension,
            BatchNorm's channels the second, which is known at a call only.
    """

    def __init__(self, norm: nn.Module, after_linear: bool) -> None:
        super().__init__()
        self.activation = getattr(norm, "activation", None)
        self.negative_slope = getattr(norm, "negative_slope", 0.0)
        self.drop = getattr(norm, "drop", 0.0)
        self.after_linear = after_linear

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.after_linear and input.dim() != 2:
            raise ValueError(
                "fold_batch_norm: input of a BatchNorm1d folded into a Linear must be (N, C), "
                f"got {input.dim()} dims"
            )
        if residual is not None:
            input = input + residual
        output = activate(input, NUMBERS[self.activation], self.negative_slope)
        return F.dropout(output, self.drop, self.training)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, drop={self.drop}"


@dataclass
class _Pair:
    norm: Any
    norm_name: str
    layer: Any
    layer_name: str


def fold_batch_norm(
    model: nn.Module,
    *,
    inplace: bool = False,
    report: Callable[[Folding], object] | None = None,
) -> nn.Module:
    """Folds each BatchNorm of a model for evaluation into the layer before it.

    The layer before it is a Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear whose result nothing else
    uses. `torch.fx` finds it in the forward of one module, or it stands before the BatchNorm in an
    nn.Sequential. An nn.Identity takes the BatchNorm's place; of a `BatchNormAct` its residual,
    activation and dropout remain, and what else `convert(fuse=True)` fused stays fused. The result
    is for evaluation: its `state_dict` lacks the BatchNorm layers, and nothing undoes it but a
    copy.

    Args:
        model: a module. Torch's BatchNorm layers and ours are folded where they are in evaluation
            mode. Layers that have hooks, that are called twice or that have no running statistics
            stay.
        inplace: True changes `model` itself. False changes a deep copy.
        report: a function that is called with a `Folding`: what was folded into what, what was left
            and why. `report=print` shows it.

    Returns:
        `model`, or its folded copy. In evaluation it computes the same, to rounding. The new
        weights are computed in float64 and rounded once.

    Raises:
        TypeError: `model` is not an nn.Module.
        RuntimeError: a BatchNorm that could be folded is in training mode, or `model` cannot be
            copied (`inplace=True` needs no copy). Nothing is changed then.

    Example::

        model = reg_kernels.fold_batch_norm(model.eval(), report=print)
    """
    check_model("fold_batch_norm", model)
    model = model if inplace else copied("fold_batch_norm", model)
    fused: list[Any] = [
        (module, type(module)) for module in model.modules() if isinstance(module, Fused)
    ]
    folding = Folding()
    set_classes([(module, module._original) for module, _ in fused])  # whose forwards are read
    try:
        pairs = _find(model, folding)
        for pair in pairs:
            if pair.norm.training:
                raise RuntimeError(
                    f"fold_batch_norm: {pair.norm_name} must be in evaluation mode, got training "
                    "mode: call model.eval() first"
                )
        values = [_values(pair) for pair in pairs]
        for pair, (weight, bias) in zip(pairs, values, strict=True):
            _fold(model, pair, weight, bias)
            folding.folded.append((pair.norm_name, pair.layer_name))
    finally:
        set_classes(fused)
    if report is not None:
        report(folding)
    return model


def _is_foldable(layer: nn.Module) -> bool:
    return is_norm(layer) or type(layer) in _WITH_ACTIVATION


class _Uses:
    """Where layers stand in a model and who calls them, as far as forwards were read."""

    def __init__(self, model: nn.Module, forwards: list[Forward]) -> None:
        self._calls = Counter(id(layer) for f in forwards for _, layer in f.calls())
        self._places = Counter(
            id(child) for m in model.modules() for child in m._modules.values() if child is not None
        )
        self._values_read = {
            id(f.layers[owner])
            for f in forwards
            for node in f.trace.graph.nodes
            if node.op == "get_attr" and (owner := str(node.target).rpartition(".")[0])
        }

    def why_not_once(self, layer: nn.Module, forward: Forward) -> str | None:
        """Why a layer may do something else where `forward` does not call it, or None."""
        if self._calls[id(layer)] > 1:
            return "is called more than once"
        if self._places[id(layer)] > 1:
            return "stands in more than one place"
        if id(layer) in self._values_read:
            return "has its values read by a forward"
        if not forward.owns(layer):
            return "is called by another module than the one that holds it"
        return None


def _find(model: nn.Module, folding: Folding) -> list[_Pair]:
    readable = [(name, m) for name, m in model.named_modules() if has_forward(m)]
    forwards, failed = read_forwards(readable, _is_foldable, evaluation_only=True)
    uses = _Uses(model, forwards)
    names = {id(module): name for name, module in model.named_modules()}
    reasons: dict[int, str | None] = {
        id(layer): f"the forward of {name or 'the model'} cannot be traced: it {reason}"
        for name, module, reason in failed
        for layer in module.modules()
    }
    pairs = []
    opaque: tuple[str, ...] = ()
    for forward in forwards:
        for node, norm in forward.calls():
            if not _is_foldable(norm):
                continue
            source: Any = node.args[0] if node.args else node.kwargs.get("input")
            reason = _why_not(forward, norm, source, uses)
            if reason is None:
                layer = forward.layers[str(source.target)]
                pairs.append(_Pair(norm, names[id(norm)], layer, names[id(layer)]))
            reasons[id(norm)] = reason
    for name, module in model.named_modules():
        if (reason := why_opaque(module)) is not None and not name.startswith(opaque):
            folding.left.append((name, qualified(type(module)), f"it {reason}"))
            opaque += (f"{name}.",) if name else ("",)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = "not one of torch's BatchNorm1d/2d/3d or ours"
            if _is_foldable(module):
                reason = reasons.get(id(module), "no forward calls it")
            if reason is not None:
                folding.left.append((name, qualified(type(module)), reason))
    return pairs


def _why_not(forward: Forward, norm: Any, source: Any, uses: _Uses) -> str | None:
    """Why a BatchNorm cannot go into what computes its input, or None where it can."""
    reason = why_not_touched(norm) or uses.why_not_once(norm, forward)
    if reason is not None:
        return f"it {reason}"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    layer: Any = None
    if isinstance(source, fx.Node) and source.op == "call_module":
        layer = forward.layers[str(source.target)]
    if type(layer) not in (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear):
        return "no convolution or linear layer comes before it in the same forward"
    if len(source.users) > 1:
        return f"the result of {source.target} is used elsewhere, too"
    reason = why_not_touched(layer) or uses.why_not_once(layer, forward)
    if reason is not None:
        return f"{source.target} {reason}"
    linear = isinstance(layer, nn.Linear)
    if linear and not isinstance(norm, _AFTER_LINEAR):
        return "its channels are not the features of the linear layer before it"
    if norm.num_features != (layer.out_features if linear else layer.out_channels):
        return f"its channels are not those of {source.target}"
    return None


@torch.no_grad()
def _values(pair: _Pair) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight and the bias of the layer with the BatchNorm in it."""
    weight, bias = _weights(pair.norm, pair.layer)
    like, trained = pair.layer.weight, pair.layer.weight.requires_grad
    return (
        nn.Parameter(weight.to(like), requires_grad=trained),
        nn.Parameter(bias.to(like), requires_grad=trained),
    )


def _fold(model: nn.Module, pair: _Pair, weight: nn.Parameter, bias: nn.Parameter) -> None:
    norm, layer = pair.norm, pair.layer
    layer.weight, layer.bias = weight, bias
    linear = isinstance(layer, nn.Linear)
    rest: nn.Module = nn.Identity()
    if linear or type(norm) in _WITH_ACTIVATION:
        rest = FoldedBatchNorm(norm, linear)
    owner, _, name = pair.norm_name.rpartition(".")
    model.get_submodule(owner)._modules[name] = rest.train(norm.training)


def _weights(norm: Any, layer: Any) -> tuple[Tensor, Tensor]:
    """What they are in float64."""
    channels = norm.running_mean.double()
    statistics = (channels, norm.running_var.double(), norm.eps)
    scale = torch.ones_like(channels) if norm.weight is None else norm.weight.double()
    shift = torch.zeros_like(channels) if norm.bias is None else norm.bias.double()
    weight = layer.weight.double()
    bias = torch.zeros_like(channels) if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_weights(weight, bias, *statistics, scale, shift)
    if not isinstance(layer, _TRANSPOSED):
        return fuse_conv_bn_weights(weight, bias, *statistics, scale, shift)
    # Transposed weights are (C_in, C_out / groups, ...), a group's channels beside each other.
    groups = layer.groups
    mean, var, scale, shift, bias = (
        values.chunk(groups) for values in (channels, statistics[1], scale, shift, bias)
    )
    parts = [
        fuse_conv_bn_weights(w, b, m, v, norm.eps, s, t, transpose=True)
        for w, b, m, v, s, t in zip(
            weight.chunk(groups), bias, mean, var, scale, shift, strict=True
        )
    ]
    return torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts])
