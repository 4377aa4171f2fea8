"""What the losses of logits share: registration, gradient, checks of what they are given.

A loss op returns (loss, stats, gradient): with `keep_gradient` its kernel writes the gradient by
the logits in the pass that reads them, and the backward has but to multiply it, unless by 1.
Otherwise, and at a second backward, `stats` lets the backward op make it anew, one read and one
write.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._layout import with_strides
from ._loss_checks import NONE, CheckedLoss, check_values
from ._modes import COMPILE, FUNC, below_autograd, is_batched, shows_values
from ._registry import Op, define_part, implementation_of, register
from ._route import wants_gradient, without_functorch

# What every loss op is told of its target, after the target's type; `lam` is for a pair of labels,
# and where it is None `one_lam` counts for every sample. A compiled program passes a smoothing that
# varies as a float64 tensor, traced_smoothing, which then counts instead of the float.
TARGET = (
    "target, Tensor? partner, Tensor? lam, float one_lam, Tensor? weight, SymInt ignore_index, "
    "float label_smoothing, int reduction, Tensor? traced_smoothing"
)

# x times the one number in `factor`, in place; where that is 1, x is not even read.
_rescale = define_part("rescale_", "(Tensor(a!) x, Tensor factor) -> ()")


class _Loss(torch.autograd.Function):
    """A loss op; `args` are the op's arguments after the input, one object to autograd."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, backward: Op, overload: Any, args: tuple[Any, ...]) -> Any:
        with below_autograd():
            loss, stats, gradient = overload(input, *args)
        ctx.mark_non_differentiable(stats, gradient)
        ctx.set_materialize_grads(False)
        *rest, keeps_gradient = args
        tensors = [x if isinstance(x, Tensor) else None for x in rest]
        ctx.save_for_backward(input, stats, *tensors)
        ctx.args = [None if isinstance(x, Tensor) else x for x in rest]
        ctx.backward = backward.like(overload)
        ctx.strides = input.stride()
        # An output of the op, but of no use to its caller: a backward writes over it.
        # Not among what is saved: it is multiplied in place, which a second backward must not see.
        ctx.gradient = gradient if keeps_gradient else None
        return loss, stats, gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        nothing = (None, None, None)
        if grad_loss is None:
            return None, *nothing
        input, stats, *tensors = ctx.saved_tensors
        if ctx.gradient is not None and _is_one_number(grad_loss) and not torch.is_grad_enabled():
            gradient = ctx.gradient
            with below_autograd():
                _multiply(gradient, grad_loss, implementation_of(ctx.backward))
            ctx.gradient = None  # given away
            return gradient, *nothing
        # What hooks bring back of the saved tensors may lie in another order than the kernels walk.
        input = with_strides(input, ctx.strides)
        tensors = [
            with_strides(t, ctx.strides) if t is not None and t.shape == input.shape else t
            for t in tensors
        ]
        args = [x if t is None else t for x, t in zip(ctx.args, tensors, strict=True)]
        grad_loss = grad_loss.contiguous()
        return ctx.backward(grad_loss, input, stats, *args), *nothing


def _is_one_number(factor: Tensor) -> bool:
    """A real one: neither a factor for each position nor a batch of them, nor what is traced."""
    return factor.dim() == 0 and type(factor) is Tensor and not is_batched(factor)


_apply = without_functorch(_Loss)


def _multiply(x: Tensor, factor: Tensor, implementation: str) -> None:
    if x.device.type == "cpu":
        number = factor.item()
        if number != 1.0:
            x.mul_(number)
    elif implementation == "native":
        _rescale(x, factor)
    elif implementation == "triton":
        importlib.import_module("reg_kernels.triton.cross_entropy").rescale_(x, factor)
    else:
        x.mul_(factor)


