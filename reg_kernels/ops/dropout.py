"""Dropout and channel dropout: schema, fake, gradient, validation, and the public functions.

The gradient of y = x m is g m with the same mask, so the backward is the op itself on the gradient,
with the forward's rng_state: 16 bytes are saved, and it can be differentiated any number of times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from .._layout import as_torch_returns, is_dense
from ..backends import forced_by
from ..reference import dropout as reference
from ._checks import Entry, check_in_place, check_tensor, hand_over, probability
from ._draw import DRAWN, Draw, draw, draw_again
from ._modes import TRACE, watcher
from ._route import Linear, in_order
from ._signature import is_compiling, signature


def _check(op: str, a: Any, in_place: bool) -> None:
    entry = Entry(op, a.input)
    if in_place and not is_dense(a.input):
        entry.refuse("input", "dense, since it is written into", a.input)
    _check_drawn(entry, a)


def _check_channels(op: str, a: Any, in_place: bool) -> None:
    entry = Entry(op, a.input)
    entry.check_channels(a.input)
    _check_drawn(entry, a)


def _check_drawn(entry: Entry, a: Any) -> None:
    entry.check_probability(a.p)
    entry.check_drawn(a)
    entry.check_floats(a.input, "input")
    entry.check_memory(a.input, "input")


def _register(name: str, check: Callable[..., None], draws_of: int | None = None) -> Linear:
    return Linear(
        name,
        f"float p, {DRAWN}",
        reference=getattr(reference, name),
        triton="dropout",
        check=check,
        keeps=("rng_state", "traced_p"),
        draws_of=draws_of,
    )


_DROPOUT = _register("dropout", _check)
_FEATURE_DROPOUT = _register("feature_dropout", _check_channels, draws_of=2)


def _checked(name: str, input: Tensor, p: Any) -> float:
    """p; raises unless a call is given what each needs, whether it draws or not."""
    if type(p) is not float or not 0.0 <= p <= 1.0:
        p = probability(name, "p", p)
    if not isinstance(input, Tensor):
        check_tensor(name, "input", input)
    return p


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Zeroes each element with probability `p` and scales the others up.

    The result is :math:`y = x m` with :math:`m \in \{0, 65536 / T\}` and :math:`T =
    \mathrm{round}(65536 (1 - p))`. An element is kept with probability :math:`T / 65536`: this is 1
    - p, rounded to 1/65536. The scale is its exact inverse, so :math:`E[y] = x`. A dropped element
    is multiplied by zero: NaN and infinities become NaN, as in torch.

    Args:
        input: a tensor of any shape; float64, float32, float16 or bfloat16. 16-bit floats are
            computed in float32 and rounded once.
        p: the probability of dropping an element, in [0, 1].
        training: False returns `input` itself.
        inplace: True writes over `input` and returns it.
        rng_state: an int64 tensor `[seed, offset]` of shape (2,), on the CPU or on the input's
            device. The same state gives the same mask in every implementation and on every device.
            None draws a state from torch's generator, under `torch.manual_seed`.
        element_offset: the place of the input's first element in the mask. With it a shard of a
            batch gets its part of the whole batch's mask. Where neither it nor `rng_state` is
            given, it is what `distributed.shard` says, if anything.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        A tensor of the input's shape and dtype. It has the input's memory layout where that is
        dense, else the strides that `torch.empty_like` gives.

    Raises:
        ValueError: `p` is outside [0, 1], or `backend` is unknown.
        TypeError: `input` is no tensor, or `p` is no number.
        RuntimeError: the dtype is another one; `rng_state` has another shape, dtype or device;
            `inplace` is asked for on a leaf that requires grad; or `backend` cannot run here
            (`BackendUnavailable`).

    The mask is drawn by Philox4x32-10, element by element in storage order. It depends on
    `rng_state` alone and not on threads, and two runs give the same bits.

    Source: N. Srivastava et al., "Dropout: a simple way to prevent neural networks from
    overfitting", JMLR 15 (2014), section 10 (inverted scaling).
    """
    if has_torch_function_unary(input):
        return hand_over(dropout, locals(), "input")
    key = None
    if not is_compiling():
        others = (rng_state, element_offset, backend, forced_by())
        key = signature(input, p, training, inplace, *others)
        if (found := _DROPOUT.known.get(key)) is not None:
            return draw_again(_DROPOUT, found, input, p, rng_state, element_offset)
    p = _checked("dropout", input, p)
    if not training or p == 0.0:
        return input
    how = (p, rng_state, element_offset, backend, inplace)
    return draw(_DROPOUT, watcher(), input, *how, key=key)


