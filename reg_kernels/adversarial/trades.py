"""TRADES: accuracy on clean inputs, and the same answers near them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _part
from .. import functional as F
from .._numbers import number, refuse
from ._ball import Ball, Channels, check_callable, check_count, check_input, checked_step
from ._trace import check_initialised, leaving_no_trace
from .attacks import Target, check_target, checked_logits, climbed

_START = 1e-3  # the deviation of the normal noise that the attack starts from


def trades_loss(
    model: Callable[[Tensor], Tensor],
    x_natural: Tensor,
    y: Target,
    optimizer: Any = None,
    step_size: Tensor | float = 0.003,
    epsilon: Tensor | float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str | float = "l_inf",
    *,
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    mean: Channels = None,
    std: Channels = None,
    dropout: bool = True,
    preserve_rng_state: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Returns :math:`\mathrm{CE}(f(x), y) + \beta\,\mathrm{KL}(p(x) \Vert p(x'))`, with the
    :math:`x'` in the ball around :math:`x` at which an attack finds that divergence largest.

    Both terms are means over the batch, whatever its length, and both :math:`p(x)` and
    :math:`p(x')` get a gradient. The attack starts from x with normal noise of 0.001 and leaves no
    trace in the model, as `PGD` says; p(x) is computed once for all of its steps.

    Args:
        model: a module or a function that gives logits (N, C) or (N, C, ...) of a batch.
        x_natural: the batch (N, ...) of floats.
        y: class indices (N, ...), class probabilities or a `MixedTarget`.
        optimizer: not needed: the attack gives parameters no gradient that would have to be set to
            zero. It stands here for code that passes one.
        step_size, epsilon, perturb_steps: of the attack; the first two as for `PGD`.
        beta: the divergence's weight, at least 0.
        distance: "l_inf", "l_2" or "l_1", also without the _.
        lower, upper: what inputs are brought into; None for no bound.
        mean, std: of each channel, where inputs are (v - mean) / std of pixels v. epsilon,
            step_size, lower and upper are then in terms of pixels.
        dropout, preserve_rng_state: of the attack, as for `PGD`.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        The loss, of no dimensions.

    Raises:
        ValueError, TypeError, RuntimeError: as `PGD` does.

    Source: H. Zhang et al., "Theoretically principled trade-off between robustness and accuracy",
    2019.
    """
    name = "trades_loss"
    check_callable(name, "model", model)
    check_input(name, x_natural, "x_natural")
    check_target(name, y, x_natural, "y")
    check_initialised(name, model)
    steps = check_count(name, "perturb_steps", perturb_steps)
    step_size = checked_step(name, step_size)
    beta = number(name, "beta", beta)
    if not beta >= 0:
        refuse(name, "beta", "at least 0", beta, ValueError)
    ball = Ball(epsilon, distance, lower, upper, mean, std, backend)
    ball = ball.checked(name, "epsilon", "distance")

    def logits_of(x: Tensor) -> Tensor:
        return checked_logits(name, model(x), x)

    with _part.of_model(model, len(x_natural)):
        with leaving_no_trace(model, x_natural.device, dropout, preserve_rng_state):
            clean = x_natural.detach()
            with torch.no_grad():
                expected = logits_of(clean)
                start = F.gaussian_noise(clean.clone(), _START, inplace=True, backend=backend)
                adv = ball.bring_in_(start, clean)
            options: dict[str, Any] = {"temperature": 1.0, "alpha": 1.0, "backend": backend}
            adv = climbed(
                *(name, adv, clean, steps, step_size, ball),
                lambda x: F.distillation_loss(logits_of(x), expected, reduction="sum", **options),
            )
        logits, near = logits_of(x_natural), logits_of(adv)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p, q = (x.to(dtype).log_softmax(1) for x in (logits, near))
    divergence = (p.exp() * (p - q)).sum(1).mean()
    return F.cross_entropy(logits, y, backend=backend) + beta * divergence
