"""What the launchers of the losses share: tiles, what targets are to a kernel, results."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import dense_like, is_channels_last
from ._channels import Tiles
from ._launch import ASSERTING, ceil_div, device_of, next_power_of_2, processors
from ._softmax import Kind, label_totals_kernel

NONE, MEAN = 0, 1  # of the reductions, torch's numbers


# A tile that holds all classes of its positions has so many registers: where it holds only one,
# where the classes lie side by side, where the positions do. Of positions a thread has few, as it
# has to know a dozen numbers of each. Nothing spills: tests/triton/.
KEPT = 32768
SMALL = 2048
PLANES = 4096
POSITIONS = 4  # of a thread
LOOPED = 4096  # elements of a tile where the classes take several
SECTOR = 32  # bytes of positions side by side that a tile has at least
LABELS = 4096  # labels at a time, where they are summed up
LABEL_PROGRAMS = 128


class RowPlan(NamedTuple):
    """How many programs take which tiles."""

    programs: int
    single: bool  # one tile holds all classes of its positions
    arguments: dict[str, Any]  # sizes, and what every kernel is specialised for


def row_plan(x: Tensor, registers: int, loops: bool = False) -> RowPlan:
    """The tiles of logits (N, C, ...), contiguous or with the channels last.

    Args:
        registers: how many of 32 bits an element of a tile takes, in float32.
        loops: whether the kernel walks tiles of the classes in any case.
    """
    samples, classes = x.shape[:2]
    length = x.numel() // (samples * classes)
    classes_last = length == 1 or is_channels_last(x)
    registers *= max(1, x.element_size() // 4)
    looped = 2 * LOOPED // max(2, registers)
    kept = looped * registers if loops else KEPT
    return _row_plan(
        *(samples * length, classes, length, classes_last, x.element_size(), registers),
        *((kept, SMALL, looped) if classes_last else (min(kept, PLANES), PLANES, looped // 2)),
        processors(x),
    )


@functools.lru_cache(4096)
def _row_plan(
    count: int,
    classes: int,
    length: int,
    classes_last: bool,
    itemsize: int,
    registers: int,
    kept: int,
    small: int,
    looped: int,
    processors: int,
) -> RowPlan:
    most = next_power_of_2(count)
    block_c = next_power_of_2(classes)
    unit = math.gcd(classes if classes_last else length, 16 // itemsize)
    if classes_last:
        narrowest = 1
        lanes = min(32, max(1, block_c // unit))  # that share a position
    else:
        narrowest = min(SECTOR // itemsize, most)
        unit = math.gcd(unit, narrowest, POSITIONS)
        lanes = 1
    single = block_c * narrowest * registers <= kept
    if single:
        fits = small // (block_c * registers)
        block_m = min(max(narrowest, min(fits, POSITIONS * 4 * 32 // lanes)), most)
        while block_m > narrowest and ceil_div(count, block_m) < processors:
            block_m //= 2
        tile = block_c * block_m * registers
        warps = 4 if block_m > 1 else min(tile // 512, max(8, tile // 1024))
    else:
        block_m = min(2 * narrowest, most) if narrowest > 1 else 1
        block_c = max(1, looped // block_m)
        warps = 8 if classes_last else 4
    return RowPlan(
        programs=ceil_div(count, block_m),
        single=single,
        arguments={
            "C": classes,
            "M": count,
            "L": length,
            "TILES": Tiles(
                BLOCK_C=block_c,
                BLOCK_M=block_m,
                M_AXIS=0 if classes_last else 1,
                SHORT_ROWS=length < block_m,
                UNIT=math.gcd(unit, block_c if classes_last else block_m),
                WIDE=count > 2**31 - 2**16,
            ),
            "num_warps": max(1, min(16, warps)),
            **ASSERTING,
        },
    )


class TargetCall(NamedTuple):
    """What the ops are told of a target, in the order of their schemas."""

    target: Tensor | None
    partner: Tensor | None
    lam: Tensor | None
    one_lam: float
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: int
    traced_smoothing: Tensor | None

    @property
    def smooths(self) -> bool:
        return self.traced_smoothing is not None or self.label_smoothing > 0.0


def _target_arguments(x: Tensor, call: TargetCall) -> dict[str, Any]:
    """The kernels' arguments by what the ops are told of a target."""
    classes = x.shape[1]
    of_labels = call.target is None or not call.target.is_floating_point()
    labels = call.target if of_labels else None
    totals = weight_sum = None
    if labels is not None and call.reduction == MEAN:
        totals = _label_totals(labels, call.partner, call.weight, call.ignore_index, classes)
    if labels is not None and call.smooths and call.weight is not None:
        weight_sum = call.weight.sum(dtype=torch.float64)
    return {
        "target_ptr": call.target,
        "partner_ptr": call.partner,
        "lam_ptr": call.lam if call.partner is not None else None,
        "weight_ptr": call.weight,
        "weight_sum_ptr": weight_sum,
        "totals_ptr": totals,
        "ignore_index": call.ignore_index,
        "one_lam": call.one_lam,
        "hard": 1.0 - call.label_smoothing,
        "smooth": call.label_smoothing / classes,
        "traced_smoothing_ptr": call.traced_smoothing,
        "share": classes / x.numel() if call.reduction == MEAN and labels is None else 1.0,
        "KIND": Kind(
            OF_LABELS=of_labels,
            PAIR=call.partner is not None,
            SPREADS=call.smooths or not of_labels,
            LAM_PER_SAMPLE=call.lam is not None and call.lam.numel() > 1,
        ),
    }


