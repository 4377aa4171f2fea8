"""Projected gradient descent, and the attack of one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _part
from .. import functional as F
from .._dtypes import named
from .._mixed_target import MixedTarget
from .._numbers import refuse
from ..ops._checks import check_flag, check_tensor
from ._ball import Ball, Channels, check_callable, check_count, check_input, checked_step
from ._trace import check_initialised, leaving_no_trace

Target = Tensor | MixedTarget
Loss = Callable[[Tensor, Any], Tensor]


def _cross_entropy(logits: Tensor, target: Target) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


class PGD:
    r"""Finds inputs near the given ones that a model is wrong about: `attack(input, target)`.

    From a start in the ball around the input it takes `steps` times a step of `step_size` up the
    loss, each followed by a projection back into the ball: `functional.adversarial_step_`. The
    result is a new batch without a gradient.

    The model is called as it is, in training or evaluation mode, and left as it was: its buffers,
    such as BatchNorm's running statistics, have their values again, its parameters get no gradient,
    and no flag `training` is changed. It may be compiled or in DistributedDataParallel, and an
    attack may run under autocast, no_grad or inference_mode, or while a CUDA graph is captured.

    Args:
        model: what gives logits (N, C, ...) of a batch: a module or a function. What modules a
            function calls is not known: their buffers are not put back.
        eps: the ball's radius, a number, or a tensor (N,) for each sample.
        step_size: likewise; positive, for a targeted attack too.
        steps: how many.
        norm: "linf", "l2" or "l1"; or its order, math.inf, 2 or 1.
        random_start: True starts uniformly distributed in the ball, False at the input.
        loss: what is maximised, loss(logits, target): one number for each sample, (N, ...), or,
            without restarts, their sum. None takes the cross-entropy.
        targeted: True steps down the loss instead: towards the given target.
        restarts: how many starts are tried. Each sample's result is that of the highest loss, or,
            targeted, the lowest.
        lower, upper: what inputs are brought into; None for no bound.
        mean, std: of each channel, where inputs are (v - mean) / std of pixels v. eps, step_size,
            lower and upper are then in terms of pixels.
        dropout: whether dropout, stochastic depth included, is as the model's mode has it. False
            turns it off during the attack: layers that drop, not calls of functions.
        preserve_rng_state: True leaves torch's generators as they were. By default they move on, so
            that each attack starts elsewhere. It cannot be had while a CUDA graph is captured.
        generator: what the start is drawn by; None takes torch's own.
        backend: of the steps: "native", "triton" or "reference"; None takes the first that can run.

    Calling it takes the input (N, ...) of floats and the target: class indices (N, ...), class
    probabilities or a `MixedTarget`; None takes what the model predicts for the input, which is
    the attack without labels, and cannot be targeted.

    Raises:
        ValueError: a number is out of range, a name unknown, the target's length is not the
            input's, or `loss` gives one number in all with restarts.
        TypeError: an argument is of the wrong type, or the model returns no tensor.
        RuntimeError: the model's output is no batch of logits or does not depend on the input, or
            what `functional.adversarial_step_` raises it for.

    Of a model that trains by `distributed.shard`, or inside of `distributed.batch`, each sample
    starts where it would in one process with the batch of all ranks. A rank without samples calls
    the model as often as the others do.

    Source: A. Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        eps: Tensor | float = 8 / 255,
        step_size: Tensor | float = 2 / 255,
        steps: int = 10,
        norm: str | float = "linf",
        random_start: bool = True,
        loss: Loss | None = None,
        targeted: bool = False,
        restarts: int = 1,
        *,
        lower: float | None = 0.0,
        upper: float | None = 1.0,
        mean: Channels = None,
        std: Channels = None,
        dropout: bool = True,
        preserve_rng_state: bool = False,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        check_callable(name, "model", model)
        flags = {"random_start": random_start, "targeted": targeted}
        flags |= {"dropout": dropout, "preserve_rng_state": preserve_rng_state}
        for argument, flag in flags.items():
            check_flag(name, argument, flag)
        if loss is not None:
            check_callable(name, "loss", loss)
        if not isinstance(generator, torch.Generator | None):
            must = "a torch.Generator or None"
            refuse(name, "generator", must, type(generator).__name__, TypeError)
        self.model = model
        self.ball = Ball(eps, norm, lower, upper, mean, std, backend).checked(name)
        self.step_size = checked_step(name, step_size)
        self.steps = check_count(name, "steps", steps)
        self.random_start = random_start
        self.loss = loss
        self.targeted = targeted
        self.restarts = check_count(name, "restarts", restarts)
        self.dropout = dropout
        self.preserve_rng_state = preserve_rng_state
        self.generator = generator

    def __call__(self, input: Tensor, target: Target | None = None) -> Tensor:
        name = type(self).__name__
        check_input(name, input)
        if target is None and self.targeted:
            raise TypeError(f"{name}: target must be given where the attack is targeted, got None")
        if target is not None:
            check_target(name, target, input)
        check_initialised(name, self.model)
        with (
            leaving_no_trace(self.model, input.device, self.dropout, self.preserve_rng_state),
            _part.of_model(self.model, len(input)) as part,
        ):
            clean = input.detach()
            clean = clean.clone() if clean.is_inference() else clean
            if len(clean) == 0 and part is None:
                return clean.clone()
            if target is None:
                with torch.no_grad():
                    target = self._output(clean).argmax(1)
            best = self._climbed(clean, target)
            if self.restarts > 1:
                most = self._losses(best, target)
                for _ in range(self.restarts - 1):
                    found = self._climbed(clean, target)
                    losses = self._losses(found, target)
                    better = losses < most if self.targeted else losses > most
                    most = torch.where(better, losses, most)
                    best = torch.where(better.view(-1, *[1] * (clean.dim() - 1)), found, best)
            return best

    def _climbed(self, clean: Tensor, target: Target) -> Tensor:
        """From one start."""
        name = type(self).__name__
        adv = clean.clone()
        if self.random_start:
            adv = self.ball.drawn(name, clean, self.generator)
        return climbed(
            name,
            *(adv, clean, self.steps, -self.step_size if self.targeted else self.step_size),
            *(self.ball, lambda adv: self._loss(adv, target)),
        )

    def _loss(self, adv: Tensor, target: Target) -> Tensor:
        output = self._output(adv)
        loss = _cross_entropy(output, target) if self.loss is None else self.loss(output, target)
        check_tensor(type(self).__name__, "loss", loss, "a function that returns a Tensor")
        return loss

    def _losses(self, adv: Tensor, target: Target) -> Tensor:
        """(N,)"""
        with torch.no_grad():
            loss = self._loss(adv, target).float()
        if loss.dim() == 0 or len(loss) != len(adv):
            must = f"of one number for each of the {len(adv)} samples where there are restarts"
            refuse(type(self).__name__, "loss", must, f"shape {tuple(loss.shape)}", ValueError)
        return loss.reshape(len(adv), loss.shape[1:].numel()).sum(1)

    def _output(self, x: Tensor) -> Tensor:
        return checked_logits(type(self).__name__, self.model(x), x, any=self.loss is not None)


