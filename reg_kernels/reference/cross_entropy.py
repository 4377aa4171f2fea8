"""Cross-entropy in plain PyTorch: of class indices, of pairs of them, of class probabilities.

Shapes: input (N, C, ...) of logits; labels and losses (N, ...); probabilities like the input;
weight (C,). Computed in float32, or in float64 where the input is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2  # reductions, torch's numbers


def cross_entropy(
    input: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; of each position the largest logit and the sum of exp(logit - largest), (2, N,
    ...); and the gradient of the loss by the input, or nothing, (0,).

    `target` holds class indices, or class probabilities in a floating-point type. With a `partner`
    the loss is lam CE(target) + (1 - lam) CE(partner), each of the two reduced on its own; `lam`
    (N,) or (1,), else the float `one_lam` counts, and so does `label_smoothing` but for a
    `traced_smoothing`, one float64.
    """
    x = _counted(input, target, partner, ignore_index)
    smoothing = label_smoothing if traced_smoothing is None else traced_smoothing.view(())
    log_p = x.log_softmax(1)
    loss = torch.zeros_like(log_p[:, 0])
    for labels, share in shares(target, partner, lam, one_lam, loss):
        of_labels, counted = losses(log_p, labels, weight, ignore_index, smoothing)
        loss = loss + share * (of_labels / total_of(counted) if reduction == MEAN else of_labels)
    every = input.to(x.dtype)
    largest = every.amax(1)
    stats = torch.stack((largest, (every - largest.unsqueeze(1)).exp().sum(1)))
    gradient = input.new_empty(0)
    if keep_gradient:
        one = loss.new_ones(()) if reduction != NONE else torch.ones_like(loss)
        of_target: Any = (target, partner, lam, one_lam)
        options: Any = (weight, ignore_index, label_smoothing, reduction, traced_smoothing)
        gradient = cross_entropy_backward(one, input, stats, *of_target, *options)
    if reduction != NONE:
        # A mean of nothing is NaN.
        loss = loss.sum() / 0 if reduction == MEAN and loss.numel() == 0 else loss.sum()
    return loss, stats, gradient


def cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    one_lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    traced_smoothing: Tensor | None,
) -> Tensor:
    """grad_output, (N, ...) or of no dimensions, times the gradient by the input: softmax times the
    mass of the targets, less the targets. Differentiable by grad_output and input."""
    p = _counted(input, target, partner, ignore_index).softmax(1)
    smoothing = label_smoothing if traced_smoothing is None else traced_smoothing.view(())
    gradient = torch.zeros_like(p)
    for labels, share in shares(target, partner, lam, one_lam, p[:, 0]):
        targets, counted = distributions(p, labels, weight, ignore_index, smoothing)
        share = share * grad_output.to(p.dtype)
        if reduction == MEAN:
            share = share / total_of(counted)
        if not labels.is_floating_point():  # what is ignored has none, also of a mean of nothing
            share = torch.where(labels != ignore_index, share, torch.zeros_like(share))
        share = share.unsqueeze(1)
        gradient = gradient + share * (p * targets.sum(1, keepdim=True) - targets)
    return gradient.to(input.dtype)


def _counted(input: Tensor, target: Tensor, partner: Tensor | None, ignore_index: int) -> Tensor:
    """The logits in the type that is computed in, and 0 where no label counts: what an ignored
    position holds, be it infinite or NaN, is in neither the loss nor the gradient."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    if target.is_floating_point():
        return x
    counts = target != ignore_index
    if partner is not None:
        counts = counts | (partner != ignore_index)
    return torch.where(counts.unsqueeze(1), x, torch.zeros_like(x))


def total_of(counted: Tensor) -> Tensor:
    """What a mean divides by. NaN where nothing weighs anything, since torch, too, divides 0 by it,
    even if smoothing adds something to that 0."""
    total = counted.sum()
    return torch.where(total == 0, torch.nan, total)


def shares(
    target: Tensor, partner: Tensor | None, lam: Tensor | None, one_lam: float, like: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The targets and what each counts for, as (N, ...) like `like` or to be broadcast over it."""
    if partner is None:
        return [(target, torch.ones_like(like))]
    if lam is None:
        lam = torch.full((1,), one_lam, dtype=torch.float64, device=like.device)
    lam = lam.double().view(-1, *[1] * (like.dim() - 1))
    return [(target, lam.to(like.dtype)), (partner, (1 - lam).to(like.dtype))]


def losses(
    log_p: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss of each position and what it counts for in a mean, both (N, ...)."""
    w = _class_weights(weight, log_p)
    smooth = label_smoothing / log_p.shape[1]
    if target.is_floating_point():
        targets = target.to(log_p.dtype) * (1 - label_smoothing) + smooth
        counted = torch.ones_like(log_p[:, 0])
        return -(w * targets * log_p).sum(1), counted
    valid = target != ignore_index
    label = torch.where(valid, target, 0).unsqueeze(1)
    of_label = w.expand_as(log_p).gather(1, label).squeeze(1)
    loss = -(1 - label_smoothing) * of_label * log_p.gather(1, label).squeeze(1)
    if isinstance(label_smoothing, Tensor) or label_smoothing > 0:
        loss = loss - smooth * (w * log_p).sum(1)
    nothing = torch.zeros_like(loss)
    return torch.where(valid, loss, nothing), torch.where(valid, of_label, nothing)


def distributions(
    p: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The targets as weights of all classes, (N, C, ...), and what each position counts for in a
    mean, (N, ...)."""
    w = _class_weights(weight, p)
    smooth = label_smoothing / p.shape[1]
    if target.is_floating_point():
        targets = target.to(p.dtype) * (1 - label_smoothing) + smooth
        return w * targets, torch.ones_like(p[:, 0])
    valid = (target != ignore_index).unsqueeze(1)
    label = torch.where(valid, target.unsqueeze(1), 0)
    targets = (torch.zeros_like(p) + smooth).scatter_add(
        1, label, torch.zeros_like(p[:, :1]) + (1 - label_smoothing)
    )
    targets = torch.where(valid, w * targets, torch.zeros_like(p))
    of_label = w.expand_as(p).gather(1, label)
    return targets, torch.where(valid, of_label, torch.zeros_like(of_label)).squeeze(1)


def _class_weights(weight: Tensor | None, like: Tensor) -> Tensor:
    """(1, C, 1...) to be broadcast over (N, C, ...)."""
    if weight is None:
        weight = like.new_ones(like.shape[1])
    return weight.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))
