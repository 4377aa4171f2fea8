"""Knowledge distillation in plain PyTorch: alpha T^2 KL(teacher || student) + (1 - alpha) CE.

Shapes: input, the student's logits, and teacher (N, C, ...); labels and losses (N, ...). Computed
in float32, or in float64 where the input is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cross_entropy import MEAN, NONE, cross_entropy, cross_entropy_backward


def distillation(
    input: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
    temperature: float,
    alpha: float,
    traced_softness: Tensor | None,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; of each position the largest logit of the student and the sum of exp(logit -
    largest), that of exp((logit - largest) / T), and both of the latter kind of the teacher,
    (5, N, ...); and the gradient of the loss by the input, or nothing, (0,).

    A position whose label is ignored has no cross-entropy, but its divergence counts. Without a
    target there is only that. A `traced_softness`, (2,) float64, counts instead of the floats
    `temperature` and `alpha`.
    """
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    t = teacher.to(x.dtype)
    soft = (temperature, alpha, traced_softness)
    T, of_divergence, _, share = _factors(*soft, x.dtype)
    of_target: Any = (target, partner, lam, one_lam)
    options: Any = (weight, ignore_index, label_smoothing, reduction, traced_smoothing)
    log_q, log_p = (x / T).log_softmax(1), (t / T).log_softmax(1)
    p = log_p.exp()
    divergence = (torch.xlogy(p, p) - p * log_q).sum(1)
    if reduction != NONE:
        positions = divergence.numel()
        divergence = divergence.sum()
        if reduction == MEAN:
            divergence = divergence / positions
    loss = of_divergence * divergence
    if target is not None:
        loss = loss + share * cross_entropy(x, *(*of_target, *options, False))[0]
    largest, largest_t = x.amax(1), t.amax(1)
    above, above_t = x - largest.unsqueeze(1), t - largest_t.unsqueeze(1)
    sums = [(z.exp()).sum(1) for z in (above, above / T, above_t / T)]
    stats = torch.stack((largest, sums[0], sums[1], largest_t, sums[2]))
    gradient = input.new_empty(0)
    if keep_gradient:
        one = torch.ones_like(loss)
        given: Any = (*of_target, *options, *soft)
        gradient = distillation_backward(one, input, stats, teacher, *given)
    return loss, stats, gradient


def distillation_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
    temperature: float,
    alpha: float,
    traced_softness: Tensor | None,
) -> Tensor:
    """grad_output, (N, ...) or of no dimensions, times the gradient by the input. Differentiable by
    grad_output and input."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    grad = grad_output.to(x.dtype)
    T, _, slope, of_labels = _factors(temperature, alpha, traced_softness, x.dtype)
    q = (x / T).softmax(1)
    p = (teacher.to(x.dtype) / T).softmax(1)
    share = grad / q[:, 0].numel() if reduction == MEAN else grad
    if reduction == NONE:
        share = share.unsqueeze(1)
    gradient = slope * share * (q - p)
    if target is not None:
        of_target: Any = (target, partner, lam, one_lam)
        options: Any = (weight, ignore_index, label_smoothing, reduction, traced_smoothing)
        by_labels = cross_entropy_backward(grad, x, stats[:2], *of_target, *options)
        gradient = gradient + of_labels * by_labels
    return gradient.to(input.dtype)


def _factors(
    temperature: float | Tensor,
    alpha: float | Tensor,
    traced_softness: Tensor | None,
    dtype: torch.dtype,
) -> list[Any]:
    """T, alpha T^2, alpha T and 1 - alpha: numbers, or tensors of the type that is computed in."""
    if traced_softness is not None:
        temperature, alpha = traced_softness.unbind()
    factors: list[Any] = [temperature, alpha * temperature**2, alpha * temperature, 1 - alpha]
    return factors if traced_softness is None else [each.to(dtype) for each in factors]