def _feature_dropout(name: str, input: Tensor, how: Draw, inplace: bool) -> Tensor:
    """Channel dropout of an input (N, C, ...), whatever the number of spatial dimensions."""
    if how.number == 0.0:
        return input
    if input.dim() < 2 and how.number < 1.0:
        raise RuntimeError(f"{name}: input must have at least 2 dimensions, got {input.dim()}")
    looks = watcher()
    x = in_order(input, looks)
    if x is input and looks is not TRACE:
        return draw(_FEATURE_DROPOUT, looks, input, *how, inplace)
    if inplace:
        check_in_place(name, input)
    output = draw(_FEATURE_DROPOUT, looks, x, *how)
    if inplace:
        return input.copy_(output)
    return output if looks is TRACE else as_torch_returns(output, input)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Drops whole channels of an input (N, C, L) or (C, L), with one draw for each channel.

    Formula, arguments, result and errors are those of `dropout`, but `element_offset` counts
    channels: channel c of sample n is number n C + c. An input of another number of dimensions
    raises RuntimeError.

    Source: J. Tompson et al., "Efficient object localization using convolutional networks", CVPR
    2015.
    """
    if has_torch_function_unary(input):
        return hand_over(dropout1d, locals(), "input")
    p = _checked("dropout1d", input, p)
    if input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d: input must be (N, C, L) or (C, L), got {input.dim()} dims")
    if not training:
        return input
    how = Draw(p, rng_state, element_offset, backend)
    return _with_batch("dropout1d", input, input.dim() == 3, how, inplace)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Drops whole channels of an input (N, C, H, W), with one draw for each channel.

    It takes an input of three dimensions for (N, C, L), as torch does, and warns. It also warns of
    any other number of dimensions than four. Formula, arguments, result, errors and source are
    those of `dropout1d`.
    """
    if has_torch_function_unary(input):
        return hand_over(dropout2d, locals(), "input")
    p = _checked("dropout2d", input, p)
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: a 3-d input is taken for (N, C, L), as torch does for now; use dropout1d "
            "to keep that",
            stacklevel=2,
        )
    elif input.dim() != 4:
        _warn_of_dimensions("dropout2d", "(N, C, H, W)", input)
    if not training:
        return input
    how = Draw(p, rng_state, element_offset, backend)
    return _with_batch("dropout2d", input, True, how, inplace)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Drops whole channels of an input (N, C, D, H, W) or (C, D, H, W), with one draw for each
    channel.

    It takes an input of another number of dimensions for one without a batch, as torch does, and
    warns. Formula, arguments, result, errors and source are those of `dropout1d`.
    """
    if has_torch_function_unary(input):
        return hand_over(dropout3d, locals(), "input")
    p = _checked("dropout3d", input, p)
    if input.dim() not in (4, 5):
        _warn_of_dimensions("dropout3d", "(N, C, D, H, W) or (C, D, H, W)", input)
    if not training:
        return input
    how = Draw(p, rng_state, element_offset, backend)
    return _with_batch("dropout3d", input, input.dim() == 5, how, inplace)


def _warn_of_dimensions(name: str, expected: str, input: Tensor) -> None:
    warnings.warn(
        f"{name}: input should be {expected}, got {input.dim()} dims; torch deprecates that, "
        "use dropout instead",
        stacklevel=3,
    )


def _with_batch(name: str, input: Tensor, batched: bool, how: Draw, inplace: bool) -> Tensor:
    """_feature_dropout of an input that may lack its batch dimension."""
    if batched:
        return _feature_dropout(name, input, how, inplace)
    if not inplace or torch.compiler.is_compiling():
        output = _feature_dropout(name, input.unsqueeze(0), how, False).squeeze(0)
        return input.copy_(output) if inplace else output
    # In place the caller's own tensor takes the dimension on for the call: a view would not do,
    # since autograd lets a leaf's data be written, not a view of it.
    check_in_place(name, input)
    input.unsqueeze_(0)
    try:
        _feature_dropout(name, input, how, inplace)
    finally:
        input.squeeze_(0)
    return input
