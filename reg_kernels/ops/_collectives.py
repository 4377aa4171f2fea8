"""What the ranks of a process group exchange inside of an op, and what is asked of a group.

By the operations of torch.distributed._functional_collectives: they return fresh tensors and take
the group by its name, so that torch.compile and CUDA graphs record them. Their own gradients are
not used: an op that calls them writes its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .._rank_error import RankError, named
from ._checks import refuse


class Group(NamedTuple):
    """A process group, as far as an op has to know it."""

    name: str
    size: int


def group_of(op: str, process_group: Any, device: torch.device) -> Group:
    """The group of a call whose tensors are on `device`; raises where it cannot be one."""
    if isinstance(process_group, Group):  # a layer has asked already
        return process_group
    if process_group is distributed.GroupMember.NON_GROUP_MEMBER:
        must = "a process group that this process is in"
        refuse(op, "process_group", must, "one that it is not in", ValueError)
    if not isinstance(process_group, distributed.ProcessGroup):
        got = type(process_group).__name__
        refuse(op, "process_group", "a torch.distributed.ProcessGroup or None", got, TypeError)
    group = Group(str(process_group.group_name), process_group.size())
    if group.size > 1 and not torch.compiler.is_compiling():
        _check_backend(op, process_group, device)
    return group


def default_group(op: str) -> Any:
    """The group of all ranks; raises where there is none."""
    if not distributed.is_available():
        raise RuntimeError(
            f"{op}: this build of torch has no torch.distributed: install one that has, or use "
            "BatchNorm"
        )
    if not distributed.is_initialized():
        raise RuntimeError(
            f"{op}: there is no process group: call torch.distributed.init_process_group before "
            "training, or use BatchNorm"
        )
    return distributed.group.WORLD


def _check_backend(op: str, process_group: Any, device: torch.device) -> None:
    config = distributed.distributed_c10d.get_backend_config(process_group)
    backends = dict(part.split(":", 1) for part in config.split(","))
    if device.type not in backends:
        raise RuntimeError(
            f"{op}: input must be on a device that process_group has a backend for "
            f"({', '.join(backends)}), got one on {device}: move it, or make the group with a "
            f'backend for it, as init_process_group("cpu:gloo,cuda:nccl")'
        )


def gathered(x: Tensor, group: Group) -> Tensor:
    """x of all ranks in their order, [ranks, *x.shape]."""
    by = torch.ops._c10d_functional
    both = by.wait_tensor(by.all_gather_into_tensor(x, group.size, group.name))
    return both.view(group.size, *x.shape)


def summed(x: Tensor, group: str) -> Tensor:
    """The sum of x over all ranks of the group of that name."""
    by = torch.ops._c10d_functional
    return by.wait_tensor(by.all_reduce(x, "sum", group))


def check_alike(op: str, what: str, value: int, process_group: Any, device: torch.device) -> None:
    """Raises on all ranks where one has another number: one small exchange, waited for."""
    own = torch.tensor([value], device=device)
    of_ranks = [torch.empty_like(own) for _ in range(process_group.size())]
    distributed.all_gather(of_ranks, own, group=process_group)
    where: dict[int, list[int]] = {}
    ranks = distributed.get_process_group_ranks(process_group)
    for rank, number in zip(ranks, torch.cat(of_ranks).tolist(), strict=True):
        where.setdefault(number, []).append(rank)
    if len(where) > 1:
        got = ", ".join(f"{number} on {named(on)}" for number, on in where.items())
        most = max(where.values(), key=len)
        raise RankError(
            f"{op}: {what} must be the same on all ranks, got {got}", set(ranks).difference(most)
        )
