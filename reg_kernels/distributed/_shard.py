"""Draws that are those of one process with the batch of all ranks."""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import get_worker_info

from .. import _part
from .._compiler import not_compiled
from .._numbers import integer, refuse
from .._part import Part
from .._rank_error import RankError, named
from ..augment import Mixup, Pipeline
from ._faults import unusual
from ._ranks import check_group

_Subject = TypeVar("_Subject", bound=nn.Module | Pipeline | Mixup)


class _OfRank:
    """What tells a rank's part where the ranks' batches are all as large."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def part(self, samples: int) -> Part:
        return Part(self._rank * samples, self._world_size * samples, samples)

    def __repr__(self) -> str:
        return f"rank {self._rank} of {self._world_size}"


class _OfGroup:
    """What asks the ranks of a group how large their batches are."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group  # None: the default one, whichever that is at a call
        self._process = os.getpid()

    def part(self, samples: int) -> Part:
        sizes = self.gathered([samples])
        before = sizes[: dist.get_rank(self.group)]
        return Part(sum(x for (x,) in before), sum(x for (x,) in sizes), samples)

    def gathered(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's numbers, on the host where the group can: else the device is waited for."""
        _check_group("shard", self.group)
        world_size = dist.get_world_size(self.group)
        if world_size == 1:
            return [numbers]
        # A fork has the group, and its collectives would wait without end.
        if os.getpid() != self._process or get_worker_info() is not None:
            must = (
                "called in the process that joined the process group (or sharded by rank and "
                "world_size, which ask nobody)"
            )
            refuse(
                "shard", "what is sharded", must, "called in a fork, as DataLoader's workers are"
            )
        backends = dist.get_backend_config(self.group)
        on_host = "cpu:" in backends or backends == "gloo"
        device = "cpu" if on_host else torch.accelerator.current_accelerator()
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        every = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(every, mine, group=self.group)
        return torch.stack(every).tolist()

    def __deepcopy__(self, memo: Any) -> _OfGroup:
        return self

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError(
                "shard: process_group must be the default one where what is sharded is pickled, "
                "got another one: call distributed.unshard before"
            )
        return _OfGroup, (None,)

    def __repr__(self) -> str:
        return "the default process group" if self.group is None else "a process group"


def shard(
    model_or_pipeline: _Subject,
    rank: int | None = None,
    world_size: int | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> _Subject:
    """Has a model, a `Pipeline` or a `Mixup` draw what one process with the batch of all ranks
    would draw, and of that this rank's part.

    The batch of all ranks is their batches one behind the other, in the order of ranks. So 1, 2 or
    4 ranks have the same masks, noise, dropped paths, lambdas and augmentations for the same
    samples, and train to the same losses up to the order of sums. All ranks have to be seeded
    alike, `torch.manual_seed(seed)`, and to draw alike between steps.

    Args:
        model_or_pipeline: an `nn.Module` whose first tensor argument is a batch (N, ...), an
            `augment.Pipeline` or an `augment.Mixup`. A module may be wrapped before or afterwards,
            by DistributedDataParallel, `fully_shard` or `torch.compile`.
        rank: this process' number, from 0. With `world_size`, nothing is communicated, and all
            ranks have to have batches of one size at each step.
        world_size: the number of ranks.
        process_group: the group that both are taken from where they are not given; None is the
            default group. The sizes of the ranks' batches, which may differ and be 0, are gathered
            at each forward in training: an int64 a rank, by the host where the group has a backend
            for the CPU, as gloo or `cpu:gloo,cuda:nccl`. With NCCL alone the host waits for the
            GPU; `distributed.batch` says the sizes without a word between ranks.

    Returns:
        `model_or_pipeline`, which is changed: `unshard` undoes it.

    Raises:
        ValueError: `rank` is not in [0, world_size), `world_size` is below 1, only one of them is
            given, or `process_group` as well.
        TypeError: it is no module, pipeline or Mixup, or `process_group` is none.
        RuntimeError: neither rank nor an initialised process group is there. At a call: this is a
            process that was forked from the one that is in the group.
        RankError: with a group, the ranks' generators differ. The error names the ranks.

    Of a module, forwards while it is in training mode draw so; evaluation draws nothing, and
    communicates nothing. It is for draws of this package. Layers of torch that drop by themselves
    have the same mask on all ranks then, of which a warning tells: `convert` the model before.

    An op's input has as many places in its first dimension for each sample, as (N, C) has, and
    (N T, C). Another one raises; but one that begins with another dimension whose length is a
    multiple of N by chance draws as if that were the samples'. Call it inside of
    `distributed.whole`, which draws the same on all ranks. Noise on weights is so by itself.

    Three things are not as in one process that knows of no ranks. Where samples do not lie one
    behind the other in memory, as in `x.t()`, a contiguous tensor's draws are taken. Inside of
    torch.func.vmap, where the samples' dimension is out of sight, use `distributed.whole`. And a
    checkpointed part of a model draws again what it drew, but not what torch.compile made of such a
    part alone: compile around the checkpoint.

    torch.compile compiles a model anew for another part, and breaks its graph at a sharded module
    inside of the one that is compiled. torch.nn.DataParallel, whose replicas run in threads of
    their own, draws as without `shard`.

    The partners of a `Mixup` are within a rank. A `Pipeline` counts indices through the batches of
    all ranks; those that a call is given are the samples' own and stay. An attack of
    `reg_kernels.adversarial` on a sharded model in training mode starts likewise.
    """
    if not isinstance(model_or_pipeline, nn.Module | Pipeline | Mixup):
        must = "an nn.Module, an augment.Pipeline or an augment.Mixup"
        got = type(model_or_pipeline).__name__
        refuse("shard", "model_or_pipeline", must, got, TypeError)
    if rank is None and world_size is None:
        sharding: Any = _OfGroup(process_group)
        _check_group("shard", process_group)
        _check_alike(sharding, model_or_pipeline)
    else:
        if process_group is not None:
            must = "left out where rank and world_size are given"
            refuse("shard", "process_group", must, "one", ValueError)
        sharding = _OfRank(*_checked_rank("shard", rank, world_size))
    if isinstance(model_or_pipeline, nn.Module):
        unshard(model_or_pipeline)
        _warn_of_others(model_or_pipeline)
        model_or_pipeline.register_forward_pre_hook(_enter, with_kwargs=True)
        model_or_pipeline.register_forward_hook(_leave, always_call=True)
    model_or_pipeline._sharding = sharding
    return model_or_pipeline


def unshard(model_or_pipeline: _Subject) -> _Subject:
    """Undoes `shard`: a model, a `Pipeline` or a `Mixup` draws by itself again.

    Args:
        model_or_pipeline: what `shard` was given; of another one nothing is changed.

    Returns:
        `model_or_pipeline`.
    """
    if not isinstance(model_or_pipeline, nn.Module):
        model_or_pipeline._sharding = None
        return model_or_pipeline
    module = model_or_pipeline
    for hooks, function in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
        for number in [number for number, hook in hooks.items() if hook is function]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
            module._forward_hooks_always_called.pop(number, None)
    if hasattr(module, "_sharding"):
        del module._sharding
    return model_or_pipeline


def batch(first: int, total: int, samples: int | None = None) -> AbstractContextManager[Part]:
    """Inside of it, what is drawn is a part of what the batch of all ranks draws: `with
    distributed.batch(first, total): loss = criterion(model(x), y)`.

    Nothing is communicated, and sharded models inside ask no other rank. It is for models, ops,
    pipelines and attacks, sharded or not.

    Args:
        first: the number of samples of the ranks before this one.
        total: the number of samples of all ranks.
        samples: that of this rank's. None takes the length of a sharded model's batch, and of any
            other tensor that of its first dimension.

    Raises:
        ValueError: a number is negative, or the samples are not within the total.
        TypeError: a number is no integer.
    """
    first, total = integer("batch", "first", first), integer("batch", "total", total)
    for name, value in (("first", first), ("total", total)):
        if value < 0:
            refuse("batch", name, "at least 0", value, ValueError)
    if first > total:
        refuse("batch", "first", f"at most total, {total}", first, ValueError)
    if samples is not None:
        samples = integer("batch", "samples", samples)
        if not 0 <= samples <= total - first:
            must = f"from 0 to {total - first}, what first leaves of total"
            refuse("batch", "samples", must, samples, ValueError)
    return _part.Stated(Part(first, total, samples))


def whole() -> AbstractContextManager[Part]:
    """Inside of it, what is drawn is the same on all ranks: for a tensor of a sharded model whose
    first dimension is not the batch's, and for one that is alike on all ranks."""
    outside = _part.current() or Part(0, 0, None)
    return _part.Stated(outside._replace(alike=True))


def part(total: int, rank: int | None = None, world_size: int | None = None) -> slice:
    """The samples of a rank in a batch of so many, as `torch.tensor_split` cuts it: sizes differ by
    one at most, and the first ranks have the larger ones.

    Args:
        total: the number of samples, at least 0.
        rank, world_size: as in `shard`; by default those of the default process group.

    Returns:
        A slice with a start and a stop: `x[part(len(x), rank, world_size)]`.

    Raises:
        ValueError: `total` is negative, `rank` is not in [0, world_size), or one of the two is
            given without the other.
        TypeError: a number is no integer.
        RuntimeError: neither is given, and there is no process group.
    """
    total = integer("part", "total", total)
    if total < 0:
        refuse("part", "total", "at least 0", total, ValueError)
    if rank is None and world_size is None:
        _check_group("part", None)
        rank, world_size = dist.get_rank(), dist.get_world_size()
    rank, world_size = _checked_rank("part", rank, world_size)
    each, more = divmod(total, world_size)
    begin = rank * each + min(rank, more)
    return slice(begin, begin + each + (rank < more))


def _checked_rank(op: str, rank: Any, world_size: Any) -> tuple[int, int]:
    if rank is None or world_size is None:
        missing = "rank" if rank is None else "world_size"
        refuse(op, missing, "given where the other one is", None, ValueError)
    rank, world_size = integer(op, "rank", rank), integer(op, "world_size", world_size)
    if world_size < 1:
        refuse(op, "world_size", "at least 1", world_size, ValueError)
    if not 0 <= rank < world_size:
        refuse(op, "rank", f"from 0 to {world_size - 1}, below world_size", rank, ValueError)
    return rank, world_size


def _check_group(op: str, group: dist.ProcessGroup | None) -> None:
    """Raises unless there is a group, and this process is in it."""
    if not (dist.is_available() and dist.is_initialized()):
        must = "given with world_size, or torch.distributed.init_process_group called before"
        refuse(op, "rank", must, "no process group")
    check_group(op, group)


def _check_alike(sharding: _OfGroup, subject: nn.Module | Pipeline | Mixup) -> None:
    """Raises unless all ranks draw from the same state, which cannot be seen later."""
    if isinstance(subject, Pipeline):
        what, values = "pipelines", repr(sorted(subject.state_dict().items())).encode()
        remedy = "give each the same seed=, epoch and position"
    elif isinstance(subject, Mixup) and subject.seed is not None:
        what, values = "Mixups", repr(subject.seed).encode()
        remedy = "give each the same seed="
    else:
        what, values = "generators", _generators()
        remedy = "call torch.manual_seed with one seed on all ranks"
    digest = int.from_bytes(hashlib.blake2b(values, digest_size=8).digest(), signed=True)
    every = [str(value) for (value,) in sharding.gathered([digest])]
    ranks = dist.get_process_group_ranks(sharding.group)
    if odd := unusual(every):
        others = [ranks[place] for place in odd]
        usual = next(rank for rank in ranks if rank not in others)
        raise RankError(
            f"shard: the ranks' {what} must be in one state, got another one on {named(others)} "
            f"than on rank {usual}: {remedy}",
            others,
        )


def _generators() -> bytes:
    """The state of torch's generators that this process draws from."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return b"".join(bytes(state.tolist()) for state in states)


# The hooks of a sharded module are functions, which are copied and pickled by their names.


@not_compiled
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    sharding = getattr(module, "_sharding", None)
    if sharding is None or not module.training:
        return
    inside = _part.current()
    # Else a module around this one, which may be itself, has asked, or the caller said it.
    if inside is None or (inside.samples is None and not inside.alike):
        samples = _samples(args, kwargs)
        inside = sharding.part(samples) if inside is None else inside._replace(samples=samples)
    _part.enter(module, inside)


@not_compiled
def _leave(module: nn.Module, args: Any, output: Any) -> None:
    _part.leave(module)


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The length of the first tensor that has one."""
    for x in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.dim():
            return len(x)
    raise RuntimeError(
        "shard: the model's arguments must have a tensor (N, ...), the batch, got none: call it "
        "`with distributed.batch(first, total, samples):`"
    )


def _draws_by_itself(layer: nn.Module) -> bool:
    """Whether a layer of torch has draws that know no ranks."""
    if not type(layer).__module__.startswith("torch.nn.modules."):
        return False
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, nn.RReLU)


def _warn_of_others(module: nn.Module) -> None:
    names = [name or "itself" for name, x in module.named_modules() if _draws_by_itself(x)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"shard: layers of torch draw the same on all ranks, got {', '.join(names[:3])}{more}: "
            "call reg_kernels.convert(model) before, or use layers of reg_kernels.nn",
            stacklevel=3,
        )
