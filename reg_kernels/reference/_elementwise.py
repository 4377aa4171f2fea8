"""What the random elementwise ops share in plain PyTorch: each element of the result is made of the
one in its place and of a draw, and draws follow storage order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_storage_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """x with its dimensions permuted into storage order, contiguous, and the permutation."""
    if x.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(x):
        return x.contiguous(), list(range(x.dim()))
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), x.size(d)), reverse=True)
    return x.permute(order), order


def permuted_back(y: Tensor, order: list[int], like: Tensor) -> Tensor:
    """y with its dimensions as they were, in the strides of `like` where those are dense."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(like)
    if order == sorted(order) and (y.stride() == like.stride() or not dense):
        return y
    y = y.permute([order.index(d) for d in range(len(order))])
    # A tensor of its own, since autograd lets nobody write to a view that an op made. Dimensions of
    # size 1 can have any stride.
    return torch.empty_strided(y.shape, like.stride(), dtype=y.dtype, device=y.device).copy_(y)


def stored(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in a dtype: of bytes rounded to nearest even and held to [0, 255], 0 for a NaN."""
    if dtype == torch.uint8:
        y = y.nan_to_num(0.0).round().clamp(0, 255)
    return y.to(dtype)


def by_elements(
    input: Tensor,
    number: float,
    traced: Tensor | None,
    rng_state: Tensor,
    values: Callable[[Tensor, float, Tensor], Tensor],
) -> Tensor:
    """values(x, number, rng_state) of the input in storage order and in the type of computing,
    rounded and put back. They are to be a tensor of their own, since autograd lets nobody write to
    a view. `traced`, a float64 tensor, takes the place of `number` in a compiled program."""
    number = number if traced is None else float(traced)
    x, order = in_storage_order(input)
    y = values(x.to(compute_dtype(input.dtype)), number, rng_state.to(input.device))
    return permuted_back(stored(y, x.dtype), order, input)


def with_noise(x: Tensor, width: float, noise: Tensor, multiplicative: bool) -> Tensor:
    """x + width noise, or x + width noise x; the width is rounded to the type of computing."""
    scaled = noise.to(x.dtype) * width
    return x + (scaled * x if multiplicative else scaled)
