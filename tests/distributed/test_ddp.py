"""Converted and fused models, and optimizers, in DistributedDataParallel, beside torch's own."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from process_group import Ranks, running_ranks
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import reg_kernels


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks() as pool:
        yield pool


class _Block(nn.Module):
    """A residual block, of which `convert(fuse=True)` makes fused chains."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels, momentum=None), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(y + x)
        return result


class _Net(nn.Module):
    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.ModuleList([_Block(4), _Block(4)])
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 5)
        self.sometimes = nn.Linear(5, 5)  # whose parameters are not in every graph
        self.recomputes, self.uses = recomputes, True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return self.sometimes(y) if self.uses else y


def _bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What bf16_compress_hook does, which torch has for NCCL alone."""
    whole = bucket.buffer()
    sent = whole.bfloat16().div_(dist.get_world_size())
    work = dist.all_reduce(sent, async_op=True).get_future()  # type: ignore[union-attr]
    return work.then(lambda done: whole.copy_(done.value()[0]))  # type: ignore[no-any-return]


class Way(NamedTuple):
    """How a model is trained."""

    options: dict[str, Any]  # of DDP
    dtype: torch.dtype = torch.float64
    skips: bool = False  # a layer at every other step
    recomputes: bool = False
    accumulates: bool = False
    keeps_gradients: bool = False  # as zeros, instead of None
    compressed: Callable[..., Any] | None = None
    buffers_differ: bool = False  # at the start, from rank to rank


WAYS = {
    "default": Way({}),
    "find_unused_parameters": Way({"find_unused_parameters": True}, skips=True),
    "static_graph": Way({"static_graph": True}, recomputes=True),
    "no_sync": Way({}, accumulates=True),
    "broadcast_buffers": Way({"broadcast_buffers": True}, buffers_differ=True),
    "own buffers": Way({"broadcast_buffers": False}),
    "bucket views": Way({"gradient_as_bucket_view": True}, keeps_gradients=True),
    "bucket views anew": Way({"gradient_as_bucket_view": True, "bucket_cap_mb": 1}, skips=False),
    "bucket views, accumulating": Way({"gradient_as_bucket_view": True}, accumulates=True),
    "bf16": Way({}, torch.float32, compressed=_bf16),
    "fp16 in views": Way(
        {"gradient_as_bucket_view": True},
        *(torch.float32, False, False, False, True, default_hooks.fp16_compress_hook),
    ),
}


class Trained(NamedTuple):
    losses: list[float]
    gradients: list[Tensor]  # of the last step
    state: dict[str, Tensor]


def _trained(way: Way, kind: str) -> Trained:
    """`kind`: "torch", or ours: "converted" or "fused"."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    net: nn.Module = _Net(way.recomputes).to(way.dtype)
    optimizer: Any = torch.optim.AdamW
    if kind != "torch":
        net, optimizer = reg_kernels.convert(net, fuse=kind == "fused"), reg_kernels.optim.AdamW
    if way.buffers_differ and rank:
        for buffer in net.buffers():
            buffer.add_(rank)
    ddp = DistributedDataParallel(net, **way.options)
    if way.compressed is not None:
        ddp.register_comm_hook(None, way.compressed)
    step_by = optimizer(ddp.parameters(), 0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(rank)
    losses, gradients = [], []
    for step in range(4):
        net.uses = not way.skips or step % 2 == 0  # type: ignore[assignment]
        step_by.zero_grad(set_to_none=not way.keeps_gradients)
        for more in (True, False) if way.accumulates else (False,):
            x = torch.randn(4, 3, 7, 7, generator=generator, dtype=way.dtype)
            if step % 2:
                x = x.contiguous(memory_format=torch.channels_last)
            ddp.require_backward_grad_sync = not more  # what no_sync() sets
            loss = ddp(x).square().mean()
            loss.backward()
            losses.append(loss.item())
        gradients = [p.grad.clone() for p in ddp.parameters() if p.grad is not None]
        step_by.step()
    state = {name: value.detach() for name, value in ddp.module.state_dict().items()}
    return Trained(losses, gradients, state)


def _all_ways(names: list[str]) -> list[dict[str, Trained]]:
    kinds = ("torch", "converted", "fused")
    return [{kind: _trained(WAYS[name], kind) for kind in kinds} for name in names]


@pytest.mark.parametrize("size", [2, 4])
def test_models_train_as_torchs_do(ranks: Ranks, size: int) -> None:
    names = list(WAYS) if size == 2 else ["find_unused_parameters", "bucket views, accumulating"]
    by_rank = ranks(size, _all_ways, names)
    for name, trained in itertools.product(names, by_rank):
        found = trained[names.index(name)]
        rough = WAYS[name].compressed is not None
        close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
        if rough:  # 16-bit gradients, of which one in some is rounded to the other side
            close = {"rtol": 2e-2, "atol": 2e-3}
        for kind in ("converted", "fused"):
            for part in Trained._fields:
                ours, torchs = getattr(found[kind], part), getattr(found["torch"], part)
                torch.testing.assert_close(
                    ours, torchs, **close, msg=f"{name}, {kind}, {part}: ".__add__
                )
    for index in range(len(names)):  # parameters are the same on all ranks, bit by bit
        first, *others = (trained[index]["fused"].state for trained in by_rank)
        for other in others:
            same = [k for k in first if "running" not in k or "own" not in names[index]]
            assert all(torch.equal(first[k], other[k]) for k in same if "running" not in k)


def _statistics() -> list[Tensor]:
    """Of a forward and one more, whose buffers are rank 0's when it begins."""
    torch.manual_seed(0)
    found = []
    for make in (lambda x: x, reg_kernels.convert, lambda x: reg_kernels.convert(x, fuse=True)):
        ddp = DistributedDataParallel(
            make(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU()))
        )
        generator = torch.Generator().manual_seed(dist.get_rank())
        with torch.no_grad():
            for parameter in ddp.parameters():
                parameter.fill_(0.5)
        for _ in range(2):
            ddp(torch.randn(4, 2, generator=generator)).sum().backward()
        found.append(torch.cat([b.float().flatten() for b in ddp.module.buffers()]))
    return found