def _label_totals(
    labels: Tensor, partner: Tensor | None, weight: Tensor | None, ignore_index: int, classes: int
) -> Tensor:
    """What means of the losses of labels, and of partner labels, divide by: float64 [2] or [1]."""
    programs = min(LABEL_PROGRAMS, ceil_div(labels.numel(), LABELS))
    pairs = 1 if partner is None else 2
    totals = torch.empty(pairs, programs, dtype=torch.float64, device=labels.device)
    label_totals_kernel[(programs,)](
        *(labels, partner, weight, totals, classes, labels.numel(), ignore_index),
        BLOCK=LABELS,
        num_warps=8,
        **ASSERTING,
    )
    return totals if programs == 1 else totals.sum(1)


def launch_forward(
    kernel: Any,
    x: Tensor,
    call: TargetCall,
    registers: int,
    stats: int,
    keep_gradient: bool,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, `stats` numbers of each position, the gradient or nothing) of a kernel that has `more`
    arguments."""
    plan = row_plan(x, registers)
    positions = (x.shape[0], *x.shape[2:])
    compute = torch.promote_types(x.dtype, torch.float32)
    if call.reduction == NONE:
        loss = x.new_empty(positions, dtype=compute)
    else:
        loss = x.new_empty(plan.programs, dtype=torch.float64)
    gradient = dense_like(x) if keep_gradient else x.new_empty(0)
    of_positions = x.new_empty((stats, *positions), dtype=compute)
    with device_of(x):
        kernel[(plan.programs,)](
            x_ptr=x,
            loss_ptr=loss,
            stats_ptr=of_positions,
            gradient_ptr=gradient if keep_gradient else None,
            SUMS=call.reduction != NONE,
            SINGLE=plan.single,
            **_target_arguments(x, call) | more,
            **plan.arguments,
        )
    if call.reduction != NONE:
        loss = loss.sum().to(compute)
    return loss, of_positions, gradient


def launch_backward(
    kernel: Any,
    grad_output: Tensor,
    x: Tensor,
    stats: Tensor,
    call: TargetCall,
    registers: int,
    **more: Any,
) -> Tensor:
    """The gradient by x."""
    plan = row_plan(x, registers, loops=True)
    gradient = dense_like(x)
    with device_of(x):
        kernel[(plan.programs,)](
            grad_output_ptr=grad_output,
            x_ptr=x,
            stats_ptr=stats,
            gradient_ptr=gradient,
            GRAD_PER_POSITION=grad_output.dim() > 0,
            **_target_arguments(x, call) | more,
            **plan.arguments,
        )
    return gradient
