"""Dropout and channel dropout in Triton.

Reads x, writes y: 2 * sizeof(dtype) bytes an element, forward and backward alike; no mask is
stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import dense_like, is_channels_last, is_dense
from .._rng import GROUP, TAG_DROPOUT
from ._launch import device_of, state_arguments
from ._random import half_word_at, half_words, load_state

BLOCK = 2048  # elements a program: 16 bytes a thread and load, in bf16 with 8 warps
TILE = 2048  # elements of a (channels, positions) tile
UNSPECIALISED = ["seed", "offset", "element_offset"]  # no recompiling by value


@triton.jit
def dropout_values(x, half_word, threshold, scale):
    """x m for values of one dtype; 16-bit floats compute in float32, the rest in their own."""
    compute = tl.float64 if x.dtype == tl.float64 else tl.float32
    m = tl.where(half_word < threshold, scale.to(compute), 0.0)
    return (x.to(compute) * m).to(x.dtype)


@triton.jit
def load_rate(p_ptr, p, P_ON_DEVICE: tl.constexpr):
    """(threshold, scale), [1] each, of the probability at p_ptr where one is there, else of p."""
    if P_ON_DEVICE:
        p = tl.load(p_ptr)
    keep = (1.0 - tl.full([1], p, tl.float64)) * 65536.0
    # Adding and taking off 1.5 2^52 rounds to the nearest integer, ties to even.
    threshold = (keep + 6755399441055744.0) - 6755399441055744.0
    scale = tl.where(threshold > 0.0, 65536.0 / tl.maximum(threshold, 1.0), 0.0)
    return threshold.to(tl.uint32), scale


@triton.jit(do_not_specialize=UNSPECIALISED)
def dropout_kernel(
    x_ptr,  # [numel] in storage order
    y_ptr,  # likewise; may be x_ptr
    numel,
    element_offset: tl.int64,  # mask index of element 0
    p_ptr,
    p: tl.float64,
    state_ptr,
    seed: tl.int64,
    offset: tl.int64,
    TAG: tl.constexpr,
    P_ON_DEVICE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    LEAD: tl.constexpr,  # position of element 0 in its group: 0 keeps the accesses aligned
    BLOCK: tl.constexpr,
):
    seed, offset = load_state(state_ptr, seed, offset, ON_DEVICE)
    threshold, scale = load_rate(p_ptr, p, P_ON_DEVICE)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    drawn = half_words(seed ^ TAG, offset, (element_offset - LEAD + block) // 8, BLOCK // 8)
    i = block - LEAD + tl.arange(0, BLOCK)
    inside = (i >= 0) & (i < numel)
    x = tl.load(x_ptr + i, mask=inside)
    tl.store(y_ptr + i, dropout_values(x, drawn, threshold, scale), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def feature_dropout_kernel(
    x_ptr,  # (N, C, L) of the strides below
    y_ptr,  # likewise; may be x_ptr
    C,
    L,
    stride_c,  # L and 1, or for channels last 1 and C
    stride_l,
    element_offset: tl.int64,
    p_ptr,
    p: tl.float64,
    state_ptr,
    seed: tl.int64,
    offset: tl.int64,
    TAG: tl.constexpr,
    P_ON_DEVICE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    seed, offset = load_state(state_ptr, seed, offset, ON_DEVICE)
    threshold, scale = load_rate(p_ptr, p, P_ON_DEVICE)
    blocks_c, blocks_l = tl.cdiv(C, BLOCK_C), tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    n = program // (blocks_c * blocks_l)
    c = (program // blocks_l) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    l = program % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    drawn = half_word_at(seed ^ TAG, offset, element_offset + n * C + c)
    i = n * C * L + c[:, None] * stride_c + l[None, :] * stride_l
    inside = (c[:, None] < C) & (l[None, :] < L)
    x = tl.load(x_ptr + i, mask=inside)
    tl.store(y_ptr + i, dropout_values(x, drawn[:, None], threshold, scale), mask=inside)


def _draw_arguments(
    x: Tensor, p: float, rng_state: Tensor, traced_p: Tensor | None
) -> dict[str, Any]:
    """The kernels' arguments that decide the mask, each by value or by pointer."""
    on_device = traced_p is not None and traced_p.device.type != "cpu"
    if traced_p is not None and not on_device:
        p = float(traced_p)
    return {
        "p_ptr": traced_p if on_device else x,
        "p": p,
        "P_ON_DEVICE": on_device,
        "TAG": TAG_DROPOUT,
        **state_arguments(rng_state, x),
    }


def _launch_dropout(
    x: Tensor,
    y: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    lead = element_offset % GROUP
    with device_of(x):
        dropout_kernel[(triton.cdiv(lead + x.numel(), BLOCK),)](
            x,
            y,
            x.numel(),
            element_offset,
            **_draw_arguments(x, p, rng_state, traced_p),
            LEAD=lead,
            BLOCK=BLOCK,
            num_warps=8,
        )


def _launch_feature_dropout(
    x: Tensor,
    y: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    n, c = x.shape[:2]
    length = x.numel() // (n * c)
    if is_channels_last(x):
        stride_c, stride_l = 1, c
        block_c = min(triton.next_power_of_2(c), 256)
        block_l = TILE // block_c
    else:
        stride_c, stride_l = length, 1
        block_l = min(triton.next_power_of_2(length), TILE)
        block_c = TILE // block_l
    programs = n * triton.cdiv(c, block_c) * triton.cdiv(length, block_l)
    with device_of(x):
        feature_dropout_kernel[(programs,)](
            x,
            y,
            c,
            length,
            stride_c,
            stride_l,
            element_offset,
            **_draw_arguments(x, p, rng_state, traced_p),
            BLOCK_C=block_c,
            BLOCK_L=block_l,
            num_warps=8,
        )


def dropout(input: Tensor, *draw: Any) -> Tensor:
    """The op's result as a fresh tensor; any shape, any layout. `draw`: p, rng_state, ..."""
    x = input if is_dense(input) else input.contiguous()
    y = dense_like(x)
    _launch_dropout(x, y, *draw)
    return y


def dropout_(input: Tensor, *draw: Any) -> None:
    """The same over a dense input."""
    _launch_dropout(input, input, *draw)


def feature_dropout(input: Tensor, *draw: Any) -> Tensor:
    """The op's result as a fresh tensor; input (N, C, ...) contiguous or channels last."""
    y = torch.empty_like(input)
    _launch_feature_dropout(input, y, *draw)
    return y


def feature_dropout_(input: Tensor, *draw: Any) -> None:
    """The same over such an input."""
    _launch_feature_dropout(input, input, *draw)