def test_running_statistics_are_rank_0s_when_a_forward_begins(ranks: Ranks) -> None:
    for torchs, converted, fused in (by_rank := ranks(2, _statistics)):
        torch.testing.assert_close(converted, torchs)
        torch.testing.assert_close(fused, torchs)
    assert not torch.equal(by_rank[0][0], by_rank[1][0])


def _moved() -> list[tuple[bool, float]]:
    """Whether an optimizer sees that gradients are elsewhere, as DDP puts them into buckets that it
    makes anew after the first step."""
    torch.manual_seed(0)
    found = []
    for views in (False, True):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        other.load_state_dict(net.state_dict())
        ddp = DistributedDataParallel(net, gradient_as_bucket_view=views)
        ours = reg_kernels.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
        torchs = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
        addresses = []
        for step in range(4):
            x = torch.full((2, 4), 1.0 + step + dist.get_rank(), dtype=torch.float64)
            ours.zero_grad(set_to_none=step == 2)
            torchs.zero_grad()
            ddp(x).square().sum().backward()
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                q.grad = p.grad.clone()  # type: ignore[union-attr]
            addresses.append([p.grad.data_ptr() for p in net.parameters()])  # type: ignore[union-attr]
            ours.step()
            torchs.step()
        error = max(
            float((p - q).abs().max())
            for p, q in zip(net.parameters(), other.parameters(), strict=True)
        )
        found.append((any(a != addresses[0] for a in addresses), error))
    return found


def test_an_optimizer_sees_gradients_move(ranks: Ranks) -> None:
    for found in ranks(2, _moved):
        assert any(moved for moved, _ in found)
        assert all(error < 1e-14 for _, error in found)


def _chain_of_an_empty_rank(backend: str, compiled: bool) -> float:
    """How far a chain with dropout, of all samples on rank 1 and none on rank 0, is from the same
    without ranks."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    x, state = torch.randn(6, 4, 5, 5, dtype=torch.float64), torch.tensor([1, 2])
    worst = 0.0
    for activation, residual in (("relu", False), ("gelu", True)):

        def chain(x: Tensor, group: Any, act: str = activation, adds: bool = residual) -> Tensor:
            return reg_kernels.functional.batch_norm_act(
                *(x, None, None, None, None, 2 * x if adds else None, True),
                activation=act,
                drop=0.3,
                rng_state=state,
                process_group=group,
                backend=backend,
            )

        mine = x[: 0 if dist.get_rank() == 0 else 6].clone().requires_grad_()
        whole = x.clone().requires_grad_()
        called: Any = torch.compile(chain, backend="aot_eager", fullgraph=True)
        y = (called if compiled else chain)(mine, dist.group.WORLD)
        y.square().sum().backward()
        chain(whole, None).square().sum().backward()
        assert mine.grad is not None and whole.grad is not None
        if len(mine):
            worst = max(worst, float((mine.grad - whole.grad).abs().max()))
    return worst


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_rank_without_samples_drops_nothing_and_waits_for_nobody(
    ranks: Ranks, backend: str, compiled: bool
) -> None:
    assert max(ranks(2, _chain_of_an_empty_rank, backend, compiled)) < 1e-9


def _channels_that_change() -> str:
    layer = reg_kernels.nn.SyncBatchNorm(4, affine=False, track_running_stats=False)
    layer(torch.randn(3, 4, 2, 2))
    with pytest.raises(ValueError) as error:
        layer(torch.randn(3, 5, 2, 2))
    return str(error.value)


def test_channels_that_change_after_the_first_call_are_refused(ranks: Ranks) -> None:
    said = "SyncBatchNorm: input must be of 4 channels, got 5"
    assert ranks(2, _channels_that_change) == [said, said]
