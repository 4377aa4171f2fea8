"""Swapping the layers of a model for their fused twins, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backends

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

    fused: list[tuple[str, str, str]] = field(default_factory=list)  # BatchNorm, chain, new class
    apart: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, why not fused
    swapped: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, new class
    left: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, reason

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left as they were"]
        if self.fused or self.apart:
            lines[0] = f"{len(self.fused)} chains fused, {lines[0]}"
        lines += [f"  {name or '(model)'}: {chain} -> {new}" for name, chain, new in self.fused]
        lines += [f"  {name or '(model)'}: {cls}: {why}" for name, cls, why in self.apart]
        lines += [f"  {name or '(model)'}: {old} -> {new}" for name, old, new in self.swapped]
        lines += [f"  {name or '(model)'}: {old} left: {why}" for name, old, why in self.left]
        return "\n".join(lines)


class Fused:
    """What `convert(fuse=True)` made of a module by giving its object another class."""

    def take_apart(self) -> None:
        """Gives the object the class of torch's, or of the user's, that it had."""
        raise NotImplementedError


def qualified(cls: type) -> str:
    module = cls.__module__
    if module.startswith("torch.nn."):
        module = "torch.nn"
    for package in ("reg_kernels.nn", "reg_kernels.convert"):
        if module.startswith(f"{package}."):
            module = package
    return f"{module}.{cls.__name__}"


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # A list first: a class is changed while walking. A shared module comes once, by its first name.
    return list(model.named_modules())


def convert(
    model: nn.Module,
    *,
    fuse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
    report: Callable[[Conversion], object] | None = None,
) -> nn.Module:
    """Swaps every layer of `model` that has a fused twin for it.

    A layer keeps its parameters, buffers, hooks, training flag and `state_dict` keys, and stays the
    same object (in the copy, if one is made): only its class changes. Subclasses of torch's layers
    are left alone, since their `forward` may be their own.

    With `fuse`, chains BatchNorm → (+ residual) → ReLU, LeakyReLU, SiLU or exact GELU → Dropout
    become one layer first, a `BatchNormAct` under the BatchNorm's name, wherever `torch.fx` finds
    them in the forward of one module and nothing else uses what lies between; any of the three may
    be missing. A module whose forward cannot be traced safely has its layers swapped one by one,
    while the modules inside it are still looked at. Calls, state and gradients stay what they were,
    to rounding; what can differ:

    - A fused BatchNorm that is called by itself, or seen by a hook that is added later, gives the
      chain's result; layers that it absorbed pass their input on. Layers with hooks are not fused.
    - A block with a residual or with functions in its chain is an instance of a subclass of its
      class, of the same name. If a plain attribute that its forward read changes, or an argument
      comes that was left out, it warns and runs its layers one by one from then on.
    - A layer that is put in the place of one of a chain's does not give the others their work back,
      and neither does SyncBatchNorm.convert_sync_batchnorm: revert first.

    An absorbed dropout's own `p` and `training` go on to rule, and so do the BatchNorm's.

    Args:
        model: any module, itself a layer or made of them.
        fuse: put chains behind BatchNorm together.
        inplace: change `model` itself; by default a deep copy is changed.
        backend: the implementation that the swapped layers force: "native", "triton", "reference"
            or None, the automatic choice at each call.
        report: called with a `Conversion`: what was fused and swapped, what was left and why.
            `report=print` shows it.

    Returns:
        `model`, or its converted copy. `revert` undoes it.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: an unknown `backend`.

    Example:
        model = reg_kernels.convert(model, fuse=True, report=print)
    """
    check_model("convert", model)
    if backend is not None:
        backends.check_name(backend, "backend")
    model = model if inplace else copy.deepcopy(model)
    conversion = Conversion()
    if fuse:
        # Here, because the layers that it makes are made of those that register themselves above.
        from . import _fuse

        _fuse.fuse(model, backend, conversion)
    fused_now = {name for name, _, _ in conversion.fused}
    for name, module in _named_modules(model):
        cls = type(module)
        if name in fused_now or (issubclass(cls, Fused) and not issubclass(cls, _BatchNorm)):
            continue
        if swap_for_twin(module):
            if backend is not None:
                module.backend = backend
            conversion.swapped.append((name, qualified(cls), qualified(type(module))))
        elif (reason := _why_left(cls)) is not None:
            conversion.left.append((name, qualified(cls), reason))
    if report is not None:
        report(conversion)
    return model


def swap_for_twin(module: nn.Module) -> bool:
    """Gives a layer the class that is registered for its own; False where there is none."""
    twin = _TWINS.get(type(module))
    if twin is not None:
        module.__class__ = twin
    return twin is not None


def _why_left(cls: type[nn.Module]) -> str | None:
    """The reason to report for a layer that stays; None where nobody expects a change."""
    if issubclass(cls, Fused) or cls.__module__.startswith("reg_kernels.nn."):
        return "fused already"
    for layer, twin in _TWINS.items():
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

    Args, result and errors are those of `convert`. A forced `backend` is forgotten.
    """
    check_model("revert", model)
    model = model if inplace else copy.deepcopy(model)
    originals = {twin: layer for layer, twin in _TWINS.items()}
    conversion = Conversion()
    for name, module in _named_modules(model):
        cls = type(module)
        if isinstance(module, Fused):
            module.take_apart()
        elif cls in originals:
            module.__class__ = originals[cls]
        else:
            continue
        module.__dict__.pop("backend", None)
        if qualified(type(module)) != qualified(cls):  # not a block, which kept its name
            conversion.swapped.append((name, qualified(cls), qualified(type(module))))
    if report is not None:
        report(conversion)
    return model


def check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
