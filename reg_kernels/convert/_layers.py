"""Swapping the layers of a model for their fused twins, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from .. import backends
from .._twins import TWINS
from ..nn.stochastic_depth import find_twins_of_packages
from . import _fuse
from ._forwards import why_opaque
from ._fused import Fused, set_class
from ._report import Conversion, qualified


def convert(
    model: nn.Module,
    *,
    fuse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
    report: Callable[[Conversion], object] | None = None,
) -> nn.Module:
    """Swaps every layer of a model that has a fused twin for that twin: torch's, and of timm and
    torchvision, where they are imported, the layers of stochastic depth.

    A layer keeps its parameters, buffers, hooks, training flag and `state_dict` keys. It stays the
    same object (in the copy, if one is made): only its class changes. Subclasses of torch's layers
    are left alone, since their `forward` may be their own, and so are TorchScript's modules.

    With `fuse`, chains BatchNorm → (+ residual) → ReLU, LeakyReLU, SiLU or exact GELU → Dropout run
    in one pass; any of the three behind the BatchNorm may be missing. So does the sum of a shortcut
    and a `DropPath` or `StochasticDepth` layer's output, with a layer scale before it. `torch.fx`
    finds them in the forward of one module, where nothing else uses what lies between. Only the
    module whose forward has the chain gets another class, a subclass of its own. The chain's layers
    are swapped as all others are, and are looked at again at each call: one that was replaced,
    taken out, frozen, or given a hook or a forward of its own is called by itself. An nn.Sequential
    may be rearranged as before. Calls, state and gradients stay what they were, to rounding.

    Any other module runs its graph as its forward. It warns and runs its layers one by one from
    then on if a plain attribute changes that its forward read, if a layer is added or taken away,
    or if an argument comes that was left out before. Where a forward cannot be traced safely, or
    where a class cannot have a subclass, the layers of that module are swapped one by one, and the
    modules inside it are still looked at.

    Args:
        model: any module, itself a layer or made of layers.
        fuse: True fuses the chains behind BatchNorm, and sums of a shortcut and a dropped branch.
        inplace: True changes `model` itself. False changes a deep copy.
        backend: the implementation that the swapped layers force, "native", "triton" or
            "reference". None lets each call choose.
        report: a function that is called with a `Conversion`: what was fused and swapped, what was
            left and why. `report=print` shows it.

    Returns:
        `model`, or its converted copy. `revert` undoes the conversion.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: `backend` is unknown.
        RuntimeError: `model` cannot be copied; `inplace=True` needs no copy.

    When it raises, `model` is as it was.

    Example::

        model = reg_kernels.convert(model, fuse=True, report=print)
    """
    check_model("convert", model)
    find_twins_of_packages()
    if backend is not None:
        backends.check_name(backend, "backend")
    model = model if inplace else copied("convert", model)
    conversion = Conversion()
    fusing = _fuse.plan(model, conversion) if fuse else _fuse.Fusing()
    classes, forced = fusing.classes, fusing.members
    opaque: set[nn.Module] = set()
    for name, module in model.named_modules():
        cls = type(module)
        if module in opaque:
            continue
        if (reason := why_opaque(module)) is not None:
            if isinstance(module, torch.jit.ScriptModule):
                opaque |= set(module.modules())
            conversion.left.append((name, qualified(cls), f"it {reason}"))
        elif (twin := TWINS.get(cls)) is not None:
            classes.append((module, twin))
            forced.append(module)
            conversion.swapped.append((name, qualified(cls), qualified(twin)))
        elif not issubclass(cls, Fused) and (reason := _why_left(cls)) is not None:
            conversion.left.append((name, qualified(cls), reason))
    set_classes(classes)
    if backend is not None:
        for module in forced:
            module.backend = backend  # type: ignore[assignment]  # an attribute of all twins
    if report is not None:
        report(conversion)
    return model


def set_classes(classes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Gives each object its class, all of them or none."""
    before = [(module, type(module)) for module, _ in classes]
    try:
        for module, cls in classes:
            set_class(module, cls)
    except BaseException:
        for module, cls in before:
            set_class(module, cls)
        raise


def copied(name: str, model: nn.Module) -> nn.Module:
    """A deep copy, or an error that says what in the model has none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        where, module = _without_copy("", model)
        raise RuntimeError(
            f"{name}: model cannot be copied, because of {where or 'the model itself'} "
            f"({type(module).__name__}): {type(error).__name__}: {error}. "
            f"{name}(model, inplace=True) changes the model itself and copies nothing"
        ) from error


def _without_copy(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The innermost module that cannot be copied, of one that cannot."""
    for key, child in module.named_children():
        try:
            copy.deepcopy(child)
        except Exception:
            return _without_copy(f"{name}.{key}" if name else key, child)
    return name, module


def _why_left(cls: type[nn.Module]) -> str | None:
    """The reason to report for a layer that stays; None where nobody expects a change."""
    if cls.__module__.startswith("reg_kernels.nn."):
        return "fused already"
    for layer, twin in TWINS.items():
        if issubclass(cls, twin):
            return "fused already"
        if issubclass(cls, layer):
            return f"a subclass of {qualified(layer)}, whose forward may be its own"
    if cls.__module__.startswith("torch.nn.") and any(
        word in cls.__name__ for word in ("Dropout", "BatchNorm")
    ):
        return "there is no fused twin of it"
    return None


def revert(
    model: nn.Module,
    *,
    inplace: bool = False,
    report: Callable[[Conversion], object] | None = None,
) -> nn.Module:
    """Undoes `convert`: every fused layer becomes torch's again, every chain its layers.

    Result and errors are those of `convert`. A forced `backend` is forgotten.

    Args:
        model: any module.
        inplace: True changes `model` itself. False changes a deep copy.
        report: as in `convert`.
    """
    check_model("revert", model)
    find_twins_of_packages()
    model = model if inplace else copied("revert", model)
    originals = {twin: layer for layer, twin in TWINS.items()}
    conversion = Conversion()
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module in model.named_modules():
        cls = type(module)
        original = module._original if isinstance(module, Fused) else originals.get(cls)
        if original is None:
            continue
        classes.append((module, original))
        if qualified(original) != qualified(cls):  # not a block, which kept its name
            conversion.swapped.append((name, qualified(cls), qualified(original)))
    set_classes(classes)
    for module, cls in classes:
        if cls in TWINS:
            module.__dict__.pop("backend", None)
    if report is not None:
        report(conversion)
    return model


def check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
