"""The ball around a batch: what an attack is told of it, and points in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _part, backends
from .. import functional as F
from .._layout import mixes_samples
from .._numbers import refuse
from ..ops._checks import check_batch, check_dtype
from ..ops._modes import watcher
from ..ops.adversarial_step import (
    channel_rows,
    checked_bounds,
    checked_norm,
    checked_size,
    of_samples,
)

Channels = Tensor | Sequence[float] | float | None


class Ball(NamedTuple):
    """What `functional.adversarial_step_` takes beside a step, by its names there."""

    eps: Tensor | float
    norm: str | float
    lower: float | None
    upper: float | None
    mean: Channels
    std: Channels
    backend: str | None

    def checked(self, name: str, eps: str = "eps", norm: str = "norm") -> Ball:
        """This one, if it is one, with its norm by its word; `eps` and `norm` are what `name` calls
        them."""
        checked_bounds(name, self.lower, self.upper)
        if self.backend is not None:
            backends.check_name(self.backend, "backend")
        radius = checked_radius(name, eps, self.eps)
        return self._replace(eps=radius, norm=checked_norm(name, self.norm, norm))

    def step_(self, adv: Tensor, grad: Tensor, clean: Tensor, step_size: Tensor | float) -> Tensor:
        """One step, in place."""
        return F.adversarial_step_(adv, grad, clean, step_size, **self._asdict())

    def bring_in_(self, adv: Tensor, clean: Tensor) -> Tensor:
        """adv in the ball and in the bounds: what a step of no length makes of it, in place."""
        return self.step_(adv, clean, clean, 0.0)

    def drawn(self, name: str, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """A new batch, each sample uniform in its ball, then brought into the bounds."""
        of_samples(name, "eps", self.eps, clean, watcher())  # before anything is drawn
        dtype = torch.promote_types(clean.dtype, torch.float32)
        x = torch.zeros_like(clean, dtype=dtype)
        if mixes_samples(x):
            x = x.contiguous()
        shape = (-1, *[1] * (clean.dim() - 1))
        count = clean.shape[1:].numel()

        def drawn(zeros: Tensor, by: Callable[..., Tensor]) -> Tensor:
            """Uniform from -1 to 1, or normal: by ops, which know this rank's part of a batch."""
            options: dict[str, Any] = {"backend": self.backend}
            if generator is not None:
                state = torch.empty(2, dtype=torch.int64, device=generator.device)
                part = _part.current() if _part.used else None
                options["rng_state"] = state.random_(generator=generator)
                if part is not None and zeros.numel():
                    options["element_offset"] = part.offset(name, zeros.shape)
            return by(zeros, 1.0, inplace=True, **options)

        def shares(zeros: Tensor) -> Tensor:
            """Uniform in (0, 1), float64: numbers of 32 bits, and half of the last one."""
            return drawn(zeros.double(), F.uniform_noise) / 2 + (0.5 + 2.0**-33)

        each = x.new_zeros(len(clean))
        if self.norm == "linf":
            way = drawn(x, F.uniform_noise)
        elif self.norm == "l2":
            # A direction, and a radius whose power d is uniform.
            way = drawn(x, F.gaussian_noise)
            lengths = torch.linalg.vector_norm(way.reshape(len(way), count), dim=1).view(shape)
            radii = shares(each).pow(1 / max(count, 1)).view(shape)
            way = (way / lengths.clamp(min=1e-30) * radii).to(dtype)
        else:
            # d + 1 exponentials over their sum are uniform on the simplex, and d of them below it.
            sizes = -shares(x).log()
            total = sizes.reshape(len(x), count).sum(1).view(shape) - shares(each).log().view(shape)
            way = (torch.where(drawn(x, F.uniform_noise) < 0, -sizes, sizes) / total).to(dtype)
        eps = self.eps
        if isinstance(eps, Tensor) and eps.dim():
            eps = eps.view(shape)
        way = way * eps
        bounds = checked_bounds(name, self.lower, self.upper)
        rows = channel_rows(name, x, self.mean, self.std, *bounds)
        if rows is not None:
            way = way * rows[1].view(-1, *[1] * (clean.dim() - 2))
        return self.bring_in_((clean + way).to(clean.dtype), clean)


def checked_radius(name: str, argument: str, value: Any) -> Tensor | float:
    """What each step checks, where it is a tensor."""
    return value.detach() if isinstance(value, Tensor) else checked_size(name, argument, value)


def checked_step(name: str, value: Any) -> Tensor | float:
    """Likewise; uphill, whether an attack is targeted or not."""
    size = checked_radius(name, "step_size", value)
    if not isinstance(size, Tensor) and size == math.inf:
        refuse(name, "step_size", "finite", size, ValueError)
    return size


def check_input(name: str, input: Any, argument: str = "input") -> None:
    check_batch(name, argument, input)
    check_dtype(name, argument, input.dtype)


def check_count(name: str, argument: str, value: Any) -> int:
    if type(value) is not int:
        refuse(name, argument, "an integer", type(value).__name__, TypeError)
    if value < 1:
        refuse(name, argument, "at least 1", value, ValueError)
    return value


def check_callable(name: str, argument: str, value: Any) -> None:
    if not callable(value):
        refuse(name, argument, "a module or a function", type(value).__name__, TypeError)
