"""Knowledge distillation in plain PyTorch: alpha T^2 KL(teacher || student) + (1 - alpha) CE.

Shapes: input, the student's logits, and teacher (N, C, ...); labels and losses (N, ...). Computed
in float32, or in float64 where the input is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cross_entropy import MEAN, NONE, cross_entropy, cross_entropy_backward


def distillation(
    input: Tensor,
    teacher: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    temperature: float,
    alpha: float,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; of each position the largest logit of the student and the sum of exp(logit -
    largest), that of exp((logit - largest) / T), and both of the latter kind of the teacher,
    (5, N, ...); and the gradient of the loss by the input, or nothing, (0,).

    A position whose label is ignored has no cross-entropy, but its divergence counts.
    """
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    t = teacher.to(x.dtype)
    options = (target, partner, lam, one_lam, weight, ignore_index, label_smoothing, reduction)
    of_labels = cross_entropy(x, *options, False)[0]
    log_q, log_p = (x / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    p = log_p.exp()
    divergence = (torch.xlogy(p, p) - p * log_q).sum(1)
    if reduction == MEAN:
        divergence = divergence / divergence.numel()
    if reduction != NONE:
        divergence = divergence.sum()
    loss = alpha * temperature**2 * divergence + (1 - alpha) * of_labels
    largest, largest_t = x.amax(1), t.amax(1)
    above, above_t = x - largest.unsqueeze(1), t - largest_t.unsqueeze(1)
    sums = [(z.exp()).sum(1) for z in (above, above / temperature, above_t / temperature)]
    stats = torch.stack((largest, sums[0], sums[1], largest_t, sums[2]))
    gradient = input.new_empty(0)
    if keep_gradient:
        one = torch.ones_like(loss)
        gradient = distillation_backward(one, input, stats, teacher, *options, temperature, alpha)
    return loss, stats, gradient


def distillation_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    teacher: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    temperature: float,
    alpha: float,
) -> Tensor:
    """grad_output, (N, ...) or of no dimensions, times the gradient by the input. Differentiable by
    grad_output and input."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    grad = grad_output.to(x.dtype)
    options = (target, partner, lam, one_lam, weight, ignore_index, label_smoothing, reduction)
    of_labels = cross_entropy_backward(grad, x, stats[:2], *options)
    q = (x / temperature).softmax(1)
    p = (teacher.to(x.dtype) / temperature).softmax(1)
    share = grad / q[:, 0].numel() if reduction == MEAN else grad
    if reduction == NONE:
        share = share.unsqueeze(1)
    return (alpha * temperature * share * (q - p) + (1 - alpha) * of_labels).to(input.dtype)
