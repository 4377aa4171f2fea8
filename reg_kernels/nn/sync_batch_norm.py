"""BatchNorm over the batches of all ranks of a process group, and the chain behind it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.overrides import has_torch_function_unary

from .._compiler import constant
from .._twins import twin_of
from ..ops._checks import refuse
from ..ops._collectives import Group, check_alike, default_group, group_of
from ..ops.batch_norm import SLOPE
from ._leaf import are_overridden
from .batch_norm import (
    ARGUMENTS,
    ARGUMENTS_ACT,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    _FusedBatchNorm,
    _FusedBatchNormAct,
)

__all__ = ["SyncBatchNorm", "SyncBatchNormAct"]

_Module = TypeVar("_Module", bound=nn.Module)


class _Agreed:
    """What ranks of a group have found to be alike, so that they need not ask again.

    A rank that asks must not be alone with it. Without torch.compile all ranks come to a layer's
    first call at once. A program that was compiled for one layer may run for another one of as many
    channels, on one rank and not on all: with it, as many channels are asked for once.
    """

    def __init__(self) -> None:
        self.layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.channels: set[int] = set()
        self.compiles = False

    def needs(self, layer: nn.Module, channels: int, compiling: bool) -> bool:
        """Whether a call is the first one of its kind."""
        self.compiles = self.compiles or compiling
        known = channels in self.channels if self.compiles else layer in self.layers
        self.channels.add(channels)
        self.layers.add(layer)
        return not known


# By the group. Not in the layers, which are copied and pickled, as no process group can be.
_agreed: weakref.WeakKeyDictionary[Any, _Agreed] = weakref.WeakKeyDictionary()


class _Synchronised(_FusedBatchNorm):
    """What the layers share: a process group, asked for at each training call."""

    process_group: Any = None
    _group_name: str | None = None  # of process_group, where there is one

    def _check_input_dim(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            return
        if has_torch_function_unary(input) and are_overridden(input):
            return
        if input.dim() < 2:
            raise ValueError(
                f"{type(self).__name__}: input must have at least 2 dimensions, (N, C, ...), "
                f"got {input.dim()}D"
            )

    def across(self, input: Tensor) -> Group | None:
        """The group that a call's statistics are of, or None where they are its own batch's."""
        if not self.training:
            return None
        compiling = torch.compiler.is_compiling()
        if compiling and distributed.is_available() and distributed.group.WORLD is None:
            compiling = True  # for the guard: another default group is another program
        # Of a compiled program a size may be no constant.
        channels = self.num_features if compiling else input.shape[1]
        return self._ask(str(input.device), channels, compiling, self._group_name)

    # Dynamo calls it as it makes a program, instead of reading it, and takes the answer for a
    # constant, with guards on what it was asked.
    @constant
    def _ask(self, device: str, channels: int, compiling: bool, known: str | None) -> Group | None:
        """The group of a call. At the first one its ranks tell each other their channels, so that
        none is left alone with an error."""
        name, where = type(self).__name__, torch.device(device)
        process_group = self.process_group
        if process_group is None:
            process_group = default_group(name)
        group = group_of(name, process_group, where)
        if self.process_group is not None and known != group.name:
            self._group_name = group.name
        if group.size == 1:
            return None
        agreed = _agreed.get(process_group)
        if agreed is None:
            agreed = _agreed.setdefault(process_group, _Agreed())
        if agreed.needs(self, channels, compiling):
            check_alike(name, "the input's channels", channels, process_group, where)
        if channels != self.num_features:  # gloo ends the process of a rank that gets other sizes
            refuse(name, "input", f"of {self.num_features} channels", channels, ValueError)
        return group

    def _set_group(self, process_group: Any) -> None:
        self.process_group = process_group
        self.__dict__.pop("_group_name", None)
        if distributed.is_available() and isinstance(process_group, distributed.ProcessGroup):
            self._group_name = str(process_group.group_name)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.process_group is None:
            return text
        return f"{text}, process_group of {distributed.get_world_size(self.process_group)} ranks"


SYNC_ARGUMENTS = ARGUMENTS.replace(
    "        device: the device of the parameters.\n",
    "        process_group: the ranks whose batches are normalised together; None takes all\n"
    "            ranks that there are at a call.\n"
    "        device: the device of the parameters.\n",
)
SYNC_ARGUMENTS_ACT = ARGUMENTS_ACT.replace(ARGUMENTS, SYNC_ARGUMENTS)

_RAISES = """
    Raises:
        RuntimeError: there is no process group in training; the group has no backend for the
            input's device; or, as a `distributed.RankError` on all ranks, these have other numbers
            of channels.
        ValueError: this process is not in the group; the input has fewer than 2 dimensions; and
            what `reg_kernels.functional.batch_norm` raises it for.

    Its gradient has no gradient of its own; torch.func and torch.jit.trace refuse it in training.
    """


@twin_of(nn.SyncBatchNorm, base=nn.modules.batchnorm._BatchNorm)
class SyncBatchNorm(_Synchronised):
    """Normalises (N, C, ...) over the batches of all ranks, as `torch.nn.SyncBatchNorm` does.

    In training each rank sends 32 bytes a channel to all others, once, and gets theirs: the count,
    mean and sum of squared deviations of its batch in float64, and what the mean has lost by being
    rounded to that. It merges them in the order of ranks, so all ranks have the same statistics to
    the last bit. The backward sums two numbers a channel over all ranks, once. Nothing is read back
    to the host. Batches may differ in size, and be empty: a rank weighs by how many values it has.
    The gradients of weight and bias are those of the rank's own batch: DistributedDataParallel
    averages them. A single value in all leaves the running statistics as they are.

    In evaluation, and in a group of one rank, it is a BatchNorm and exchanges nothing. The first
    training call with a group compares the channels of its ranks, once.

    It runs wherever the group has a backend for the input's device: by gloo on the CPU as well. It
    is no subclass of `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on the CPU.
    """

    __doc__ = f"{str(__doc__).rstrip()}{SYNC_ARGUMENTS}{_RAISES}"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            backend=backend,
        )
        self._set_group(process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module: _Module, process_group: Any = None) -> _Module:
        """Makes every BatchNorm of a model one over all ranks, in the model itself.

        BatchNorm1d, 2d and 3d, torch's and ours, and torch's SyncBatchNorm become a
        `SyncBatchNorm`, BatchNormAct1d, 2d and 3d a `SyncBatchNormAct`. As in
        `reg_kernels.convert`, a layer stays the same object and only its class changes: parameters,
        buffers, hooks, flags and the forced implementation are what they were. What
        `convert(fuse=True)` has fused stays fused, and may as well be fused afterwards.

        Args:
            module: a module, itself a layer or made of layers.
            process_group: the ranks whose batches are normalised together; None takes all ranks.

        Returns:
            `module`.

        Raises:
            TypeError: `module` is no nn.Module, or has a subclass of these layers, whose forward
                may be its own. Nothing is changed then.
        """
        if not isinstance(module, nn.Module):
            got = type(module).__name__
            refuse("convert_sync_batchnorm", "module", "an nn.Module", got, TypeError)
        layers = list(_layers_to_convert(module))
        for layer, target in layers:
            object.__setattr__(layer, "__class__", target)
            layer._set_group(process_group)
        return module


class SyncBatchNormAct(_Synchronised, _FusedBatchNormAct):
    """SyncBatchNorm → (+ residual) → activation → dropout of (N, C, ...), in one pass behind the
    statistics of all ranks."""

    __doc__ = (
        f"{__doc__}{SYNC_ARGUMENTS_ACT}{_RAISES}\n"
        "    Source: as for `reg_kernels.functional.batch_norm_act`.\n    "
    )

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = "relu",
        drop: float = 0.0,
        negative_slope: float = SLOPE,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            activation=activation,
            drop=drop,
            negative_slope=negative_slope,
            backend=backend,
        )
        self._set_group(process_group)


_TARGETS: dict[type[nn.Module], type[nn.Module]] = {
    **dict.fromkeys(
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
            *(BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm),
        ),
        SyncBatchNorm,
    ),
    **dict.fromkeys(
        (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, SyncBatchNormAct), SyncBatchNormAct
    ),
}


def _layers_to_convert(module: nn.Module) -> Iterator[tuple[Any, type[nn.Module]]]:
    """Each BatchNorm of a model, and the class that it gets."""
    for name, layer in module.named_modules():
        if (target := _TARGETS.get(type(layer))) is not None:
            yield layer, target
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise TypeError(
                f"convert_sync_batchnorm: {name or 'module'} must be a BatchNorm of torch or of "
                f"reg_kernels, got {type(layer).__name__}, whose forward may be its own: replace it"
            )
