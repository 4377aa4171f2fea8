"""SyncBatchNorm on two processes of one thread, by gloo, beside one that is written in torch's
eager operations, as people write it where torch's own does not run.

    python -m bench.sync_batch_norm [--rounds 30]

A round is a forward and a backward of (32, 64, 56, 56) float32 a process. The contenders take turns
from round to round, so that whatever else the machine does falls on both; both ranks start a round
together, and its time is that of the slower one. Values are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn

import reg_kernels.nn
from reg_kernels.bench._environment import facts_of

SHAPE = (32, 64, 56, 56)
RANKS, WARM_UP, GOAL = 2, 5, 1.5


class _Eager(torch.autograd.Function):
    """Normalises over all ranks' batches, in eager operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: list[Tensor], eps: float
    ) -> Tensor:
        dims = [0, 2, 3]
        variance, mean = torch.var_mean(x, dims, correction=0)
        count = torch.full_like(mean, x.numel() // x.shape[1])
        own = torch.stack([mean, variance, count])
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own)
        means, variances, counts = torch.stack(parts).unbind(1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        running[0].lerp_(mean, 0.1)
        running[1].lerp_(variance * total / (total - 1), 0.1)
        invstd = (variance + eps).rsqrt()
        normal = (x - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
        ctx.save_for_backward(normal, weight, invstd, total)
        return normal * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        normal, weight, invstd, total = ctx.saved_tensors
        dims = [0, 2, 3]
        of_bias, of_weight = g.sum(dims), (g * normal).sum(dims)
        sums = torch.stack([of_bias, of_weight])
        distributed.all_reduce(sums)
        means = (sums / total).view(2, 1, -1, 1, 1)
        scale = (weight * invstd).view(1, -1, 1, 1)
        return (g - means[0] - normal * means[1]) * scale, of_weight, of_bias, None, None


class EagerSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over all ranks' batches in training."""

    def forward(self, input: Tensor) -> Tensor:
        running = [self.running_mean, self.running_var]
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr,operator]
        return _Eager.apply(input, self.weight, self.bias, running, self.eps)  # type: ignore[no-any-return]


def _work(rank: int, path: str, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=RANKS)
    torch.manual_seed(rank)
    x, g = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layers: dict[str, nn.Module] = {
        "ours": reg_kernels.nn.SyncBatchNorm(SHAPE[1]),
        "eager": EagerSyncBatchNorm(SHAPE[1]),
    }

    def step(layer: nn.Module) -> list[Tensor]:
        x.grad = None
        layer.zero_grad()
        y = layer(x)
        y.backward(g)
        return [y.detach(), x.grad, layer.weight.grad, layer.running_var]  # type: ignore[list-item]

    for ours, eager in zip(*map(step, layers.values()), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(WARM_UP + rounds):
        for name, layer in layers.items():
            taken = torch.tensor([_timed(lambda layer=layer: step(layer))])
            distributed.all_reduce(taken, distributed.ReduceOp.MAX)
            if number >= WARM_UP:
                times[name].append(float(taken))
    if rank == 0:
        results.put(times)
    distributed.destroy_process_group()


def _timed(call: Callable[[], object]) -> float:
    distributed.barrier()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of each contender")
    rounds = parser.parse_args().rounds
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (str(Path(folder) / "store"), rounds, results), nprocs=RANKS)
    times, name = results.get(), facts_of(torch.device("cpu"))["name"]
    print(f"{RANKS} processes of 1 thread, gloo, {SHAPE} float32, {name}")
    for contender, taken in times.items():
        low, middle, high = (1e3 * t for t in statistics.quantiles(taken, n=4))
        print(f"  {contender:6} {middle:7.1f} ms, middle half {low:.1f} to {high:.1f}")
    ratio = statistics.median(times["eager"]) / statistics.median(times["ours"])
    print(f"  {ratio:.2f} times as fast, {GOAL} is the goal")


if __name__ == "__main__":
    main()
