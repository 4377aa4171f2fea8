"""What the losses of logits share: registration, gradient, checks of what they are given.

A loss op returns (loss, stats, gradient): with `keep_gradient` its kernel writes the gradient by
the logits in the pass that reads them, and the backward has but to multiply it, unless by 1.
Otherwise, and at a second backward, `stats` lets the backward op make it anew, one read and one
write.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction

from .._layout import with_strides
from .._mixed_target import MixedTarget
from .._numbers import integer, number, traced_numbers, varies
from ..backends import DTYPES
from ._arguments import check_device, in_order, named
from ._modes import below_autograd, is_batched, is_fake, is_recorded, is_transformed
from ._registry import Op, define_part, implementation_of, register

NONE = 0  # of the reductions, torch's numbers

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
        ctx.backward = (backward, implementation_of(overload))
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
        backward, implementation = ctx.backward
        if ctx.gradient is not None and _is_one_number(grad_loss) and not torch.is_grad_enabled():
            gradient = ctx.gradient
            with below_autograd():
                _multiply(gradient, grad_loss, implementation)
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
        return backward.overloads[implementation](grad_loss, input, stats, *args), *nothing


def _is_one_number(factor: Tensor) -> bool:
    """A real one: neither a factor for each position nor a batch of them, nor what is traced."""
    return factor.dim() == 0 and type(factor) is Tensor and not is_batched(factor)


# As in ops/dropout.py: where torch.func is known to be away, without preparing for it.
_apply = super(torch.autograd.Function, _Loss).apply


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
) -> tuple[Op, Op]:
    """A loss op and its backward.

    Args:
        name: the op's name.
        arguments: what its schema has after the input, up to `keep_gradient`.
        stats: the numbers it keeps for each position.
        reference: the forward in plain PyTorch.
        by_torch: the backward, differentiable.
    """

    def fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        reduction, keep_gradient = args[_REDUCTION[name]], args[-1]
        compute = torch.promote_types(input.dtype, torch.float32)
        positions = (input.shape[0], *input.shape[2:])
        return (
            input.new_empty(positions if reduction == NONE else (), dtype=compute),
            input.new_empty((stats, *positions), dtype=compute),
            torch.empty_like(input) if keep_gradient else input.new_empty(0),
        )

    def above(overload: Any, input: Tensor, *args: Any) -> Any:
        if input.requires_grad and torch.is_grad_enabled():
            return _Loss.apply(input, backward, overload, args)
        with below_autograd():
            return overload(input, *args)

    def above_backward(overload: Any, grad_output: Tensor, input: Tensor, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and (grad_output.requires_grad or input.requires_grad):
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
    )
    backward = register(
        f"{name}_backward",
        f"(Tensor grad_output, Tensor input, Tensor stats, {arguments}) -> Tensor",
        fake=lambda grad_output, input, *args: torch.empty_like(input),
        reference=backward_by_torch,
        triton=launching(f"{name}_backward", 1, backward_by_torch),
        autograd=above_backward,
    )
    _REDUCTION[name] = [a.split()[1] for a in arguments.split(", ")].index("reduction")
    return forward, backward


_REDUCTION: dict[str, int] = {}  # op -> the place of `reduction` among its arguments


# Validation


class Target(NamedTuple):
    """A target as the ops take it: TARGET's first four."""

    labels: Tensor | None  # None: no loss of labels
    partner: Tensor | None
    lam: Tensor | None
    one_lam: float


class Call(NamedTuple):
    """What a loss was called with, checked, as the ops take it."""

    input: Tensor  # (N, C, ...)
    target: Target
    # weight, ignore_index, smoothing, reduction, traced smoothing
    options: tuple[Tensor | None, int, float, int, Tensor | None]
    result: torch.dtype
    batched: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        """TARGET's values."""
        return (*self.target, *self.options)


