"""Knowledge distillation: a teacher's logits beside the labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .._dtypes import computed_in, named
from .._layout import with_strides
from .._mixed_target import MixedTarget
from .._numbers import number, traced_numbers, varies
from ..reference import distillation as reference
from ._checks import check_device, described, hand_over, has_layout_of, probability, refuse
from ._loss import TARGET, register_loss, run
from ._loss_checks import check_entry, check_logits, checked_call


def _check(op: str, a: Any, of_backward: bool) -> None:
    entry = check_entry(op, a, 5, of_backward)
    if a.traced_softness is not None:
        entry.check_vector(a.traced_softness, torch.float64, 2, "traced_softness")
    if a.target is not None and a.target.dtype != torch.int64:
        entry.refuse("target", "int64 labels", "probabilities")
    teacher = a.teacher
    entry.check_floats(teacher, "teacher")
    both = (teacher.dtype == torch.float64) == (a.input.dtype == torch.float64)
    if not both or not has_layout_of(a.input, teacher):
        must = "of the input's shape and strides, and float64 if that is: " + described(a.input)
        entry.refuse("teacher", must, teacher)
    entry.check_memory(teacher, "teacher")


_OP = register_loss(
    "distillation",
    # As traced_smoothing, but temperature and alpha.
    f"Tensor teacher, Tensor? {TARGET}, float temperature, float alpha, Tensor? traced_softness",
    stats=5,
    reference=reference.distillation,
    by_torch=reference.distillation_backward,
    check=_check,
)


def checked_softness(name: str, temperature: Any, alpha: Any) -> tuple[float, float]:
    """The two as floats; raises unless they are such as a loss can be made of."""
    temperature = number(name, "temperature", temperature)
    alpha = number(name, "alpha", alpha)
    if not 0.0 < temperature < math.inf:
        refuse(name, "temperature", "positive and finite", temperature, ValueError)
    return temperature, probability(name, "alpha", alpha)


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
    r"""Computes a student's loss by its teacher and its labels, with one read of both logits and
    one write of the gradient.

    The loss is :math:`\alpha T^2\,\mathrm{KL}(p \Vert q) + (1 - \alpha)\,\mathrm{CE}`, with
    :math:`p = \mathrm{softmax}(\mathrm{teacher} / T)` and :math:`q =
    \mathrm{softmax}(\mathrm{input} / T)`.

    Args:
        input: the student's logits, (N, C, ...) or (C,); float64, float32, float16 or bfloat16.
        teacher: the teacher's logits, of the same shape and any of these dtypes. It gets no
            gradient.
        target: class indices (N, ...) or a `reg_kernels.augment.MixedTarget`, as in
            `cross_entropy`. With an `alpha` of 1 it may be None: the divergence is then the whole
            loss.
        weight: the weight of each class in the cross-entropy, (C,).
        temperature: T, positive.
        alpha: the share of the divergence, in [0, 1].
        ignore_index: a label that has no cross-entropy. The divergence of its position still
            counts.
        reduction: "none", "mean" or "sum". The divergence's mean is over all positions, as
            KLDivLoss's "batchmean" is for (N, C).
        label_smoothing: the smoothing of the cross-entropy, in [0, 1]. A MixedTarget may bring its
            own.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        The loss, of no dimensions or (N, ...), in the input's dtype, and in float32 under autocast.

    Raises:
        ValueError: `temperature` or `alpha` is out of range, and what else `cross_entropy` raises
            it for.
        RuntimeError: the teacher has another shape or device, and what else `cross_entropy` raises
            it for.
        TypeError: there is no target and `alpha` is less than 1, or an argument is no tensor.
        IndexError: as in `cross_entropy`.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015.
    """
    if has_torch_function((input, teacher, weight)):
        return hand_over(distillation_loss, locals(), "input", "teacher", "weight", by_place=3)
    name = "distillation_loss"
    temperature, alpha = checked_softness(name, temperature, alpha)
    if target is None and alpha != 1.0:
        raise TypeError(f"{name}: target must be given unless alpha is 1, got alpha {alpha}")
    if isinstance(target, Tensor) and target.is_floating_point():
        refuse(name, "target", "int64 class indices or a MixedTarget", named(target.dtype))
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
    check_device(name, "teacher", teacher, input)
    teacher = teacher.detach() if call.batched else teacher.detach().unsqueeze(0)
    if torch.float64 in (teacher.dtype, call.input.dtype):
        teacher = teacher.to(computed_in(call.input.dtype))
    # The kernels walk both in one order.
    teacher = with_strides(teacher.resolve_neg(), call.input.stride())
    last: tuple[Any, ...] = (temperature, alpha, None)
    if varies(temperature) or varies(alpha):
        last = (1.0, 0.0, traced_numbers(call.input.device, temperature, alpha))
    return run(_OP, name, call, (teacher,), last, backend)
