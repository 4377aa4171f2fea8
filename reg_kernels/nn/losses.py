"""Losses of logits: torch's, with the fused ops inside, and distillation beside them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import backends
from .. import functional as F
from .._mixed_target import MixedTarget
from .._numbers import integer
from .._twins import twin_of
from ..ops._checks import check_reduction, probability
from ..ops.distillation import checked_softness
from ._leaf import buffer, call_in_graph

__all__ = ["CrossEntropyLoss", "DistillationLoss"]


@twin_of(torch.nn.CrossEntropyLoss)
class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` by `reg_kernels.functional.cross_entropy`. It also takes a
    `reg_kernels.augment.MixedTarget`.

    Args:
        weight: the weight of each class, (C,).
        size_average: deprecated, as in torch.
        ignore_index: a label that counts for nothing.
        reduce: deprecated, as in torch.
        reduction: "none", "mean" or "sum".
        label_smoothing: in [0, 1]. A MixedTarget may bring its own instead.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Call it as `loss(input, target)`: logits (N, C, ...) or (C,), and a target as in
    `functional.cross_entropy`.

    Raises:
        ValueError: `backend` is unknown. A call raises what `functional.cross_entropy` raises, of
            the other arguments, too.
    """

    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if backend is not None:
            self.backend = backends.check_name(backend, "backend")

    def forward(self, input: Tensor, target: Tensor | MixedTarget) -> Tensor:
        if has_torch_function_variadic(input, target):
            call = call_in_graph(self, input, target)
            if call is not None:
                return call
        return F.cross_entropy(
            *(input, target, buffer(self, "weight")),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )


class DistillationLoss(torch.nn.modules.loss._WeightedLoss):
    r"""A student's loss by its teacher's logits and the labels, by
    `reg_kernels.functional.distillation_loss`.

    The loss is :math:`\alpha T^2\,\mathrm{KL}(p \Vert q) + (1 - \alpha)\,\mathrm{CE}`.

    Args:
        temperature: T, positive.
        alpha: the share of the divergence, in [0, 1].
        weight: the weight of each class in the cross-entropy, (C,). It is a buffer, as in torch's
            losses.
        ignore_index: a label that has no cross-entropy.
        reduction: "none", "mean" or "sum".
        label_smoothing: the smoothing of the cross-entropy, in [0, 1]. A MixedTarget may bring its
            own.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Call it as `loss(input, teacher, target)`: the logits of the student and of the teacher, (N, C,
    ...) or (C,), and class indices or a `reg_kernels.augment.MixedTarget`. With an `alpha` of 1,
    `loss(input, teacher)` is enough.

    Raises:
        ValueError: an argument is out of its range. A call raises what
            `functional.distillation_loss` raises.

    Source: as for `functional.distillation_loss`.
    """

    backend: str | None = None

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 0.5,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        name = "DistillationLoss"
        temperature, alpha = checked_softness(name, temperature, alpha)
        check_reduction(name, reduction)
        label_smoothing = probability(name, "label_smoothing", label_smoothing)
        super().__init__(weight, reduction=reduction)
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = integer(name, "ignore_index", ignore_index)
        self.label_smoothing = label_smoothing
        if backend is not None:
            self.backend = backends.check_name(backend, "backend")

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )

    def forward(
        self, input: Tensor, teacher: Tensor, target: Tensor | MixedTarget | None = None
    ) -> Tensor:
        if has_torch_function_variadic(input, teacher, target):
            call = call_in_graph(self, input, teacher, target)
            if call is not None:
                return call
        return F.distillation_loss(
            *(input, teacher, target, buffer(self, "weight")),
            temperature=self.temperature,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )
