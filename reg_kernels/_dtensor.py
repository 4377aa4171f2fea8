"""DTensors as the kernels and the optimizers take them: by their local shards.

A step on a shard needs nothing of the other ranks, but for two things: the gradients' norm, which
is of all shards, and the draws of stochastic rounding, which are those that the whole tensor's
elements have. torch.distributed.tensor is imported only where there is a DTensor already.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ._layout import is_dense


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_of(x: Any) -> Tensor:
    """The shard of a DTensor that this rank holds, itself and without a gradient of its own; of
    another tensor the tensor."""
    if not is_dtensor(x):
        return x
    if type(x._local_tensor) is Tensor:  # in a third of the time
        return x._local_tensor
    with torch.no_grad():  # waits for a collective that is to make it
        return x.to_local()


def wrapped(local: Tensor, like: Any) -> Any:
    """A DTensor of `like`'s shape and placements, with `local` as this rank's shard."""
    from torch.distributed.tensor import DTensor

    # The shape is told, since a shard does not say it where shards are uneven.
    return DTensor.from_local(
        *(local, like.device_mesh, like.placements),
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def is_placed_like(x: Any, like: Any) -> bool:
    """Whether both are plain tensors, or DTensors of one mesh and the same placements."""
    if not is_dtensor(like) or not is_dtensor(x):
        return is_dtensor(like) == is_dtensor(x)
    same = x.placements == like.placements
    return same and (x.device_mesh is like.device_mesh or x.device_mesh == like.device_mesh)


def described(x: Any) -> str:
    """The kind of tensor, for messages."""
    if not is_dtensor(x):
        return "a plain tensor"
    return f"placements {tuple(x.placements)} on ranks {x.device_mesh.mesh.tolist()}"


def placed_like(x: Any, like: Any, what: str) -> Any:
    """x, whole or in shards, as `like` is; every rank of the mesh has to call it.

    Raises:
        ValueError: both are DTensors, and of different meshes.
    """
    if is_placed_like(x, like):
        return x
    if not is_dtensor(like):
        return x.full_tensor()
    if not is_dtensor(x):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole of it, so none has to send anything.
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    if x.device_mesh != like.device_mesh:
        raise ValueError(
            f"{what} must lie on its parameter's mesh of ranks {like.device_mesh.mesh.tolist()}, "
            f"got {described(x)}: save and load it by torch.distributed.checkpoint"
        )
    return x.redistribute(placements=like.placements)


def check_sharded(name: str, where: str, x: Any) -> None:
    """Raises RuntimeError unless the shards of a DTensor can be taken one by one."""
    if any(p.is_partial() for p in x.placements):
        raise RuntimeError(
            f"{name}: a DTensor must be placed as Shard or Replicate, got {tuple(x.placements)} "
            f"for {where}: call redistribute() on it first, which adds the parts up"
        )
    if x.device_mesh.get_coordinate() is None:
        raise RuntimeError(
            f"{name}: a DTensor's mesh must have this rank, {dist.get_rank()}, in it, got ranks "
            f"{x.device_mesh.mesh.tolist()} for {where}: leave it out on the other ranks"
        )


def check_gradient_placement(name: str, where: str, param: Any, grad: Any) -> None:
    """Raises RuntimeError unless a gradient is in the same shards as its parameter."""
    if is_placed_like(grad, param):
        return
    must = f"placed as its parameter is, {described(param)}"
    remedy = "p.grad = p.grad.redistribute(placements=p.placements)"
    if not (is_dtensor(grad) and is_dtensor(param)):
        remedy = "make a DTensor of both or of neither"
    elif grad.device_mesh != param.device_mesh:
        remedy = "distribute both over one mesh"
    raise RuntimeError(
        f"{name}: a gradient must be {must}, got {described(grad)} for {where}: {remedy}"
    )


def check_state_placement(name: str, where: str, param: Any, state: dict[str, Any]) -> None:
    """Raises RuntimeError unless what a DTensor's state has of its shape is in the same shards."""
    for key, value in state.items():
        if key != "step" and isinstance(value, Tensor) and not is_placed_like(value, param):
            raise RuntimeError(
                f"{name}: {key} must be placed as its parameter is, {described(param)}, got "
                f"{described(value)} for {where}: load_state_dict() places it"
            )


# Draws


class Places(NamedTuple):
    """Where the elements of a shard are among those of the whole tensor: element e is number
    first + e, or first + e // run * stride + e % run where run is above 0."""

    first: int
    run: int = 0
    stride: int = 0


def _order(x: Any) -> list[int]:
    """The dimensions as they lie in memory, the outermost first."""
    return sorted(range(x.dim()), key=lambda d: (x.stride(d), x.size(d)), reverse=True)


def in_order_of(local: Tensor, whole: Any) -> Tensor:
    """`local` with its dimensions in the order in memory of the DTensor that it is a shard of."""
    order = _order(whole)
    stored = local.permute(order)
    if is_dense(local) and stored.is_contiguous():
        return local
    return stored.contiguous().permute([order.index(d) for d in range(len(order))])


