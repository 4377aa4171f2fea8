"""How an op draws: one draw for each element of a tensor, or for what goes together.

`draw` calls a Linear whose multipliers are random: dropout and the rest of the random elementwise
family. The functions before it are for any op that draws: they give a call its state to draw by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _part, _rng
from .._dtypes import DTYPES
from .._layout import as_torch_returns, has_samples_outermost, is_dense, mixes_samples, with_strides
from .._numbers import integer, traced_numbers, varies
from ._checks import check_dense, check_dtype, check_in_place, refuse
from ._modes import ONNX, TRACE, watcher
from ._route import Linear, asked, wants_gradient


class Draw(NamedTuple):
    """How a call draws: one draw for each element, or for what goes together, in storage order."""

    number: float  # how much: a probability, a deviation
    rng_state: Tensor | None
    element_offset: int
    backend: str | None


# A compiled program passes a number that varies as a float64 tensor, traced_p, which is used
# instead: a float would be a constant of the program, and each new value a recompile.
DRAWN = "Tensor rng_state, int element_offset=0, Tensor? traced_p=None"


def drawn_state(device: torch.device, looks: str | None, draws: bool = True) -> Tensor:
    """The state for a call to draw by, where its caller gave none. A call that drops all draws
    nothing."""
    if not draws:
        return torch.zeros(2, dtype=torch.int64, device=device)
    return _rng.draw_state(device) if looks is None else _rng.draw_traced_state(device)


def state_of_all(input: Tensor, looks: str | None, draws: bool = True) -> Tensor | None:
    """A state for a call whose draws are the same on all ranks, in no way parts of those for a
    larger batch: of a state that is given, `draw` takes no part. None where nothing is drawn."""
    if not draws:
        return None
    if asked(looks, input.numel) == 0 and not draws_beside_others(input):
        return None
    return drawn_state(input.device, looks)


def refuse_draws(name: str, looks: str | None) -> None:
    """Raises where torch.onnx exports a call that draws."""
    if looks is ONNX:
        refuse(name, "training", "False in an ONNX export, which has no such draws", True)


def draws_beside_others(input: Tensor) -> bool:
    """Whether the generator has to move on for an input without elements, since it does for those
    of the other ranks."""
    part = _part.current() if _part.used else None
    return part is not None and part.draws_nothing_alone(input.shape)


def draw(
    op: Linear,
    looks: str | None,
    input: Tensor,
    number: float,
    state: Tensor | None,
    element_offset: int,
    backend: str | None,
    inplace: bool = False,
    options: tuple[Any, ...] = (),
    beside: tuple[Tensor | None, ...] = (),
    key: bytes | None = None,
) -> Tensor:
    """Calls an op of the schema (input, {beside}, number, {options}, {DRAWN}). The arguments from
    `number` to `backend` are a Draw; without a state, the call draws by one of its own, and, where
    this rank has a part of a batch, its part of what the whole batch draws by that. An input
    without elements is returned itself. `looks` is watcher()'s answer; `key` the call's signature,
    by which op.known keeps what draw_again goes by; an op has none that draws at some calls alone.

    An op that is handed something other than a dense tensor returns a contiguous one.
    """
    if not (input.numel() if looks is None else asked(looks, input.numel)):
        if state is None and draws_beside_others(input):
            drawn_state(input.device, looks, not op.drops or 0.0 < number < 1.0)
        return input
    draws = number != 1.0 or not op.drops
    if not draws and op.reads_dropped:
        return input.mul_(0) if inplace else input * 0
    if number != 0.0:
        refuse_draws(op.fresh.name, looks)
    name, device, dtype = op.fresh.name, input.device, input.dtype
    if type(element_offset) is not int:
        element_offset = integer(name, "element_offset", element_offset)
    if not 0 <= element_offset < 2**62:
        refuse(name, "element_offset", "in [0, 2^62)", element_offset, ValueError)
    if dtype not in DTYPES:
        check_dtype(name, "input", dtype, and_also=op.also_takes)
        dtype = torch.float32
    check_dense(name, "input", input)
    overload = op.fresh.overload(device, dtype, backend, looks)
    if state is not None:
        state, given_state = _rng.checked_state(state, device, name), state
        if state is not given_state:
            key = None
    if inplace and looks is None:
        check_in_place(name, input)  # before the generator moves on
    x = input
    if state is None:
        draws = not op.drops or 0.0 < number < 1.0
        state = drawn_state(device, looks, draws)
        if _part.used and draws and element_offset == 0:
            x, element_offset = _as_a_part(op, input, state)
    traced_p = None
    if varies(number):
        number, traced_p = 0.0, traced_numbers(device, number)
    arguments = (number, *options, state, element_offset, traced_p)
    dense = looks is None and x is input and (x.is_contiguous() or is_dense(x))
    if inplace and dense and not input.is_neg():
        return op.write_over(overload, input, arguments)
    inputs = (x, *beside)
    output = op.call(looks, overload, inputs, arguments)
    if dense and not inplace:
        op.known.keep(key, (overload, wants_gradient(inputs), _rng.drawer(device)))
    if inplace:
        return input.copy_(output)
    return output if dense or looks is TRACE else as_torch_returns(output, input)


def draw_again(
    op: Linear,
    found: tuple[Any, ...],
    input: Tensor,
    number: float,
    state: Tensor | None,
    element_offset: int,
) -> Tensor:
    """The same for a call of a signature that op.known has, and `found` there, without options."""
    overload, gradient, draw_state = found
    x = input
    if state is None:
        state = draw_state()
        if _part.used and element_offset == 0:
            x, element_offset = _as_a_part(op, input, state)
    output = op.run(overload, gradient, (x,), (number, state, element_offset, None))
    return output if x is input else as_torch_returns(output, input)


def _as_a_part(op: Linear, input: Tensor, state: Tensor) -> tuple[Tensor, int]:
    """What a call draws for, and the place of its first draw, if it has drawn its state while this
    rank has a part of a batch. Where samples do not lie one behind the other in memory, which has
    draws of two ranks side by side, a copy comes whose do."""
    part = _part.of_draw(state)
    if part is None:
        return input, 0
    offset = part.offset(op.fresh.name, input.shape, op.draws_of)
    if mixes_samples(input) and not part.alike:
        input = input.contiguous()
    return input, offset


def draw_samples(
    op: Linear,
    input: Tensor,
    how: Draw,
    options: tuple[Any, ...] = (),
    residual: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    """The same for an op that draws once for each sample of a batch (N, ...), and takes a sample as
    one stretch of memory; beside it, a residual and a multiplier."""
    looks = watcher()
    if asked(looks, input.numel) == 0:
        draw(op, looks, input, *how, False, options)
        y = input if multiplier is None else (input * multiplier).to(input.dtype)
        return y if residual is None else y + residual
    # The trace of one layout has to bring any other into it.
    fits = looks is not TRACE and has_samples_outermost(input)
    x = input if fits else input.contiguous()
    if residual is not None:
        residual = with_strides(residual, x.stride()) if fits else residual.contiguous()
    y = draw(op, looks, x, *how, False, options, (residual, multiplier))
    return y if fits or looks is TRACE else as_torch_returns(y, input)
