"""nn.SyncBatchNorm beside one of torch's operations: `python -m bench.sync_batch_norm`.

torch's own layer runs on no CPU, so the other contender on the ranks (`ranks.py`) is what one
writes instead: the batch's moments, an all_gather, the normalisation, and in the backward two sums,
an all_reduce and the gradient, by torch's operations. A sample is a forward and a backward. What
the contenders return is compared first. The goal is 1.5 times, at the first shape.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from reg_kernels.nn import SyncBatchNorm

from . import ranks

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
    calls = {name: partial(_step, layer, x, grad) for name, layer in layers.items()}
    return ranks.sampled(calls, rounds)


def measure(rounds: int) -> None:
    """Prints a table."""
    ranks.print_head("shape of a rank", "ours, ms", "torch's operations, ms", "torch / ours")
    for shape in SHAPES:
        ranks.print_row(("x".join(map(str, shape)),), _measured(shape, rounds), "torch")


if __name__ == "__main__":
    ranks.run(measure, __doc__, rounds=50)
