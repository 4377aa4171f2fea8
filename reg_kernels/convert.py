"""Swapping the layers of a model for their fused twins, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from . import backends

Module = TypeVar("Module", bound=nn.Module)

_TWINS: dict[type[nn.Module], type[nn.Module]] = {}


def twin_of(layer: type[nn.Module]) -> Callable[[type[Module]], type[Module]]:
    """Class decorator: the fused class that `convert` swaps `layer` for.

    The class must be a subclass of `layer` that keeps its state as it is, with a class attribute
    `backend`: a swap changes a module's class and nothing else, so its parameters, buffers, hooks
    and flags stay the very objects they were.
    """

    def register(fused: type[Module]) -> type[Module]:
        if not issubclass(fused, layer):
            raise TypeError(f"twin_of: {fused.__name__} must be a subclass of {layer.__name__}")
        _TWINS[layer] = fused
        return fused

    return register


@dataclass
class Conversion:
    """What `convert` or `revert` did; prints as a list of layers."""

    swapped: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, new class
    left: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, reason

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left as they were"]
        lines += [f"  {name or '(model)'}: {old} -> {new}" for name, old, new in self.swapped]
        lines += [f"  {name or '(model)'}: {old} left: {why}" for name, old, why in self.left]
        return "\n".join(lines)


def _qualified(cls: type) -> str:
    module = cls.__module__
    if module.startswith("torch.nn."):
        module = "torch.nn"
    elif module.startswith("reg_kernels.nn."):
        module = "reg_kernels.nn"
    return f"{module}.{cls.__name__}"


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # A list first: a class is changed while walking. A shared module comes once, by its first name.
    return list(model.named_modules())


def convert(
    model: nn.Module,
    *,
    inplace: bool = False,
    backend: str | None = None,
    report: Callable[[Conversion], object] | None = None,
) -> nn.Module:
    """Swaps every layer of `model` that has a fused twin for it.

    A layer keeps its parameters, buffers, hooks, training flag and `state_dict` keys, and stays the
    same object (in the copy, if one is made): only its class changes. Subclasses of torch's layers
    are left alone, since their `forward` may be their own.

    Args:
        model: any module, itself a layer or made of them.
        inplace: change `model` itself; by default a deep copy is changed.
        backend: the implementation that the swapped layers force: "native", "triton", "reference"
            or None, the automatic choice at each call.
        report: called with a `Conversion`: what was swapped, what was left and why. `report=print`
            shows it.

    Returns:
        `model`, or its converted copy. `revert` undoes it.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: an unknown `backend`.

    Example:
        model = reg_kernels.convert(model, report=print)
    """
    _check_model("convert", model)
    if backend is not None:
        backends.check_name(backend, "backend")
    model = model if inplace else copy.deepcopy(model)
    conversion = Conversion()
    for name, module in _named_modules(model):
        cls = type(module)
        twin = _TWINS.get(cls)
        if twin is not None:
            module.__class__ = twin
            if backend is not None:
                module.backend = backend
            conversion.swapped.append((name, _qualified(cls), _qualified(twin)))
        elif (reason := _why_left(cls)) is not None:
            conversion.left.append((name, _qualified(cls), reason))
    if report is not None:
        report(conversion)
    return model


def _why_left(cls: type[nn.Module]) -> str | None:
    """The reason to report for a layer that stays; None where nobody expects a change."""
    for layer, twin in _TWINS.items():
        if issubclass(cls, twin):
            return "fused already"
        if issubclass(cls, layer):
            return f"a subclass of {_qualified(layer)}, whose forward may be its own"
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
    """Undoes `convert`: every fused layer becomes torch's again.

    Args, result and errors are those of `convert`. A forced `backend` is forgotten.
    """
    _check_model("revert", model)
    model = model if inplace else copy.deepcopy(model)
    originals = {twin: layer for layer, twin in _TWINS.items()}
    conversion = Conversion()
    for name, module in _named_modules(model):
        cls = type(module)
        if cls in originals:
            module.__class__ = originals[cls]
            module.__dict__.pop("backend", None)
            conversion.swapped.append((name, _qualified(cls), _qualified(originals[cls])))
    if report is not None:
        report(conversion)
    return model


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
