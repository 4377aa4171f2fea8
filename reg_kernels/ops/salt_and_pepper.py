"""Impulse noise: schema, check, gradient, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from ..reference import salt_and_pepper as reference
from ..reference._elementwise import stored
from ._checks import Entry, check_tensor, hand_over, number, probability, refuse
from ._draw import DRAWN, Draw, draw
from ._modes import watcher
from ._noise import check_elements
from ._route import Linear, filled


def _check(op: str, a: Any, in_place: bool) -> None:
    entry = Entry(op, a.input)
    entry.check_probability(a.p)
    check_elements(entry, a, in_place)


def _adjoint(
    overload: Any, grad_output: Tensor, like: Any, strides: Any, p: float, *arguments: Any
) -> Tensor:
    share, _, _, *drawn = arguments
    return _OP.by_itself(overload, grad_output, like, strides, p, share, 0.0, 0.0, *drawn)


def _by_torch(
    overload: Any, input: Tensor, p: float, share: float, low: float, high: float, *drawn: Any
) -> Tensor:
    kept = overload(filled(input, 1.0), p, share, 0.0, 0.0, *drawn)
    impulses = overload(filled(input, 0.0), p, share, low, high, *drawn)
    return stored(torch.where(kept != 0, input.to(kept.dtype), impulses), input.dtype)


_OP = Linear(
    "salt_and_pepper",
    f"float p, float salt_vs_pepper, float low, float high, {DRAWN}",
    reference=reference.salt_and_pepper,
    triton="salt_and_pepper",
    check=_check,
    keeps=("rng_state", "traced_p"),
    drops=False,
    takes_bytes=True,
    adjoint=_adjoint,
    by_torch=_by_torch,
)


def salt_and_pepper(
    input: Tensor,
    p: float,
    training: bool = True,
    inplace: bool = False,
    *,
    salt_vs_pepper: float = 0.5,
    low: float = 0.0,
    high: float | None = None,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Replaces a share `p` of the elements, some by `high` and the others by `low`.

    With :math:`s` for `salt_vs_pepper`, an element becomes `high` with probability :math:`p s`,
    `low` with :math:`p (1 - s)`, and stays as it is else. The gradient is 0 where an element was
    replaced and that of the output elsewhere. Both shares are rounded to multiples of 1/65536.

    Args:
        input: a tensor of any shape; float64, float32, float16, bfloat16 or uint8.
        p: the share of elements that are replaced, in [0, 1].
        training: False returns `input` itself.
        inplace: True writes over `input` and returns it.
        salt_vs_pepper: the share of `high` among what is replaced, in [0, 1].
        low, high: the values, in the input's units; `high` is 255 for bytes and 1 otherwise where
            it is None.
        rng_state, element_offset, backend: as in `dropout`.

    Returns:
        A tensor of the input's shape and dtype, with its memory layout where that is dense. `input`
        itself where nothing is replaced.

    Raises:
        ValueError: `p` or `salt_vs_pepper` is outside [0, 1], `low` or `high` is NaN, or `backend`
            is unknown.
        TypeError: `input` is no tensor, or another argument no number.
        RuntimeError: as `dropout` raises it.

    Source: R. Gonzalez, R. Woods, "Digital image processing", section 5.2 (impulse noise).
    """
    if has_torch_function_unary(input):
        return hand_over(salt_and_pepper, locals(), "input")
    name = "salt_and_pepper"
    p = probability(name, "p", p)
    salt = probability(name, "salt_vs_pepper", salt_vs_pepper)
    check_tensor(name, "input", input)
    if high is None:
        high = 255.0 if input.dtype == torch.uint8 else 1.0
    low, high = number(name, "low", low), number(name, "high", high)
    for argument, value in (("low", low), ("high", high)):
        if value != value:
            refuse(name, argument, "a number", value, ValueError)
    if not training or p == 0.0:
        return input
    how = Draw(p, rng_state, element_offset, backend)
    return draw(_OP, watcher(), input, *how, inplace, (salt, low, high))