def checked_call(
    name: str,
    input: Tensor,
    target: Tensor | MixedTarget | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    *,
    needs_target: bool = True,
) -> Call:
    """The call as the ops take it; raises what torch raises for the same mistake.

    What the values of labels and shares are is looked at when the op runs: `run`.
    """
    check_logits(name, "input", input)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    ignore_index = integer(name, "ignore_index", ignore_index)
    label_smoothing = number(name, "label_smoothing", label_smoothing)
    mixed = isinstance(target, MixedTarget)
    if mixed:
        of_target = number(name, "label_smoothing", target.label_smoothing)
        label_smoothing = _one_smoothing(name, of_target, label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    batched = input.dim() > 1
    if not batched:
        input = input.unsqueeze(0)
    compute = torch.promote_types(input.dtype, torch.float32)
    device = input.device.type
    autocasts = device != "meta" and torch.is_autocast_enabled(device)
    result = compute if autocasts else input.dtype
    if target is None and not needs_target:
        checked, weight, label_smoothing = Target(None, None, None, 1.0), None, 0.0
    elif mixed:
        checked = _checked_mixed(name, input, target, batched)
    elif isinstance(target, Tensor):
        if target.is_floating_point() and target.dim() == input.dim() - (not batched):
            target = target if batched else target.unsqueeze(0)
            checked = Target(_checked_probabilities(name, input, target), None, None, 1.0)
            result = torch.promote_types(result, target.dtype)
            if ignore_index >= 0:
                raise RuntimeError(
                    f"{name}: ignore_index is for class indices, got {ignore_index} with class "
                    "probabilities"
                )
            if target.dtype == torch.float64:
                input, compute = input.double(), torch.float64
        else:
            labels = _checked_labels(name, "target", input, target, batched)
            checked = Target(labels, None, None, 1.0)
    else:
        raise TypeError(
            f"{name}: target must be a Tensor or a MixedTarget, got {type(target).__name__}"
        )
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: weight must be a Tensor, got {type(weight).__name__}")
        if weight.shape != input.shape[1:2]:
            raise RuntimeError(
                f"{name}: weight must have one number for each of the {input.shape[1]} classes, "
                f"got shape {tuple(weight.shape)}"
            )
        check_device(name, "weight", weight, input)
        weight = weight.to(compute).contiguous()
    traced = None
    if varies(label_smoothing):
        traced, label_smoothing = traced_numbers(input.device, label_smoothing), 0.0
    options = (weight, ignore_index, label_smoothing, _reduction.get_enum(reduction), traced)
    input = in_order(input)
    if checked.labels is not None and checked.labels.is_floating_point():
        # The kernels walk both in one order.
        checked = checked._replace(labels=with_strides(checked.labels, input.stride()))
    return Call(input, checked, options, result, batched)


def check_logits(name: str, argument: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        supported = ", ".join(map(named, DTYPES))
        raise NotImplementedError(
            f"{name}: {argument} must be one of {supported}, got {named(x.dtype)}"
        )
    if x.dim() == 0:
        raise RuntimeError(f"{name}: {argument} must be (N, C, ...) or (C,), got no dimensions")


def _one_smoothing(name: str, targets: float, own: float) -> float:
    if targets and own and targets != own:
        raise ValueError(
            f"{name}: label_smoothing must be given once, by the loss or by the target: "
            f"got {own} and {targets}"
        )
    return targets or own


def _checked_labels(name: str, argument: str, input: Tensor, labels: Any, batched: bool) -> Tensor:
    """Class indices (N, ...) as int64."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: {argument} must be a Tensor, got {type(labels).__name__}")
    check_device(name, argument, labels, input)
    if labels.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"{name}: {argument} must be int64 class indices, or probabilities of the input's "
            f"shape, got {named(labels.dtype)} of shape {tuple(labels.shape)}"
        )
    given = tuple(labels.shape)
    if not batched and given != (1,):
        labels = labels.unsqueeze(0)
    expected = (input.shape[0], *input.shape[2:])
    if labels.shape != expected:
        other_batch = given[:1] != expected[:1] and (batched or len(given) == 1)
        kind = ValueError if other_batch else RuntimeError
        raise kind(f"{name}: {argument} must have shape {expected if batched else ()}, got {given}")
    return labels.long().contiguous()


def _checked_probabilities(name: str, input: Tensor, target: Tensor) -> Tensor:
    check_device(name, "target", target, input)
    if target.shape != input.shape:
        kind = ValueError if len(target) != len(input) else RuntimeError
        raise kind(
            f"{name}: target must have the input's shape, {tuple(input.shape)}, for class "
            f"probabilities, got {tuple(target.shape)}"
        )
    compute = torch.promote_types(input.dtype, torch.float32)
    if target.dtype not in (input.dtype, compute, torch.float64):
        target = target.to(compute)
    return target


def _checked_mixed(name: str, input: Tensor, target: MixedTarget, batched: bool) -> Target:
    labels = _checked_labels(name, "labels", input, target.labels, batched)
    partner = _checked_labels(name, "partner_labels", input, target.partner_labels, batched)
    lam = target.lam
    if not isinstance(lam, Tensor):
        lam = number(name, "lam", lam)
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"{name}: lam must be in [0, 1], got {lam}")
        if torch.compiler.is_compiling():
            return Target(labels, partner, traced_numbers(input.device, lam), 1.0)
        return Target(labels, partner, None, lam)
    if lam.dtype not in DTYPES:
        raise TypeError(f"{name}: lam must be of a floating-point type, got {named(lam.dtype)}")
    check_device(name, "lam", lam, input)
    if lam.dim() > 1 or lam.numel() not in (1, len(input)):
        raise ValueError(
            f"{name}: lam must be one number, or one for each of the {len(input)} samples, "
            f"got shape {tuple(lam.shape)}"
        )
    if lam.requires_grad:
        raise RuntimeError(f"{name}: lam must not require grad: detach it")
    return Target(labels, partner, lam.reshape(-1).contiguous(), 1.0)


def _check_values(name: str, call: Call) -> None:
    """Raises what torch raises where a label or a share is out of range."""
    classes = call.input.shape[1]
    labels, partner, lam, _ = call.target
    ignore_index = call.options[1]
    for each in (labels, partner):
        if each is None or each.is_floating_point():
            continue
        wrong = each[((each < 0) | (each >= classes)) & (each != ignore_index)]
        if wrong.numel():
            raise IndexError(
                f"{name}: labels must be in [0, {classes}), or ignore_index {ignore_index}, "
                f"got {int(wrong[0])}"
            )
    if lam is not None and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"{name}: lam must be in [0, 1], got {lam.tolist()}")


def run(
    ops: tuple[Op, Op],
    name: str,
    call: Call,
    first: tuple[Any, ...],
    last: tuple[Any, ...],
    backend: str | None,
    reference: Callable[..., Any],
) -> Tensor:
    """The loss of a checked call, in its result's type; `first` and `last` are the arguments that
    the op has before and after TARGET."""
    forward, backward = ops
    input, target = call.input, call.target
    args = (*first, *call.arguments, *last)
    traced = torch.compiler.is_compiling()
    overload = (forward.traced_overload if traced else forward.overload)(
        input.device, input.dtype, backend
    )
    on_cpu = input.device.type == "cpu" and not traced and not is_fake()
    weight = call.options[0]
    wants_more = weight is not None and weight.requires_grad
    if target.labels is not None:
        wants_more = wants_more or target.labels.requires_grad
    by_torch = wants_more or (not traced and (input.numel() == 0 or is_transformed()))
    if by_torch:
        if on_cpu and not is_transformed():
            _check_values(name, call)
        loss = reference(input, *args, False)[0]
    elif traced or is_recorded():
        loss = overload(input, *args, False)[0]
    else:
        wants_gradient = input.requires_grad and torch.is_grad_enabled()
        # Not in float16, whose range needs grad_output's factor, a loss scale, before the rounding;
        # nor where each position has a factor of its own.
        keeps = wants_gradient and call.options[3] != NONE and input.dtype != torch.float16
        if on_cpu and implementation_of(overload) != "native":
            _check_values(name, call)
        try:
            if wants_gradient:
                loss = _apply(input, backward, overload, (*args, keeps))[0]
            else:
                with below_autograd():
                    loss = overload(input, *args, False)[0]
        except RuntimeError:
            if on_cpu:  # the kernel refused, before it wrote anything: say why
                _check_values(name, call)
            raise
    loss = loss if loss.dtype == call.result else loss.to(call.result)
    return loss if call.batched or loss.dim() == 0 else loss.squeeze(0)