def places_of(name: str, where: str, x: Any, offset: int) -> Places:
    """Where this rank's shard is in a DTensor whose own first element is number `offset`, in the
    order in memory.

    Raises:
        RuntimeError: the shard's rows are not evenly apart.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    order = _order(x)
    shape, begins = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    whole = [x.size(d) for d in order]
    sizes, begin = [shape[d] for d in order], [begins[d] for d in order]
    if math.prod(sizes) == 0:
        return Places(offset)
    weights = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
    first = offset + sum(b * w for b, w in zip(begin, weights, strict=True))
    cut = [i for i, (part, all_) in enumerate(zip(sizes, whole, strict=True)) if part < all_]
    for d in range(x.dim()):
        # What two dimensions of a mesh shard lies together in any order of theirs if it is even.
        parts = [
            x.device_mesh.size(i)
            for i, p in enumerate(x.placements)
            if getattr(p, "dim", None) == d
        ]
        if len(parts) > 1 and x.size(d) % math.prod(parts):
            raise RuntimeError(_no_places(name, where, x))
    if not cut or math.prod(sizes[: cut[-1]]) == 1:
        return Places(first)
    last = cut[-1]
    outermost = next(i for i, size in enumerate(sizes) if size > 1)
    if any(outermost < i < last for i in cut):
        raise RuntimeError(_no_places(name, where, x))
    return Places(first, math.prod(sizes[last:]), math.prod(whole[last:]))


def _no_places(name: str, where: str, x: Any) -> str:
    return (
        f"{name}: rounding='stochastic' must go with shards of one dimension, or of the first one "
        f"and another, got {described(x)} for {where}: shard dimension 0, or use rounding='kahan'"
    )


# Sums

_Column = tuple[Any, tuple[int, ...]]  # a mesh, and those of its dimensions that hold shards


def _column(x: Any) -> _Column:
    return x.device_mesh, tuple(i for i, p in enumerate(x.placements) if not p.is_replicate())


class ShardSums:
    """Sums over all shards of DTensors, each replica counted once, with one all_reduce.

    Every rank puts its own sums into a row of its own, so that the all_reduce adds nothing but
    zeros to a number; each then adds up the rows in their order: the same bits on every rank.
    """

    def __init__(self, columns: Sequence[_Column], device: torch.device) -> None:
        meshes = list(dict.fromkeys(mesh for mesh, _ in columns))
        members = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
        ranks = set().union(*members)
        if ranks not in members:
            # Meshes that overlap: their union is another one on each rank, what they are parts of
            # is the same.
            whole = [set(_root_of(mesh).mesh.flatten().tolist()) for mesh in meshes]
            ranks = set().union(*whole)
            if ranks not in whole:
                raise RuntimeError(
                    "parameters must be on parts of one mesh where their meshes overlap, got "
                    f"meshes of ranks {' and '.join(str(sorted(x)) for x in members)}: cut them "
                    "from one init_device_mesh, or give each an optimizer of its own"
                )
        self.ranks = sorted(ranks)
        self._columns = {column: i for i, column in enumerate(columns)}
        self._row = self.ranks.index(dist.get_rank())
        self._group = _group_of(self.ranks, meshes)
        counts = torch.zeros(len(self.ranks), len(columns), dtype=torch.bool, device="cpu")
        for i, (mesh, sharded) in enumerate(columns):
            counted = mesh.mesh
            for d in range(counted.dim()):
                if d not in sharded:
                    counted = counted.narrow(d, 0, 1)
            for rank in counted.flatten().tolist():
                counts[self.ranks.index(rank), i] = True
        self._counted = counts.to(device)

    def column(self, x: Any) -> int:
        """Which of the sums a DTensor goes into."""
        return self._columns[_column(x)]

    @property
    def device(self) -> torch.device:
        """Where the sums are made and sent from: that of the shards."""
        return self._counted.device

    def __len__(self) -> int:
        return len(self._columns)

    def __call__(self, sums: Tensor) -> Tensor:
        """The sums of all ranks: float64 [columns] of float64 [columns], the local ones."""
        if len(self.ranks) == 1:
            return sums
        rows = sums.new_zeros(len(self.ranks), len(self))
        rows[self._row] = sums
        dist.all_reduce(rows, group=self._group)
        return torch.where(self._counted, rows, rows.new_zeros(())).sum(0)

    def of_first_rank(self, numbers: Tensor) -> Tensor:
        """`numbers` as the first of the ranks has them."""
        if len(self.ranks) > 1:
            dist.broadcast(numbers, src=self.ranks[0], group=self._group)
        return numbers


def _root_of(mesh: Any) -> Any:
    """The mesh that a mesh was cut from, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # of older torch

    return _mesh_resources.get_root_mesh(mesh)


def _group_of(ranks: list[int], meshes: list[Any]) -> Any:
    """The process group of ranks, which all of them ask for; None for that of all."""
    if ranks == list(range(dist.get_world_size())):
        return None
    for mesh in meshes:
        if mesh.ndim == 1 and sorted(mesh.mesh.tolist()) == ranks:
            return mesh.get_group()
    return dist.new_group(ranks, use_local_synchronization=True)


# Those made, of the default group that there was then: a new group takes a round of messages.
_made: dict[Any, ShardSums] = {}
_world: Any = None


def shard_sums(tensors: Iterable[Any]) -> ShardSums | None:
    """The sums for those of the tensors that are DTensors, or None where there is none. The first
    time every rank of their meshes has to call it."""
    found = [x for x in tensors if is_dtensor(x)]
    if not found:
        return None
    columns, device = tuple(dict.fromkeys(map(_column, found))), found[0].device
    global _world
    if _world is not dist.group.WORLD:
        _made.clear()
        _world = dist.group.WORLD
    if (columns, device) not in _made:
        _made[columns, device] = ShardSums(columns, device)
    return _made[columns, device]
