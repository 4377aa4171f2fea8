"""The fused optimizers in timm's optimizer factory."""

from __future__ import annotations

from typing import Any

from .. import optim

# By timm's names for torch's: what timm has to know of each. Its SGD is Nesterov's by default.
_ADAM: dict[str, Any] = {"has_betas": True}
_SGD: dict[str, Any] = {"has_eps": False, "has_momentum": True, "defaults": {"nesterov": True}}
_OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "adamw": (optim.AdamW, _ADAM),
    "adam": (optim.Adam, _ADAM),
    "sgdw": (optim.SGDW, _SGD),
    "sgd": (optim.SGD, _SGD),
}


def register(prefix: str = "rk") -> list[str]:
    """Puts `optim.AdamW`, `Adam`, `SGDW` and `SGD` into timm's optimizer factory.

    `timm.optim.create_optimizer_v2(model, "rkadamw", lr=1e-3, weight_decay=0.05)` makes one then,
    with timm's groups: no decay of biases and norms, a learning rate that falls from layer to layer
    (`layer_decay`), and so on. Options of ours, as `max_grad_norm` or `ema_decay`, are arguments
    like others. What timm sets by default for its own optimizer of that name it sets for ours:
    Nesterov's momentum of 0.9 for "rksgd" and "rksgdw". To call it again changes nothing.

    Args:
        prefix: what comes before timm's names "adamw", "adam", "sgdw" and "sgd". It must have no
            "_", behind which timm looks for the name. An empty one replaces timm's own optimizers,
            for training scripts as they are; timm warns of it.

    Returns:
        The names that were registered.

    Raises:
        ImportError: timm 1.0.12 or later is not installed.
        TypeError: `prefix` is no string.
        ValueError: it has a "_".
    """
    if not isinstance(prefix, str):
        raise TypeError(f"register: prefix must be a str, got {type(prefix).__name__}")
    if "_" in prefix:
        raise ValueError(f"register: prefix must have no '_', got {prefix!r}")
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry

    names = []
    for name, (cls, known) in _OPTIMIZERS.items():
        description = f"reg_kernels' {cls.__name__}, one launch a step"
        info = OptimInfo(f"{prefix}{name}", cls, description, **known)
        if info.name not in default_registry.list_optimizers(info.name) or (
            default_registry.get_optimizer_info(info.name) != info
        ):
            default_registry.register(info)
        names.append(info.name)
    return names
