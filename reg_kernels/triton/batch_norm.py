"""BatchNorm, residual, activation and dropout in Triton, and their gradients.

Bytes an element, s = sizeof(dtype), each residual read s and each gate access 1/8 more:
    moments_kernel         x                                        1 s
    forward_kernel         x, y                                     2 s
    gradient_sums_kernel   g, x                                     2 s
    backward_kernel        g, x, grad_input                         3 s; grad_residual 1 s
A program has a block of channels and a range of their positions (_channels.py). Where the blocks
alone keep the device busy, or a channel fits one tile, the second kernel takes the moments or sums
itself, in one launch: from a tile it then maps without reading it again (2 s forward, 3 s
backward), else from a range that it has just brought into the cache. Otherwise the range is split,
the first kernel leaves each part's moments or sums in a workspace, and the programs of the second
merge those of their channels, always in one order. The second pass walks the other way, from what
was read last.

The loops are `while`: Triton's interpreter takes no bounds of a `for` from a kernel's arguments
(numpy 2.4 refuses the conversion).

Shapes: input [N, C, L] of M = N L positions, channel values [C], workspace float64 [2, C, splits]
in an order of its own.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from .._activation import has_gate, needs_preactivation
from .._layout import dense_like, is_channels_last
from .._tracked import Tracked
from ._batch_norm import GIVEN, MERGED, OF_RANKS, OWN, Chain
from ._batch_norm_backward import backward_kernel, gradient_sums_kernel
from ._batch_norm_forward import forward_kernel, merge_kernel, moments_kernel, ranks_kernel
from ._launch import ceil_div, device_of, next_power_of_2, processors, state_arguments
from ._plan import ChannelPlan, plan_for

FORWARD_TILE = 16384  # bytes of x in a tile: with 8 warps, 4 loads of 16 bytes a thread
BACKWARD_TILE = 8192  # of x and of g each
MAP_TILE = 8192
BLOCK_C = 32  # channels of a program that merges the ranks' moments
NOTHING_TRACKED = Tracked(None, None, None)


def _plan(x: Tensor, tile_bytes: int, merges: bool) -> ChannelPlan:
    samples, channels = x.shape[:2]
    return plan_for(
        samples,
        channels,
        x.numel() // (samples * channels),
        is_channels_last(x),
        x.element_size(),
        tile_bytes,
        processors(x),
        merges,
    )


def _workspace(x: Tensor, plan: ChannelPlan) -> Tensor:
    return x.new_empty(2 * plan.channels * plan.splits, dtype=torch.float64)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    tracked: list[Tensor],
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    p: float,
    rng_state: Tensor | None,
    element_offset: int,
    keep_gate: bool,
    gathered: Tensor | None,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op in training: (output, mean, invstd, gate)."""
    updated = Tracked.of(tracked)
    channels = input.shape[1]
    output = dense_like(input)
    mean = input.new_empty(channels, dtype=torch.float64)
    invstd = torch.empty_like(mean)
    gated = keep_gate and has_gate(activation, residual is not None, p)
    bits = input.numel() // channels if gated and channels else 0
    gate = input.new_empty(channels * ((bits + 7) // 8), dtype=torch.uint8)
    with device_of(input):
        partials = None
        if gathered is not None:
            _launch_ranks(gathered, mean, invstd, updated, momentum, eps)
        if input.numel() == 0:
            return output, mean, invstd, gate
        plan = _plan(input, FORWARD_TILE if gathered is None else MAP_TILE, gathered is None)
        if plan.splits > 1 and gathered is None:
            partials = _workspace(input, plan)
            moments_kernel[(plan.programs,)](
                input, partials, *plan.sizes, plan.blocks, num_warps=plan.warps
            )
        _launch_forward(
            plan,
            *(input, residual, output, gate if gated else None, weight, bias, mean, invstd),
            updated if gathered is None else NOTHING_TRACKED,
            *(partials, momentum, eps, activation, slope, p, rng_state, element_offset),
            statistics=OF_RANKS if gathered is not None else OWN if partials is None else MERGED,
        )
    if gathered is None:
        _count_averaged(updated, momentum)
    return output, mean, invstd, gate


def _count_averaged(tracked: Tracked, momentum: float | None) -> None:
    if tracked.num_batches_tracked is not None and momentum is None:
        tracked.num_batches_tracked.add_(1)  # behind all programs that read it


def _launch_ranks(
    gathered: Tensor,
    mean: Tensor,
    invstd: Tensor,
    tracked: Tracked,
    momentum: float | None,
    eps: float,
) -> None:
    """The statistics of all ranks into mean, invstd and what is tracked."""
    ranks, _, channels = gathered.shape
    if channels == 0:
        return
    ranks_kernel[(ceil_div(channels, BLOCK_C),)](
        *(gathered, mean, invstd, *tracked, channels, ranks),
        *(0.0 if momentum is None else momentum, eps),
        AVERAGES=momentum is None,
        BLOCK_C=BLOCK_C,
        num_warps=1,
    )
    _count_averaged(tracked, momentum)


def batch_norm_moments(input: Tensor) -> Tensor:
    """Count, mean, what that has lost by its rounding, and sum of squared deviations of each
    channel, float64 [4, C]."""
    if input.numel() == 0:
        return input.new_zeros((4, input.shape[1]), dtype=torch.float64)
    plan = _plan(input, FORWARD_TILE, merges=True)
    moments = input.new_empty((4, plan.channels), dtype=torch.float64)
    partials = _workspace(input, plan)
    with device_of(input):
        moments_kernel[(plan.programs,)](
            input, partials, *plan.sizes, plan.blocks, num_warps=plan.warps
        )
        merge_kernel[(plan.programs // plan.splits,)](
            *(partials, moments, *plan.sizes, next_power_of_2(plan.splits), plan.blocks),
            num_warps=plan.warps,
        )
    return moments


def batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: int,
    slope: float,
) -> Tensor:
    """The op with frozen statistics."""
    output = dense_like(input)
    if input.numel() == 0:
        return output
    plan = _plan(input, MAP_TILE, merges=False)
    with device_of(input):
        _launch_forward(
            plan,
            *(input, residual, output, None, weight, bias, None, None),
            Tracked(running_mean, running_var, None),
            *(None, 0.0, eps, activation, slope, 0.0, None, 0),
            statistics=GIVEN,
        )
    return output


def _launch_forward(
    plan: ChannelPlan,
    input: Tensor,
    residual: Tensor | None,
    output: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    tracked: Tracked,
    partials: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    p: float,
    rng_state: Tensor | None,
    element_offset: int,
    statistics: tl.constexpr,
) -> None:
    state_ptr, seed, offset = state_arguments(rng_state if p > 0.0 else None)
    run = math.gcd(plan.run, element_offset)  # what the offset leaves of a run in one mask group
    forward_kernel[(plan.programs,)](
        *(input, residual, output, gate, weight, bias, mean, invstd),
        *(*tracked, partials, state_ptr),
        *(*plan.sizes, 0.0 if momentum is None else momentum, eps, slope, p, seed, offset),
        element_offset,
        STATISTICS=statistics.value,
        AVERAGES=momentum is None,
        SINGLE=plan.single,
        BLOCK_S=next_power_of_2(plan.splits) if partials is not None else 1,
        CHAIN=Chain(activation, p > 0.0, plan.gate_axis, run),
        TILES=plan.blocks,
        num_warps=plan.warps,
    )


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gate: Tensor | None,
    rng_state: Tensor | None,
    element_offset: int,
    training: bool,
    activation: int,
    slope: float,
    p: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_residual: bool,
    sums: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of either: (grad_input, grad_weight, grad_bias, grad_residual). In training
    `sums` of all ranks, as of `batch_norm_sums`, take the place of this batch's."""

    def parameter(values: Tensor | None) -> Tensor:
        dtype = input.dtype if values is None else values.dtype
        make = input.new_empty if input.numel() else input.new_zeros  # a sum over nothing
        return make(input.shape[1] if wants_parameters else 0, dtype=dtype)

    results = (
        dense_like(input) if wants_input else input.new_empty(0),
        parameter(weight),
        parameter(bias),
        dense_like(input) if wants_residual else input.new_empty(0),
    )
    if input.numel() == 0 or not (wants_input or wants_parameters or wants_residual):
        return results
    grad_input = results[0] if wants_input else None
    grad_parameters = results[1:3] if wants_parameters else (None, None)
    grad_residual = results[3] if wants_residual else None
    _launch_backward(
        *(grad_output, input, weight, bias, residual, mean, invstd, gate),
        *(training, activation, slope, p),
        *(grad_input, *grad_parameters, grad_residual, sums),
    )
    return results


def batch_norm_sums(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gate: Tensor | None,
    activation: int,
    slope: float,
    p: float,
) -> Tensor:
    """The sums of d and of d xhat of each channel, and the number of values: float64 [2 C + 1]."""
    channels = input.shape[1]
    sums = input.new_empty(2 * channels + 1, dtype=torch.float64)
    if input.numel() == 0:
        return sums.zero_()
    sums[2 * channels :].fill_(input.numel() // channels)
    _launch_backward(
        *(grad_output, input, weight, bias, residual, mean, invstd, gate),
        *(True, activation, slope, p, None, sums[channels:], sums, None, None),
    )
    return sums


def _launch_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gate: Tensor | None,
    training: bool,
    activation: int,
    slope: float,
    p: float,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_residual: Tensor | None,
    of_ranks: Tensor | None,
) -> None:
    """Writes the gradients that are given, of an input that has elements."""
    grad_parameters = (grad_weight, grad_bias)
    by_ranks = of_ranks is not None and training and grad_input is not None
    through_statistics = grad_input is not None and training
    summed = grad_weight is not None or (through_statistics and not by_ranks)
    needs_z = needs_preactivation(activation, gate is not None, p)
    plan = _plan(input, BACKWARD_TILE if summed else MAP_TILE, merges=summed)
    tensors = (
        grad_output,
        input if summed or by_ranks or needs_z else None,
        residual if needs_z else None,
        gate,
        weight,
        bias,
        mean,
        invstd,
    )
    constants = {
        "TRAINING": training,
        "NEEDS_Z": needs_z,
        "CHAIN": Chain(activation, p > 0.0, plan.gate_axis),
        "TILES": plan.blocks,
        "num_warps": plan.warps,
    }
    programs, partials = plan.programs, None
    with device_of(input):
        # Gradients that do not wait for the sums are written as these are taken.
        early = summed and not through_statistics and not plan.single
        if early or (summed and plan.splits > 1):
            partials = _workspace(input, plan)
            gradient_sums_kernel[(programs,)](
                *tensors,
                *((grad_input, grad_residual) if early else (None, None)),
                *(partials, *plan.sizes, slope, p),
                **constants,
            )
            if early:
                grad_input = grad_residual = None
                programs //= plan.splits
        sums = MERGED if partials is not None else OWN if summed else GIVEN
        if by_ranks:
            sums, partials = OF_RANKS, of_ranks
        backward_kernel[(programs,)](
            *tensors,
            *(grad_input, grad_residual, *grad_parameters),
            *(partials, *plan.sizes, slope, p),
            SUMS=sums.value,
            SINGLE=plan.single and sums is not MERGED,
            BLOCK_S=next_power_of_2(plan.splits) if sums is MERGED else 1,
            **constants,
        )
