"""nn.SyncBatchNorm beside one of torch's operations: `python -m bench.sync_batch_norm`.

Two processes of one thread each are the ranks of a gloo group. torch's own layer runs on no CPU, so
the other contender is what one writes instead: the batch's moments, an all_gather, the
normalisation, and in the backward two sums, an all_reduce and the gradient, by torch's operations.
The contenders run interleaved, a forward and backward of each in every round, and start each sample
together; a sample is of rank 0's clock. What they return is compared first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from reg_kernels.nn import SyncBatchNorm

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (8, 64, 28, 28))  # of each rank
DIMS = [0, 2, 3]


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class _ByTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.Module) -> Tensor:
        var, mean = torch.var_mean(x, DIMS, correction=0)
        own = torch.cat([mean, var, x.new_tensor([x.numel() / x.shape[1]])])
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, own)
        channels = x.shape[1]
        means, variances, counts = torch.stack(of_ranks).split([channels, channels, 1], 1)
        share, count = counts / counts.sum(), counts.sum()
        mean = (means * share).sum(0)
        var = ((variances + (means - mean).square()) * share).sum(0)
        invstd = (var + layer.eps).rsqrt()
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * (count / (count - 1)), layer.momentum)
        layer.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        scale = invstd * weight
        return x * _per_channel(scale) + _per_channel(bias - mean * scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        normalised = (x - _per_channel(mean)) * _per_channel(invstd)
        of_bias, of_weight = grad.sum(DIMS), (grad * normalised).sum(DIMS)
        sums = torch.stack([of_bias, of_weight])
        dist.all_reduce(sums)
        first, second = sums / count
        grad = grad - _per_channel(first) - normalised * _per_channel(second)
        return grad * _per_channel(invstd * weight), of_weight, of_bias, None


class SyncBatchNormByTorch(nn.BatchNorm2d):
    """BatchNorm over all ranks, in training."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _ByTorch.apply(input, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of input, weight and bias."""
    y: Tensor = layer(x)
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)


def _measured(shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(dist.get_rank())
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    layers = {"ours": SyncBatchNorm(shape[1]), "torch": SyncBatchNormByTorch(shape[1])}
    for _ in range(3):
        found = [_step(layer, x, grad) for layer in layers.values()]
        for own, theirs in zip(*found, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(rounds):
        for name in sorted(layers, reverse=bool(turn % 2)):
            dist.barrier()
            begin = time.perf_counter()
            _step(layers[name], x, grad)
            samples[name].append(time.perf_counter() - begin)
    return samples


def _rank(rank: int, store: str, size: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if rank == 0:
        print("| shape of a rank | ours, ms | torch's operations, ms | torch / ours |")
        print("|---|---|---|---|")
    for shape in SHAPES:
        samples = _measured(shape, rounds)
        if rank == 0:
            medians = [f"{statistics.median(samples[n]) * 1e3:.2f}" for n in ("ours", "torch")]
            pairs = zip(samples["torch"], samples["ours"], strict=True)
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            cells = ("x".join(map(str, shape)), *medians, f"{ratio:.2f}")
            print("| " + " | ".join(cells) + " |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), options.ranks, options.rounds)
        torch.multiprocessing.spawn(_rank, arguments, options.ranks)


if __name__ == "__main__":
    main()