def register_loss(
    name: str,
    arguments: str,
    stats: int,
    reference: Callable[..., Any],
    by_torch: Callable[..., Any],
    check: Callable[..., None],
) -> tuple[Op, Op]:
    """A loss op and its backward.

    Args:
        name: the op's name.
        arguments: what its schema has after the input, up to `keep_gradient`.
        stats: the numbers it keeps for each position.
        reference: the forward in plain PyTorch.
        by_torch: the backward, differentiable.
        check: of either: called as check(name, arguments, of_backward=...), else as `register`
            has it.
    """

    def fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        reduction, keep_gradient = args[place], args[-1]
        compute = torch.promote_types(input.dtype, torch.float32)
        positions = (input.shape[0], *input.shape[2:])
        return (
            input.new_empty(positions if reduction == NONE else (), dtype=compute),
            input.new_empty((stats, *positions), dtype=compute),
            torch.empty_like(input) if keep_gradient else input.new_empty(0),
        )

    def above(overload: Any, input: Tensor, *args: Any) -> Any:
        if wants_gradient(input):
            return _Loss.apply(input, backward, overload, args)
        with below_autograd():
            return overload(input, *args)

    def above_backward(overload: Any, grad_output: Tensor, input: Tensor, *args: Any) -> Tensor:
        if wants_gradient(grad_output, input):
            return by_torch(grad_output, input, *args)
        with below_autograd():
            return overload(grad_output, input, *args)

    def launching(function: str, place: int, of_nothing: Callable[..., Any]) -> Callable[..., Any]:
        """Triton's `function`, not where its argument in this place, the logits, is empty."""

        def run(*args: Any) -> Any:
            if args[place].numel() == 0:
                return of_nothing(*args)
            module = importlib.import_module(f"reg_kernels.triton.{name}")
            return getattr(module, function)(*args)

        return run

    def forward_by_torch(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, stats, gradient = reference(input, *args)
        return loss, stats, with_strides(gradient, input.stride()) if args[-1] else gradient

    def backward_by_torch(grad_output: Tensor, input: Tensor, *args: Any) -> Tensor:
        return with_strides(by_torch(grad_output, input, *args), input.stride())

    forward = register(
        name,
        f"(Tensor input, {arguments}, bool keep_gradient) -> (Tensor, Tensor, Tensor)",
        fake=fake,
        reference=forward_by_torch,
        triton=launching(name, 0, forward_by_torch),
        autograd=above,
        check=functools.partial(check, of_backward=False),
    )
    backward = register(
        f"{name}_backward",
        f"(Tensor grad_output, Tensor input, Tensor stats, {arguments}) -> Tensor",
        fake=lambda grad_output, input, *args: torch.empty_like(input),
        reference=backward_by_torch,
        triton=launching(f"{name}_backward", 1, backward_by_torch),
        autograd=above_backward,
        check=functools.partial(check, of_backward=True),
    )
    place = forward.argument_names.index("reduction") - 1
    return forward, backward


def run(
    ops: tuple[Op, Op],
    name: str,
    call: CheckedLoss,
    first: tuple[Any, ...],
    last: tuple[Any, ...],
    backend: str | None,
    reference: Callable[..., Any],
) -> Tensor:
    """The loss of a checked call, in its result's type; `first` and `last` are the arguments that
    the op has before and after TARGET."""
    forward, backward = ops
    input, options = call.input, call.options
    args = (*first, *call.arguments, *last)
    looks = call.looks
    overload = forward.overload(input.device, input.dtype, backend, looks)
    on_cpu = shows_values(input, looks)
    # Neither weights nor probabilities have a gradient by the kernels.
    weight, labels = options.weight, call.target.labels
    wants_more = weight is not None and weight.requires_grad
    if (
        wants_more
        or (labels is not None and labels.requires_grad)
        or (looks is not COMPILE and (input.numel() == 0 or looks is FUNC))
    ):
        if on_cpu and looks is not FUNC:
            check_values(name, call)
        loss = reference(input, *args, False)[0]
    elif looks is not None:
        loss = overload(input, *args, False)[0]
    else:
        wanted = input.requires_grad and torch.is_grad_enabled()
        # Not in float16, whose range needs grad_output's factor, a loss scale, before the rounding;
        # nor where each position has a factor of its own.
        keeps = wanted and options.reduction != NONE and input.dtype != torch.float16
        if on_cpu and implementation_of(overload) != "native":
            check_values(name, call)
        try:
            if wanted:
                loss = _apply(input, backward, overload, (*args, keeps))[0]
            else:
                with below_autograd():
                    loss = overload(input, *args, False)[0]
        except RuntimeError:
            if on_cpu:  # the kernel refused, before it wrote anything: say why
                check_values(name, call)
            raise
    loss = loss if loss.dtype == call.result else loss.to(call.result)
    return loss if call.batched or loss.dim() == 0 else loss.squeeze(0)
