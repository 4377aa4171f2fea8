"""Which parameters weight decay is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._checks import check_nonnegative

_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, InstanceNorm, ours too
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def param_groups(
    model: nn.Module,
    weight_decay: float = 1e-2,
    *,
    l1: float | None = None,
    report: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Makes two groups for an optimizer: weights, which decay, and biases and norms, which do not.

    A bias, a parameter of a norm layer and any other parameter of fewer than two dimensions gets
    neither decay nor l1. A parameter that requires no gradient is left out, and a shared one comes
    once.

    Args:
        model: the module whose parameters are grouped.
        weight_decay: the decay of the weights, at least 0.
        l1: the decoupled L1 of the weights, at least 0. None leaves it to the optimizer's own `l1`.
        report: a function that is called with one line for each parameter and each group, as
            `print` is.

    Returns:
        A list of groups, the decaying one first; a group that would be empty is left out. Each has
        the keys "params", "weight_decay" and "l1"; where `l1` is None the weights' group has no
        "l1".

    Raises:
        TypeError: `model` is no module.
        ValueError: `weight_decay` or `l1` is negative.

    Source: T. He et al., "Bag of tricks for image classification with convolutional neural
    networks", CVPR 2019, section 3.1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model must be a Module, got {type(model).__name__}")
    for name, value in (("weight_decay", weight_decay), ("l1", l1)):
        if value is not None:
            check_nonnegative("param_groups", name, value)
    say = report or (lambda line: None)
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "weight_decay": weight_decay} | ({} if l1 is None else {"l1": l1}),
        "no decay": {"params": [], "weight_decay": 0.0, "l1": 0.0},
    }
    seen: set[torch.Tensor] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            path = f"{prefix}.{name}" if prefix else name
            if not parameter.requires_grad:
                say(f"{path}: left out, it requires no gradient")
                continue
            reason = why_not(module, name, parameter)
            groups["decay" if reason is None else "no decay"]["params"].append(parameter)
            say(f"{path}: decay" if reason is None else f"{path}: no decay, {reason}")
    for name, group in groups.items():
        numel = sum(p.numel() for p in group["params"])
        say(
            f"{name}: {len(group['params'])} parameters, {numel:,} elements, "
            f"weight_decay {group['weight_decay']}, l1 {group.get('l1', 'as the optimizer has it')}"
        )
    return [group for group in groups.values() if group["params"]]


def why_not(module: nn.Module, name: str, parameter: torch.Tensor) -> str | None:
    """Why a parameter does not decay, or None where it does."""
    if isinstance(module, _NORMS):
        return f"of a {type(module).__name__}"
    if name == "bias" or name.endswith("_bias") or name.startswith("bias"):
        return "a bias"
    if parameter.dim() < 2:
        return "fewer than two dimensions"
    return None
