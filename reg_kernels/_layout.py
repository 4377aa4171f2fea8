"""The memory order that an op walks: storage order of a dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether x fills one stretch of memory, each place once, in any order of its dimensions."""
    return x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)


def has_samples_outermost(x: Tensor) -> bool:
    """Whether each sample of a batch (N, ...) fills one stretch of memory, after the one before."""
    numel = x.numel()
    # torch.compile asks a tensor nothing of the other dense orders.
    dense = is_channels_last if torch.compiler.is_compiling() else is_dense
    fills = x.is_contiguous() or dense(x)
    return fills and (x.shape[0] < 2 or numel == 0 or x.stride(0) * x.shape[0] == numel)


def mixes_samples(x: Tensor) -> bool:
    """Whether x, (N, ...), may be dense with other dimensions outside of that of the samples."""
    return not x.is_contiguous() and x.stride(0) * x.shape[0] != x.numel()


def dense_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape: of x's strides where x is dense, else contiguous."""
    if is_dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def empty_samples(x: Tensor, count: int) -> Tensor:
    """An empty batch of so many samples like those of x, (N, ...), which are outermost in x."""
    shape = (count, *x.shape[1:])
    if x.numel() == 0:  # then its strides say nothing
        return x.new_empty(shape)
    return x.new_empty_strided(shape, (x.numel() // x.shape[0], *x.stride()[1:]))


def with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x itself where it has these strides, apart from dimensions of one element, which have none
    to speak of; else a copy that has them."""
    if x.stride() == strides or all(
        size == 1 or own == wanted
        for size, own, wanted in zip(x.shape, x.stride(), strides, strict=True)
    ):
        return x
    return x.new_empty_strided(x.shape, strides).copy_(x)


def is_channels_last(x: Tensor) -> bool:
    """Whether an (N, C, ...) tensor is dense with its channels innermost, and not contiguous."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


# torch has no name for it of other numbers of dimensions.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def ordered(x: Tensor, channels_last: bool) -> Tensor:
    """x, (N, C, ...), as kernels of channels take it, contiguous or dense with its channels
    innermost: itself where it is."""
    if not channels_last:
        return x.contiguous()
    if x.dim() in _CHANNELS_LAST:
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def keeps_channels_last(x: Tensor) -> bool:
    """Whether what torch makes like x has its channels innermost: x has, or is a part of what has,
    as `images[:, 1:]`."""
    if x.is_contiguous():
        return False
    return is_channels_last(x) or is_channels_last(torch.empty_like(x))


def as_torch_returns(output: Tensor, input: Tensor) -> Tensor:
    """An elementwise op's output, contiguous where the input is not dense, in the strides that
    torch gives its own: dense, and in the order of the input's."""
    if input.is_contiguous():
        return output
    return with_strides(output, torch.empty_like(input).stride())
