"""Adversarial training at the price of plain training: each backward gives both gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._numbers import number
from ._ball import Ball, Channels, check_count, check_input, checked_step


class FreeAdversarial:
    r"""Replays each batch some times, and attacks it by the gradients that training makes anyway.

    `for adv in free(input):` gives `replays` times a batch (N, ...) that requires grad. The loop's
    body is a training step on it: its backward leaves the gradient by the parameters, for the
    optimizer, and that by the batch, for the attack's next step, which is
    `functional.adversarial_step_`. The perturbation goes on from batch to batch; a shorter last one
    takes its first samples'. Train for as many epochs fewer: each has `replays` steps a batch.

    Args:
        eps: the ball's radius.
        replays: how often each batch is trained on.
        step_size: of the attack; None takes `eps`.
        norm: "linf", "l2" or "l1"; or its order, math.inf, 2 or 1.
        lower, upper: what inputs are brought into; None for no bound.
        mean, std: of each channel, where inputs are (v - mean) / std of pixels v. eps, step_size,
            lower and upper are then in terms of pixels.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Raises:
        ValueError: a number is out of range, or a name unknown.
        TypeError: an argument is of the wrong type.
        RuntimeError: the loop's body ran no backward through the batch, or what
            `functional.adversarial_step_` raises it for.

    A GradScaler's scale counts for nothing, and what it overflows to moves nothing where it is NaN.

    Source: A. Shafahi et al., "Adversarial training for free!", 2019.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        replays: int = 8,
        step_size: float | None = None,
        norm: str | float = "linf",
        *,
        lower: float | None = 0.0,
        upper: float | None = 1.0,
        mean: Channels = None,
        std: Channels = None,
        backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        self.replays = check_count(name, "replays", replays)
        # Of no sample: a perturbation goes on from batch to batch.
        eps = number(name, "eps", eps)
        self.ball = Ball(eps, norm, lower, upper, mean, std, backend).checked(name)
        step_size = eps if step_size is None else number(name, "step_size", step_size)
        self.step_size = checked_step(name, step_size)
        self.perturbation: Tensor | None = None  # (N, ...), of the largest batch so far

    def __call__(self, input: Tensor) -> Iterator[Tensor]:
        """The batches to train on, one after the other."""
        check_input(type(self).__name__, input)
        return self._replay(input.detach())

    def _replay(self, clean: Tensor) -> Iterator[Tensor]:
        for _ in range(self.replays):
            with torch.no_grad():
                adv = clean.clone()
                way = self._perturbation(clean)
                if way is not None:
                    self.ball.bring_in_(adv.add_(way), clean)
            adv.requires_grad_()
            yield adv
            if adv.grad is None:
                raise RuntimeError(
                    "FreeAdversarial: a backward through the batch must have run when the next "
                    "one is asked for"
                )
            self.ball.step_(adv, adv.grad, clean, self.step_size)
            with torch.no_grad():
                self._keep(adv.detach() - clean)

    def _perturbation(self, clean: Tensor) -> Tensor | None:
        """Of as many samples; None where the kept one is of other inputs, or there is none."""
        kept = self.perturbation
        if kept is None or kept.shape[1:] != clean.shape[1:] or kept.device != clean.device:
            return None
        if len(kept) < len(clean):
            return None
        return kept[: len(clean)].to(clean.dtype)

    def _keep(self, way: Tensor) -> None:
        kept = self._perturbation(way)
        if kept is None or self.perturbation is None or self.perturbation.dtype != way.dtype:
            self.perturbation = way
        else:
            self.perturbation[: len(way)].copy_(way)
