"""Dropout and channel dropout: schema, fake, gradient, validation, and the public functions.

The gradient of y = x m is g m with the same mask, so the backward is the op itself on the gradient,
with the forward's rng_state: 16 bytes are saved, and it can be differentiated any number of times.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _rng
from .._layout import (
    as_torch_returns,
    dense_like,
    is_channels_last,
    is_dense,
    ordered,
    with_strides,
)
from .._numbers import integer
from ..backends import DTYPES
from ..reference import dropout as reference
from ._arguments import check_in_place, probability
from ._modes import below_autograd, is_transformed, tracing_state, unrecorded
from ._registry import Op, implementation_of, register


class _Dropout(torch.autograd.Function):
    """y = x m, and as its backward the same op on the gradient.

    `draw`, one object to autograd, is what decides the mask: (p, rng_state, element_offset,
    traced_p), the op's arguments after the input.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, overload: Any, draw: tuple[Any, ...]) -> Tensor:
        with below_autograd():
            output = overload(input, *draw)
        _remember(ctx, overload, draw, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return _gradient(ctx, grad_output), None, None


class _DropoutInPlace(torch.autograd.Function):
    """The same, written over its input."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, in_place: Any, overload: Any, draw: tuple[Any, ...]
    ) -> Tensor:
        ctx.mark_dirty(input)
        with below_autograd():
            in_place(input, *draw)
        _remember(ctx, overload, draw, input)
        return input

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return _gradient(ctx, grad_output), None, None, None


# `apply` spends two microseconds on preparing for torch.func; where that is known to be away, this
# is the same without.
_apply_dropout = super(torch.autograd.Function, _Dropout).apply


def _remember(ctx: Any, overload: Any, draw: tuple[Any, ...], output: Tensor) -> None:
    p, rng_state, element_offset, traced_p = draw
    ctx.save_for_backward(rng_state, traced_p)
    # The mask follows storage order, so the gradient has to come in the output's.
    ctx.call = (overload, p, element_offset, output.stride())


def _gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    rng_state, traced_p = ctx.saved_tensors
    overload, p, element_offset, strides = ctx.call
    draw = (p, rng_state, element_offset, traced_p)
    return _differentiable(overload, with_strides(grad_output, strides), *draw)


def _differentiable(
    overload: Any,
    input: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> Tensor:
    if input.requires_grad and torch.is_grad_enabled():
        return _Dropout.apply(input, overload, (p, rng_state, element_offset, traced_p))
    with below_autograd():
        return overload(input, p, rng_state, element_offset, traced_p)


def _write_over(
    in_place: Any,
    overload: Any,
    input: Tensor,
    p: float,
    rng_state: Tensor,
    element_offset: int = 0,
    traced_p: Tensor | None = None,
) -> None:
    draw = (p, rng_state, element_offset, traced_p)
    if input.requires_grad and torch.is_grad_enabled():
        _DropoutInPlace.apply(input, in_place, overload, draw)
        return
    with below_autograd():
        in_place(input, *draw)
    torch.autograd.graph.increment_version(input)


def _fake(input: Tensor, *draw: Any) -> Tensor:
    return dense_like(input)


def _fake_in_place(input: Tensor, *draw: Any) -> None:
    return None


def _in_place_reference(function: Any) -> Any:
    def run(input: Tensor, *draw: Any) -> None:
        input.copy_(function(input, *draw))

    return run


# A compiled program passes p as a float64 tensor, traced_p, which then counts instead of p: a float
# would be a constant of the program, and each new value a recompile.
_DRAW = "float p, Tensor rng_state, int element_offset=0, Tensor? traced_p=None)"


def _register(name: str, function: Any) -> tuple[Op, Op]:
    """An op and its in-place twin."""
    fresh = register(
        name,
        f"(Tensor input, {_DRAW} -> Tensor",
        fake=_fake,
        reference=function,
        triton=f"dropout:{name}",
        autograd=_differentiable,
    )

    def write_over(in_place: Any, input: Tensor, *draw: Any) -> None:
        # The backward is the fresh op of the same implementation.
        overload = fresh.overloads[implementation_of(in_place)]
        _write_over(in_place, overload, input, *draw)

    in_place = register(
        f"{name}_",
        f"(Tensor(a!) input, {_DRAW} -> ()",
        fake=_fake_in_place,
        reference=_in_place_reference(function),
        triton=f"dropout:{name}_",
        autograd=write_over,
    )
    return fresh, in_place


_DROPOUT = _register("dropout", reference.dropout)
_FEATURE_DROPOUT = _register("feature_dropout", reference.feature_dropout)


def _checked(name: str, input: Tensor, p: Any) -> float:
    """p; raises unless a call is given what each needs, whether it draws or not."""
    if type(p) is not float or not 0.0 <= p <= 1.0:
        p = probability(name, "p", p)
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a Tensor, got {type(input).__name__}")
    return p


def _checked_draw(name: str, input: Tensor, element_offset: Any) -> int:
    """element_offset; raises unless a call is given what drawing a mask takes as well."""
    if type(element_offset) is not int:
        element_offset = integer(name, "element_offset", element_offset)
    if not 0 <= element_offset < 2**62:
        raise ValueError(f"{name}: element_offset must be in [0, 2^62), got {element_offset}")
    if input.dtype not in DTYPES:
        supported = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise RuntimeError(
            f"{name}: input must be one of {supported}, "
            f"got {str(input.dtype).removeprefix('torch.')}"
        )
    return element_offset


def _by_torch(
    overload: Any, input: Tensor, p: float, rng_state: Tensor, element_offset: int
) -> Tensor:
    """The same result by a product that torch itself can transform: grad, jvp, vmap.

    Only the multipliers come from the op, in the type that it computes in; under vmap, `randomness`
    decides whether the samples share them, by what it makes of the draw of rng_state.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    # The input's own strides, where they are dense, since the mask follows storage order.
    ones = torch.ones(input.shape, dtype=dtype, device=input.device)
    if is_dense(input):
        ones = with_strides(ones, input.stride())
    multipliers = overload(ones, p, rng_state, element_offset)
    return (input.to(dtype) * multipliers).to(input.dtype)


def _run(
    ops: tuple[Op, Op],
    input: Tensor,
    p: float,
    inplace: bool,
    rng_state: Tensor | None,
    element_offset: int,
    backend: str | None,
) -> Tensor:
    fresh, in_place = ops
    device = input.device
    if p == 0.0:
        return input
    recorded = tracing_state() is not None
    if recorded:
        with unrecorded():
            empty = input.numel() == 0
    else:
        empty = input.numel() == 0
    if empty:
        return input
    if p == 1.0:
        return input.mul_(0) if inplace else input * 0
    element_offset = _checked_draw(fresh.name, input, element_offset)
    traced = torch.compiler.is_compiling()
    choose = fresh.traced_overload if traced else fresh.overload
    overload = choose(device, input.dtype, backend)
    if rng_state is not None:
        rng_state = _rng.checked_state(rng_state, device, fresh.name)
    if traced or recorded or is_transformed():
        state = _rng.draw_traced_state(device) if rng_state is None else rng_state
        if traced:
            # Times a tensor, a float that varies can stay one input of the program: see _DRAW.
            traced_p = torch.ones((), dtype=torch.float64, device=device) * p
            output = overload(input, 0.0, state, element_offset, traced_p)
        elif recorded:
            output = overload(input, p, state, element_offset)
        else:
            output = _by_torch(overload, input, p, state, element_offset)
        if inplace:
            return input.copy_(output)
        return output if recorded else as_torch_returns(output, input)

    if inplace:
        check_in_place(fresh.name, input)  # before the generator moves on
    if rng_state is None:
        rng_state = _rng.draw_state(device)
    draw = (p, rng_state, element_offset, None)
    if not (input.is_contiguous() or is_dense(input)) or (inplace and input.is_neg()):
        output = _differentiable(overload, input, *draw)
        return input.copy_(output) if inplace else as_torch_returns(output, input)
    if inplace:
        _write_over(in_place.overload(device, input.dtype, backend), overload, input, *draw)
        return input
    if input.requires_grad and torch.is_grad_enabled():
        return _apply_dropout(input, overload, draw)
    with below_autograd():
        return overload(input, *draw)


def _hand_over(function: Any, input: Any, p: Any, training: Any, inplace: Any, *rest: Any) -> Any:
    """Gives the call to what overrides it: a subclass's __torch_function__, a tracer's proxy."""
    named = dict(zip(("rng_state", "element_offset", "backend"), rest, strict=True))
    return handle_torch_function(
        function, (input,), input, p=p, training=training, inplace=inplace, **named
    )


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
    r"""Zeroes each element with probability `p` and scales the others up: :math:`y = x m`,
    :math:`m \in \{0, 65536 / T\}`, kept with probability :math:`T / 65536`,
    :math:`T = \mathrm{round}(65536 (1 - p))`.

    The probability that is realised is `p` rounded to 1/65536, and the scale is the inverse of the
    one of keeping, so :math:`E[y] = x` exactly. An element that is dropped is multiplied by zero:
    NaN and infinities stay NaN, as with torch.

    Args:
        input: any shape; float64, float32, float16 or bfloat16. float16 and bfloat16 are computed
            in float32 and rounded once.
        p: the probability of dropping, in [0, 1].
        training: False returns `input` itself.
        inplace: write over `input` and return it.
        rng_state: int64 tensor `[seed, offset]` of shape (2,), on the CPU or on the input's device:
            the same state gives the same mask, in every implementation and on every device. By
            default it is drawn from torch's generator, so `torch.manual_seed` rules.
        element_offset: the index, in the mask, of the input's first element: a shard of a batch
            then gets its part of the whole batch's mask.
        backend: "native", "triton" or "reference"; by default the first that can run here.

    Returns:
        A tensor like `input`, in its memory layout where that is dense, else with its strides in
        the order of the input's, as torch's `empty_like` has them.

    Raises:
        ValueError: `p` outside [0, 1], or an unknown `backend`.
        RuntimeError: another dtype, a `backend` that cannot run here (`BackendUnavailable`), an
            `rng_state` of another shape, dtype or device, or `inplace` on a leaf that requires
            grad.

    Element e of the mask, counted in storage order, is drawn from Philox4x32-10: the result depends
    on rng_state alone, not on threads, and two runs give the same bits.

    Source: N. Srivastava et al., "Dropout: a simple way to prevent neural networks from
    overfitting", JMLR 15 (2014), section 10 (inverted scaling).
    """
    if has_torch_function_unary(input):
        return _hand_over(dropout, input, p, training, inplace, rng_state, element_offset, backend)
    p = _checked("dropout", input, p)
    if not training:
        return input
    return _run(_DROPOUT, input, p, inplace, rng_state, element_offset, backend)


def _feature_dropout(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    rng_state: Tensor | None,
    element_offset: int,
    backend: str | None,
) -> Tensor:
    """Channel dropout of an input (N, C, ...), whatever the number of spatial dimensions."""
    if not training or p == 0.0:
        return input
    if input.dim() < 2 and 0.0 < p < 1.0:
        raise RuntimeError(f"{name}: input must have at least 2 dimensions, got {input.dim()}")
    options = (rng_state, element_offset, backend)
    if (
        tracing_state() is not None and input.dim() >= 2
    ):  # whatever the order is of what a later run brings
        with unrecorded():
            channels_last = is_channels_last(input)
        output = _run(_FEATURE_DROPOUT, ordered(input, channels_last), p, False, *options)
        return input.copy_(output) if inplace else output
    if input.dim() < 2 or input.is_contiguous() or is_channels_last(input):
        return _run(_FEATURE_DROPOUT, input, p, inplace, *options)
    if inplace:
        check_in_place(name, input)
    output = _run(_FEATURE_DROPOUT, input.contiguous(), p, False, *options)
    return input.copy_(output) if inplace else as_torch_returns(output, input)


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
    """Dropout of whole channels of an input (N, C, L) or (C, L): one draw a channel.

    Arguments, result and errors are those of `dropout`; `element_offset` counts channels, n C + c.
    An input of another number of dimensions is a RuntimeError.

    Source: J. Tompson et al., "Efficient object localization using convolutional networks",
    CVPR 2015.
    """
    if has_torch_function_unary(input):
        return _hand_over(
            dropout1d, input, p, training, inplace, rng_state, element_offset, backend
        )
    p = _checked("dropout1d", input, p)
    if input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d: input must be (N, C, L) or (C, L), got {input.dim()} dims")
    options = (p, training, inplace, rng_state, element_offset, backend)
    return _with_batch("dropout1d", input, input.dim() == 3, options)


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
    """Dropout of whole channels of an input (N, C, H, W): one draw a channel.

    As torch's, it takes three dimensions for (N, C, L) and warns of it, and warns of any number
    other than four. Otherwise as `dropout1d`.
    """
    if has_torch_function_unary(input):
        return _hand_over(
            dropout2d, input, p, training, inplace, rng_state, element_offset, backend
        )
    p = _checked("dropout2d", input, p)
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: a 3-d input is taken for (N, C, L), as torch does for now; use dropout1d "
            "to keep that",
            stacklevel=2,
        )
    elif input.dim() != 4:
        _warn_of_dimensions("dropout2d", "(N, C, H, W)", input)
    options = (p, training, inplace, rng_state, element_offset, backend)
    return _with_batch("dropout2d", input, True, options)


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
    """Dropout of whole channels of an input (N, C, D, H, W) or (C, D, H, W): one draw a channel.

    As torch's, it warns of another number of dimensions and takes it without a batch. Otherwise as
    `dropout1d`.
    """
    if has_torch_function_unary(input):
        return _hand_over(
            dropout3d, input, p, training, inplace, rng_state, element_offset, backend
        )
    p = _checked("dropout3d", input, p)
    if input.dim() not in (4, 5):
        _warn_of_dimensions("dropout3d", "(N, C, D, H, W) or (C, D, H, W)", input)
    options = (p, training, inplace, rng_state, element_offset, backend)
    return _with_batch("dropout3d", input, input.dim() == 5, options)


def _warn_of_dimensions(name: str, expected: str, input: Tensor) -> None:
    warnings.warn(
        f"{name}: input should be {expected}, got {input.dim()} dims; torch deprecates that, "
        "use dropout instead",
        stacklevel=3,
    )


def _with_batch(name: str, input: Tensor, batched: bool, options: tuple[Any, ...]) -> Tensor:
    """_feature_dropout of an input that may lack its batch dimension."""
    p, training, inplace, *rest = options
    if batched or not training:
        return _feature_dropout(name, input, *options)
    if not inplace or torch.compiler.is_compiling():
        options = (p, training, False, *rest)
        output = _feature_dropout(name, input.unsqueeze(0), *options).squeeze(0)
        return input.copy_(output) if inplace else output
    # In place the caller's own tensor takes the dimension on for the call: a view would not do,
    # since autograd lets a leaf's data be written, not a view of it.
    check_in_place(name, input)
    input.unsqueeze_(0)
    try:
        _feature_dropout(name, input, p, training, inplace, *rest)
    finally:
        input.squeeze_(0)
    return input