class FGSM(PGD):
    r"""The fast gradient sign method: one step, of the ball's radius, from the input itself.

    With `random_start=True` and a `step_size` of 10/255 it is the attack of fast adversarial
    training.

    Args:
        model: as for `PGD`, and so is all else.
        eps: the ball's radius.
        step_size: None takes `eps`.
        norm: "linf", "l2" or "l1".
        random_start: True starts uniformly distributed in the ball.
        options: further arguments of `PGD`, by their names.

    Formula, shapes and errors are those of `PGD`.

    Source: I. Goodfellow et al., "Explaining and harnessing adversarial examples", 2015. From a
    random start: E. Wong et al., "Fast is better than free", 2020.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        eps: Tensor | float = 8 / 255,
        step_size: Tensor | float | None = None,
        norm: str | float = "linf",
        random_start: bool = False,
        **options: Any,
    ) -> None:
        if "steps" in options:
            raise TypeError("FGSM: steps must be left out, since it takes one; PGD takes several")
        step_size = eps if step_size is None else step_size
        super().__init__(model, eps, step_size, 1, norm, random_start, **options)


def climbed(
    name: str,
    adv: Tensor,
    clean: Tensor,
    steps: int,
    step_size: Tensor | float,
    ball: Ball,
    loss_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """adv after so many steps up a loss, in place; grad mode is on."""
    for _ in range(steps):
        adv.requires_grad_()
        loss = loss_of(adv).sum()
        grad = torch.autograd.grad(loss, adv, allow_unused=True)[0] if loss.requires_grad else None
        if grad is None:
            must = "such that autograd finds the way from its output to its input"
            refuse(name, "model", must, "an output without a gradient")
        ball.step_(adv, grad, clean, step_size)
    return adv.detach()


def checked_logits(name: str, output: Any, input: Tensor, any: bool = False) -> Tensor:
    """What the model gave, where it is a batch of logits; with `any` any tensor will do."""
    must = "a function that returns logits (N, C, ...)"
    check_tensor(name, "model", output, must)
    if not any and (
        output.dim() < 2 or len(output) != len(input) or not output.is_floating_point()
    ):
        refuse(name, "model", must, f"{named(output.dtype)} of shape {tuple(output.shape)}")
    return output


def check_target(name: str, target: Any, input: Tensor, argument: str = "target") -> None:
    labels = target.labels if isinstance(target, MixedTarget) else target
    check_tensor(name, argument, labels, "a Tensor or a MixedTarget")
    if labels.dim() == 0 or len(labels) != len(input):
        must = f"one for each of the {len(input)} samples"
        refuse(name, argument, must, f"shape {tuple(labels.shape)}", ValueError)
