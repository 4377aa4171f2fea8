"""Training one net on several ranks of torch.distributed, as `train --parallel` does.

Every rank has the same data, options and random numbers. A batch is the ranks' parts of it one
behind the other, and each step is that of one process with the whole batch, but for the order in
which sums round. `ALONE` is the one process of a run without `--parallel`: the trainer asks it the
same questions.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ... import distributed
from ..._extras import MissingExtra
from ...distributed import RankError
from ...nn import SyncBatchNorm
from .._errors import UsageError

KINDS = ("ddp", "fsdp")
BY_TORCHRUN = "torchrun --nproc-per-node 2 -m reg_kernels train --parallel"
TIMEOUT = timedelta(minutes=5)  # how long a rank waits for another, which may draw or write
_NEVER = 2**62  # steps

T = TypeVar("T")
L = TypeVar("L", bound=Callable[..., Tensor])  # a `Loss` or a `Distill`


class Ranks:
    """The one process that trains where there are no others; a `Group` does more."""

    kind: str | None = None
    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def spread(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """A model as the ranks have it, and the module that is called for a gradient of its
        parameters."""
        return model, model

    @contextlib.contextmanager
    def part(self, samples: int) -> Iterator[slice]:
        """This rank's part of a batch of so many samples; what is drawn meanwhile is as well."""
        yield slice(0, samples)

    def share(self, loss: L) -> L:
        """A loss whose mean over the ranks is that of the batch, within `part`."""
        return loss

    def together(self, model: nn.Module, images: Tensor) -> Tensor:
        """The scores (N, K) of images (N, C, H, W), of which each rank computes its part."""
        scores: Tensor = model(images)
        return scores

    def total(self, count: int) -> int:
        """The sum of the ranks' counts."""
        return count

    def watch(self, loss: Tensor) -> None:
        """Notes whether a step's loss is finite, and waits for nothing."""

    def compare_losses(self, where: str) -> None:
        """Ends all ranks where a loss since the last call was not finite on one of them first."""

    def whole(self, value: T) -> T:
        """`value`, dicts and lists of tensors and primitives, with each tensor in one piece."""
        return value

    def split(self, values: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Any]:
        """The tensors of `whole` as the ranks have those of the same name in `like`."""
        return dict(values)

    def agree(self) -> AbstractContextManager[None]:
        """What is bad input to one rank within this ends all."""
        return contextlib.nullcontext()

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on rank 0, which alone does it."""
        return work()

    def check_alike(self, **facts: Any) -> None:
        """Raises where the ranks differ in these."""

    def guard(self) -> AbstractContextManager[None]:
        """A rank that fails within this is named by the others."""
        return contextlib.nullcontext()


ALONE = Ranks()


class Group(Ranks):
    """The ranks of the default process group."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._weight = 1.0  # of this rank's mean loss
        self._all_have_some = True  # samples
        self._finite = distributed.FiniteCheck(every=_NEVER)
        self._steps = 0

    def spread(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
        device = next(model.parameters()).device.type
        if self.kind == "ddp":
            trained = nn.parallel.DistributedDataParallel(model)
            if self.size > 2 and device == "cpu":
                # DDP takes no hook whose annotations are strings, as all are here.
                trained.register_comm_hook(
                    self.size, lambda ranks, bucket: _mean_in_order(ranks, bucket)
                )
            # Statistics have the same bits on all ranks by themselves. The option of the
            # constructor has another name from one release of torch to the next.
            trained.broadcast_buffers = False
            return model, trained
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # All parameters are one group, since the nets are small. Without resharding they would stay
        # whole after an evaluation. Without a mesh they would go to a GPU where there is one.
        mesh = init_device_mesh(device, (self.size,))
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model, model

    @contextlib.contextmanager
    def part(self, samples: int) -> Iterator[slice]:
        own = distributed.part(samples, self.rank, self.size)
        count = own.stop - own.start
        # The mean over the ranks is taken by DDP and FSDP, of gradients.
        self._weight = count * self.size / samples
        self._all_have_some = samples >= self.size
        try:
            with distributed.batch(own.start, samples, count):
                yield own
        finally:
            self._weight = 1.0

    def share(self, loss: L) -> L:
        def weighed(scores: Tensor, *target: Any) -> Tensor:
            # The mean of no samples is NaN, and its gradient for each of them is that of none.
            mean: Tensor = loss(scores, *target)
            return mean * self._weight

        return cast(L, weighed)

    def together(self, model: nn.Module, images: Tensor) -> Tensor:
        own = distributed.part(len(images), self.rank, self.size)
        scores: Tensor = model(images[own])
        most = -(-len(images) // self.size)
        padded = scores.new_zeros(most, scores.shape[1])
        padded[: len(scores)] = scores
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        parts = (distributed.part(len(images), rank, self.size) for rank in range(self.size))
        return torch.cat(
            [of[: part.stop - part.start] for of, part in zip(gathered, parts, strict=True)]
        )

    def total(self, count: int) -> int:
        return sum(self._gathered(count))

    def watch(self, loss: Tensor) -> None:
        self._steps += 1
        # A rank without samples has nothing to see.
        if self._all_have_some:
            self._finite(loss, self._steps)

    def compare_losses(self, where: str) -> None:
        self._steps = 0
        try:
            self._finite.read()
        except RankError as error:
            # A loss that ran away on all at once goes on, as that of one process does.
            if len(error.ranks) < self.size:
                said = str(error).removeprefix("FiniteCheck: ")
                raise RankError(f"{said} of {where}", error.ranks) from None

    def whole(self, value: T) -> T:
        found: Any = value
        if isinstance(value, dict):
            found = {name: self.whole(each) for name, each in value.items()}
        elif isinstance(value, list | tuple):
            found = type(value)(self.whole(each) for each in value)
        elif hasattr(value, "full_tensor"):
            found = value.full_tensor()
        return found

    def split(self, values: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            name: _as_sharded(value, like[name]) if name in like else value
            for name, value in values.items()
        }

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except (UsageError, MissingExtra) as failure:
            error = failure
        errors = self._gathered(None if error is None else str(error))
        if all(each is None for each in errors):
            return
        alike = len(set(errors)) == 1
        said = next(
            each if alike else f"{each} (on rank {rank})"
            for rank, each in enumerate(errors)
            if each is not None
        )
        raise UsageError(said) from None

    def from_first(self, work: Callable[[], T]) -> T:
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except (UsageError, OSError, ValueError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        result, failure = answer
        if failure is not None:
            raise failure
        return result

    def check_alike(self, **facts: Any) -> None:
        distributed.check_alike(**facts)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        error: UsageError | None = None
        with distributed.guard():
            try:
                yield
            except UsageError as alike:  # by `agree` or `from_first`: nobody is to blame
                error = alike
        if error is not None:
            raise error

    def _gathered(self, value: T) -> list[T]:
        """The ranks' values, in their order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def _mean_in_order(ranks: int, bucket: Any) -> torch.futures.Future[Tensor]:
    """The mean of the ranks' gradients, added in the order of ranks.

    gloo adds those of three and more in an order that goes by a gradient's place in its bucket, and
    DDP makes other buckets after its first step: a run that was resumed would round otherwise. To
    gather all costs more to send than to reduce, ranks / 2 times.
    """
    mine = bucket.buffer()
    gathered = [torch.empty_like(mine) for _ in range(ranks)]

    def mean(_: Any) -> Tensor:
        total = gathered[0]
        for other in gathered[1:]:
            total += other
        return total.div_(ranks)

    work = dist.all_gather(gathered, mine, async_op=True)
    assert work is not None  # this rank is in the group
    return cast("torch.futures.Future[Tensor]", work.get_future().then(mean))


def _as_sharded(value: Any, like: Tensor) -> Any:
    """A whole tensor as a shard of a DTensor's, without asking the other ranks, which have it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    if value.shape != like.shape:
        raise ValueError(f"shape {tuple(value.shape)} where {tuple(like.shape)} was expected")
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


# Beginning and end


@contextlib.contextmanager
def joined(kind: str | None) -> Iterator[Ranks]:
    """The ranks that torchrun has started, as a process group that ends with this; or `ALONE`.

    A group that there is already is taken, and left as it is.
    """
    if kind is None:
        started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if started > 1:
            raise UsageError(
                f"--parallel: must be ddp or fsdp where torchrun has started {started} processes, "
                "got none: each of them would train by itself and write the same files"
            )
        yield ALONE
        return
    if not dist.is_available():
        raise UsageError("--parallel: must have a torch with torch.distributed, got one without")
    if dist.is_initialized():
        yield Group(kind)
        return
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise UsageError(f"--parallel: must be started by torchrun, as {BY_TORCHRUN} {kind}")
    # What is said of input goes by gloo, which every rank has whatever its device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _ended_like_an_interrupt():
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:  # the latter where a variable is no number
            raise UsageError(
                f"--parallel: must be started alike on all ranks, as torchrun does, got {error}"
            ) from error
        try:
            yield Group(kind)
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """torchrun ends the other ranks by SIGTERM when one has died: as after Ctrl-C, what is trained
    is to be kept."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def device_of_rank(name: str | None) -> str | None:
    """The device of this rank by that of `--device`: its own GPU of its host's."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name not in (None, "cuda"):
        if name != "cpu":
            raise UsageError(f"--device: must be cpu or cuda with --parallel, got {name}")
        return name
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None and found == 0:
        return "cpu"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(local + 1)))
    if ranks > found:
        raise UsageError(
            f"--device: must be cpu, or cuda with a GPU for each rank of a host, got {ranks} ranks "
            f"where torch finds {found} GPUs"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"
