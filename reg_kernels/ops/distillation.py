"""Knowledge distillation: a teacher's logits beside the labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .._layout import with_strides
from .._mixed_target import MixedTarget
from .._numbers import number, traced_numbers, varies
from ..reference import distillation as reference
from ._loss import (
    TARGET,
    check_logits,
    checked_call,
    register_loss,
    run,
)

_OPS = register_loss(
    "distillation",
    # As traced_smoothing, but temperature and alpha.
    f"Tensor teacher, Tensor? {TARGET}, float temperature, float alpha, Tensor? traced_softness",
    stats=5,
    reference=reference.distillation,
    by_torch=reference.distillation_backward,
)


def checked_softness(name: str, temperature: Any, alpha: Any) -> tuple[float, float]:
    """The two as floats; raises unless they are such as a loss can be made of."""
    temperature = number(name, "temperature", temperature)
    alpha = number(name, "alpha", alpha)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{name}: alpha must be in [0, 1], got {alpha}")
    return temperature, alpha


def distillation_loss(
    input: Tensor,
    teacher: Tensor,
    target: Tensor | MixedTarget | None = None,
    weight: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""A student's loss by its teacher and its labels, one read of both logits and one write of the
    gradient: :math:`\alpha T^2\,\mathrm{KL}(p \Vert q) + (1 - \alpha)\,\mathrm{CE}`, where
    :math:`p = \mathrm{softmax}(\mathrm{teacher} / T)` and
    :math:`q = \mathrm{softmax}(\mathrm{input} / T)`.

    Args:
        input: the student's logits, (N, C, ...) or (C,); float64, float32, float16 or bfloat16.
        teacher: the teacher's, of the same shape and any of these types; no gradient goes there.
        target: class indices (N, ...), or a `reg_kernels.augment.MixedTarget`, as of
            `cross_entropy`; or None, where `alpha` is 1: then the divergence is all there is.
        weight, ignore_index, label_smoothing: of the cross-entropy, as there. A label that is
            ignored leaves its position's divergence as it is.
        temperature: T, positive.
        alpha: the share of the divergence, in [0, 1].
        reduction: "none", "mean" or "sum"; the divergence's mean is over all positions, KLDivLoss's
            "batchmean" for (N, C).
        backend: "native", "triton" or "reference"; by default the first that can run here.

    Returns:
        The loss, of no dimensions or (N, ...), in the input's dtype, under autocast in float32.

    Raises:
        ValueError: `temperature` or `alpha` out of range, and as `cross_entropy`.
        RuntimeError: a teacher of another shape or device, and as `cross_entropy`.
        TypeError: no target where `alpha` is less than 1, and as `cross_entropy`.
        IndexError: as `cross_entropy`.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015.
    """
    if has_torch_function((input, teacher, weight)):
        return handle_torch_function(
            distillation_loss,
            (input, teacher, weight),
            input,
            teacher,
            target,
            weight=weight,
            temperature=temperature,
            alpha=alpha,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )
    name = "distillation_loss"
    temperature, alpha = checked_softness(name, temperature, alpha)
    if target is None and alpha != 1.0:
        raise TypeError(f"{name}: target must be given unless alpha is 1, got alpha {alpha}")
    if isinstance(target, Tensor) and target.is_floating_point():
        raise RuntimeError(
            f"{name}: target must be int64 class indices or a MixedTarget, got {target.dtype}"
        )
    call = checked_call(
        *(name, input, target, weight, ignore_index, reduction, label_smoothing),
        needs_target=False,
    )
    check_logits(name, "teacher", teacher)
    if teacher.shape != input.shape:
        raise RuntimeError(
            f"{name}: teacher must have the input's shape, {tuple(input.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    if teacher.device != input.device:
        raise RuntimeError(
            f"{name}: teacher must be on the input's device, {input.device}, got {teacher.device}"
        )
    teacher = teacher.detach() if call.batched else teacher.detach().unsqueeze(0)
    if torch.float64 in (teacher.dtype, call.input.dtype):
        teacher = teacher.to(torch.promote_types(call.input.dtype, torch.float32))
    # The kernels walk both in one order.
    teacher = with_strides(teacher.resolve_neg(), call.input.stride())
    last: tuple[Any, ...] = (temperature, alpha, None)
    if varies(temperature) or varies(alpha):
        last = (1.0, 0.0, traced_numbers(call.input.device, temperature, alpha))
    return run(_OPS, name, call, (teacher,), last, backend, reference.distillation)
