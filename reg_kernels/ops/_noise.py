"""What the ops that add noise share: checks and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._layout import is_dense
from ..reference import gaussian_noise as gaussian
from ..reference import uniform_noise as uniform
from ..reference._elementwise import stored
from ._checks import Entry, check_flag, check_tensor, number, refuse
from ._draw import DRAWN, Draw, draw
from ._modes import watcher
from ._route import Linear, filled


def check_elements(entry: Entry, a: Any, in_place: bool) -> None:
    """What an op's entry asks of an input of any shape, and of what is drawn."""
    if in_place and not is_dense(a.input):
        entry.refuse("input", "dense, since it is written into", a.input)
    entry.check_drawn(a)
    if a.input.dtype != torch.uint8:
        entry.check_floats(a.input, "input")
    entry.check_memory(a.input, "input")


class Noise(Linear):
    """An op x + width n, or x + width n x, of noise n that has its own draw for each element.

    The gradient of the first is grad_output, for which nothing is kept, that of the second the op
    of it.
    """

    def __init__(self, name: str, width: str, reference: Callable[..., Tensor]) -> None:
        def check(op: str, a: Any, in_place: bool) -> None:
            entry = Entry(op, a.input)
            if not 0.0 <= getattr(a, width) < math.inf:
                entry.refuse(width, "finite and at least 0", getattr(a, width))
            check_elements(entry, a, in_place)

        def by_torch(
            overload: Any, input: Tensor, value: float, relative: bool, *drawn: Any
        ) -> Tensor:
            noise = overload(filled(input, 0.0), value, False, *drawn)
            x = input.to(noise.dtype)
            return stored(x + (noise * x if relative else noise), input.dtype)

        super().__init__(
            name,
            f"float {width}, bool multiplicative, {DRAWN}",
            reference=reference,
            triton=name,
            check=check,
            keeps=("rng_state", "traced_p"),
            drops=False,
            takes_bytes=True,
            adds_alone=lambda arguments: not arguments[1],
            by_torch=by_torch,
        )
        self.name, self.width = name, width

    def apply(
        self, input: Tensor, how: Draw, training: bool, inplace: bool, multiplicative: bool
    ) -> Tensor:
        """The public function, behind what overrides it."""
        width = non_negative(self.name, self.width, how.number)
        check_tensor(self.name, "input", input)
        check_flag(self.name, "multiplicative", multiplicative)
        if not training or width == 0.0:
            return input
        how = how._replace(number=width)
        return draw(self, watcher(), input, *how, inplace, (multiplicative,))


GAUSSIAN = Noise("gaussian_noise", "std", gaussian.gaussian_noise)
UNIFORM = Noise("uniform_noise", "amplitude", uniform.uniform_noise)


def non_negative(op: str, argument: str, value: Any) -> float:
    """`value` as a float; raises unless it is finite and at least 0."""
    value = number(op, argument, value)
    if not 0.0 <= value < math.inf:
        refuse(op, argument, "finite and at least 0", value, ValueError)
    return value
