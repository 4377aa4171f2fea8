"""The launchers of the losses: they plan the tiles, lay out the arguments and launch."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import dense_like, is_channels_last
from ._channels import Sizes, Tiles
from ._launch import ASSERTING, ceil_div, device_of, next_power_of_2, processors
from ._loss_kernels import loss_backward_kernel, loss_kernel
from ._softmax import Kind, TargetPointers, label_totals_kernel

NONE, MEAN = 0, 1  # torch's numbers of these reductions

# The most registers of a tile that holds all classes of its positions. A thread has few positions,
# since it holds a dozen numbers of each. Nothing spills: tests/triton_kernels/.
KEPT = 32768  # of one position
SMALL = 2048  # of several positions, where the classes lie side by side
PLANES = 4096  # where the positions lie side by side
POSITIONS = 4  # of a thread
LOOPED = 4096  # elements of a tile where the classes take several
SECTOR = 32  # the fewest bytes of positions side by side in a tile
LABELS = 4096  # labels that label_totals_kernel sums up at a time
LABEL_PROGRAMS = 128


class RowPlan(NamedTuple):
    """How many programs a launch has, and which tiles they take."""

    programs: int
    single: bool  # one tile holds all classes of its positions
    sizes: Sizes
    tiles: Tiles
    options: dict[str, Any]  # of the launch


def row_plan(x: Tensor, registers: int, loops: bool = False) -> RowPlan:
    """The tiles of logits (N, C, ...), contiguous or with the channels last.

    Args:
        registers: how many 32-bit registers an element of a tile takes in float32.
        loops: whether the kernel walks tile by tile even where one tile could hold all classes.
    """
    samples, classes = x.shape[:2]
    length = x.numel() // (samples * classes)
    classes_last = length == 1 or is_channels_last(x)
    registers *= max(1, x.element_size() // 4)
    looped = 2 * LOOPED // max(2, registers)
    kept = looped * registers if loops else KEPT
    return _row_plan(
        *(samples * length, classes, length, classes_last, x.element_size(), registers),
        # kept, small, looped:
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
        lanes = min(32, max(1, block_c // unit))  # threads that share a position
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
        sizes=Sizes(classes, count, length),
        tiles=Tiles(
            BLOCK_C=block_c,
            BLOCK_M=block_m,
            M_AXIS=0 if classes_last else 1,
            SHORT_ROWS=length < block_m,
            UNIT=math.gcd(unit, block_c if classes_last else block_m),
            WIDE=count > 2**31 - 2**16,
        ),
        options={"num_warps": max(1, min(16, warps)), **ASSERTING},
    )


class TargetCall(NamedTuple):
    """The arguments of an op that describe its target, in the order of its schema."""

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


class Teacher(NamedTuple):
    """The further arguments of an op of distillation, in the order of its schema."""

    logits: Tensor
    temperature: float
    alpha: float
    traced_softness: Tensor | None


def _kind(call: TargetCall) -> Kind:
    of_labels = call.target is None or not call.target.is_floating_point()
    return Kind(
        OF_LABELS=of_labels,
        PAIR=call.partner is not None,
        SPREADS=call.smooths or not of_labels,
        LAM_PER_SAMPLE=call.lam is not None and call.lam.numel() > 1,
    )


def _registers(call: TargetCall, kind: Kind, teacher: Teacher | None) -> int:
    """How many registers an element of a tile takes: it holds an exponential, and with some targets
    also what its class counts for, or with a teacher two exponentials at T."""
    weighs = call.weight is not None and kind.SPREADS
    return 4 if weighs or teacher is not None or not kind.OF_LABELS else 1


def _arguments(
    x: Tensor, sizes: Sizes, call: TargetCall, kind: Kind, teacher: Teacher | None
) -> tuple[Any, ...]:
    """The kernels' arguments from x_ptr to mean_of."""
    mean, labels = call.reduction == MEAN, call.target if kind.OF_LABELS else None
    totals = weight_sum = None
    if labels is not None and mean:
        totals = _label_totals(labels, call.partner, call.weight, call.ignore_index, sizes.C)
    if labels is not None and call.smooths and call.weight is not None:
        weight_sum = call.weight.sum(dtype=torch.float64)
    lam = call.lam if call.partner is not None else None
    target = TargetPointers(
        target=call.target,
        partner=call.partner,
        lam=lam,
        weight=call.weight,
        weight_sum=weight_sum,
        totals=totals,
        smoothing=call.traced_smoothing,
    )
    rule = 1.0 - call.label_smoothing, call.label_smoothing / sizes.C
    if teacher is None:
        logits, share = None, 1.0 / sizes.M if mean and labels is None else 1.0
        softness: tuple[Any, ...] = share, 0.0, 1.0, None, 1
    else:
        logits, temperature, alpha, traced_softness = teacher
        mean_of = sizes.M if mean else 1
        soft_share = alpha * temperature**2 / mean_of
        softness = 1.0 - alpha, soft_share, 1.0 / temperature, traced_softness, mean_of
    return x, logits, target, *sizes, call.ignore_index, call.one_lam, *rule, *softness


def _label_totals(
    labels: Tensor, partner: Tensor | None, weight: Tensor | None, ignore_index: int, classes: int
) -> Tensor:
    """The divisors of the means over labels and over partner labels: float64 [2] or [1]."""
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
    x: Tensor, call: TargetCall, keep_gradient: bool, teacher: Teacher | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, the Stats of each position, gradient); the last is empty unless it is kept."""
    kind = _kind(call)
    plan = row_plan(x, _registers(call, kind, teacher))
    positions, sums = (x.shape[0], *x.shape[2:]), call.reduction != NONE
    compute = torch.promote_types(x.dtype, torch.float32)
    if sums:
        loss = x.new_empty(plan.programs, dtype=torch.float64)
    else:
        loss = x.new_empty(positions, dtype=compute)
    gradient = dense_like(x) if keep_gradient else x.new_empty(0)
    stats = x.new_empty((2 if teacher is None else 5, *positions), dtype=compute)
    with device_of(x):
        loss_kernel[(plan.programs,)](
            *_arguments(x, plan.sizes, call, kind, teacher),
            *(loss, stats, gradient if keep_gradient else None),
            SUMS=sums,
            SINGLE=plan.single,
            KIND=kind,
            TILES=plan.tiles,
            **plan.options,
        )
    return loss.sum().to(compute) if sums else loss, stats, gradient


def launch_backward(
    grad_output: Tensor,
    x: Tensor,
    stats: Tensor,
    call: TargetCall,
    teacher: Teacher | None = None,
) -> Tensor:
    """The gradient with respect to x."""
    kind = _kind(call)
    plan = row_plan(x, _registers(call, kind, teacher), loops=True)
    gradient = dense_like(x)
    with device_of(x):
        loss_backward_kernel[(plan.programs,)](
            *(grad_output, *_arguments(x, plan.sizes, call, kind, teacher), stats, gradient),
            GRAD_PER_POSITION=grad_output.dim() > 0,
            KIND=kind,
            TILES=plan.tiles,
            **plan.options,
        )
    return gradient
