"""What the losses of logits share: registration, gradient, checks of what they are given.

A loss op returns (loss, stats, gradient). With `keep_gradient` its kernel writes the gradient with
respect to the logits in the pass that reads them, and the backward only multiplies it, unless by 1.
Otherwise, and at a second backward, the backward op computes it from `stats`, with one read and one
write.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .._dtypes import computed_in
from .._layout import with_strides
from ._loss_checks import NONE, CheckedLoss, check_values
from ._modes import COMPILE, FUNC, below_autograd, is_batched, shows_values
from ._registry import Op, define_part, implementation_of, register
from ._route import Kept, Route, formula, wants_gradient
from ._signature import Known

# The arguments of every loss op that describe its target, without the type of the first. `lam` is
# for a pair of labels; where it is None, `one_lam` is used for every sample. A compiled program
# passes a smoothing that varies as a float64 tensor, traced_smoothing, used instead of the float.
TARGET = (
    "target, Tensor? partner, Tensor? lam, float one_lam, Tensor? weight, SymInt ignore_index, "
    "float label_smoothing, int reduction, Tensor? traced_smoothing"
)

# Multiplies x in place by the one number in `factor`; where that is 1, x is not even read.
_rescale = define_part("rescale_", "(Tensor(a!) x, Tensor factor) -> ()")


_OPTIONAL_TENSOR = torch._C.OptionalType(torch._C.TensorType.get())


class _LossRoute(Route):
    """A loss op's Route.

    Attributes:
        kept: how it keeps the arguments between the input and the last.
        known: calls that need no checks: each with the overload, whether a gradient is wanted, what
            picks the op's arguments, and what they are picked from behind what the call was given.
    """

    kept: Kept
    known: Known

    def keep(
        self, key: bytes | None, overload: Any, given: tuple[Any, ...], arguments: tuple[Any, ...]
    ) -> None:
        """Keeps how an op's arguments were made, if each tensor is one that the call was given."""
        places: list[int] = []
        others: list[Any] = []
        for x in arguments:
            place = next((i for i, y in enumerate(given) if x is y), None)
            if place is None:
                if isinstance(x, Tensor):
                    return
                place = len(given) + len(others)
                others.append(x)
            places.append(place)
        self.known.keep(key, (overload, wants_gradient(arguments[:1]), itemgetter(*places), others))

    def run_again(self, found: tuple[Any, ...], given: tuple[Any, ...]) -> Tensor:
        """The loss of a call of a signature that `known` has, and `found` there."""
        overload, gradient, pick, others = found
        input, *rest = pick((*given, *others))
        return self.run(overload, gradient, (input,), rest)[0]


def _run_and_save(ctx: Any, call: tuple[Any, ...], input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The op's results; saves what a backward needs."""
    route, overload, rest = call
    with below_autograd():
        outputs = overload._op(input, *rest)
    _, stats, gradient = outputs
    ctx.save_for_backward(input, stats, *route.kept.tensors_of(rest))
    ctx.call = (overload, route, route.kept.others_of(rest), input.stride())
    # The caller has no use for this output, so a backward writes over it. It is not among the
    # saved tensors: it is multiplied in place, and a second backward must not see that.
    ctx.gradient = gradient if rest[-1] else None
    return outputs


class _Loss(torch.autograd.Function):
    """A loss op's call."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], input: Tensor) -> Any:
        outputs = _run_and_save(ctx, call, input)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad_loss is None:
            return None, None
        input, stats, *tensors = ctx.saved_tensors
        overload, route, others, strides = ctx.call
        gradient = ctx.gradient
        if gradient is not None and _is_one_number(grad_loss) and not torch.is_grad_enabled():
            _multiply(gradient, grad_loss, overload)
            ctx.gradient = None  # given away
            return None, gradient
        # Hooks may bring the saved tensors back in another order than the kernels walk.
        input = with_strides(input, strides)
        tensors = [
            with_strides(t, strides) if t is not None and t.shape == input.shape else t
            for t in tensors
        ]
        rest = route.kept.in_order((*tensors, *others))
        inputs = (grad_loss.contiguous(), input)
        return None, route.backward.run_like(overload, inputs, (stats, *rest))


class _LossAlone(_Loss):
    """The same for an eager call, which wants the loss alone: each result takes a microsecond."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], input: Tensor) -> Any:
        return _run_and_save(ctx, call, input)[:1]


def _is_one_number(factor: Tensor) -> bool:
    """Whether it is a plain number: no factor for each position, no batch, nothing traced."""
    return factor.dim() == 0 and type(factor) is Tensor and not is_batched(factor)


def _multiply(x: Tensor, factor: Tensor, overload: Any) -> None:
    if x.device.type == "cpu":
        number = factor.item()
        if number != 1.0:
            with below_autograd():
                x.mul_(number)
        return
    implementation = implementation_of(overload)
    with below_autograd():
        if implementation == "native":
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
) -> Op:
    """Registers a loss op and its backward.

    Args:
        name: the op's name.
        arguments: what its schema has after the input, up to `keep_gradient`.
        stats: the numbers it keeps for each position.
        reference: the forward in plain PyTorch.
        by_torch: the backward, differentiable.
        check: for both: called as check(name, arguments, of_backward=...), otherwise as for
            `register`.
    """

    def fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        reduction, keep_gradient = args[place], args[-1]
        compute = computed_in(input.dtype)
        positions = (input.shape[0], *input.shape[2:])
        return (
            input.new_empty(positions if reduction == NONE else (), dtype=compute),
            input.new_empty((stats, *positions), dtype=compute),
            torch.empty_like(input) if keep_gradient else input.new_empty(0),
        )

    def launching(function: str, place: int, of_nothing: Callable[..., Any]) -> Callable[..., Any]:
        """Triton's `function`; `of_nothing` where argument `place`, the logits, is empty."""

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

    backward = register(
        f"{name}_backward",
        f"(Tensor grad_output, Tensor input, Tensor stats, {arguments}) -> Tensor",
        fake=lambda grad_output, input, *args: torch.empty_like(input),
        reference=backward_by_torch,
        triton=launching(f"{name}_backward", 1, backward_by_torch),
        route=Route(2, by_torch=formula(by_torch)),
        check=functools.partial(check, of_backward=True),
    )
    route = _LossRoute(1, _Loss, eager=_LossAlone, by_torch=formula(reference), backward=backward)
    forward = register(
        name,
        f"(Tensor input, {arguments}, bool keep_gradient) -> (Tensor, Tensor, Tensor)",
        fake=fake,
        reference=forward_by_torch,
        triton=launching(name, 0, forward_by_torch),
        route=route,
        check=functools.partial(check, of_backward=False),
    )
    names = forward.argument_names[1:-1]
    place = names.index("reduction")
    schema = forward.overloads["native"]._schema.arguments
    tensors = [x.name for x in schema[1:] if x.type.isSubtypeOf(_OPTIONAL_TENSOR)]
    route.kept = Kept(names, tensors)
    route.known = Known()
    return forward


def run(
    op: Op,
    name: str,
    call: CheckedLoss,
    first: tuple[Any, ...],
    last: tuple[Any, ...],
    backend: str | None,
    given: tuple[Any, ...] = (),
    key: bytes | None = None,
) -> Tensor:
    """The loss of a checked call, in its result's type; `first` and `last` are the arguments that
    the op has before and after TARGET. `key` is the signature of what the call was given, by which
    op.route.known keeps what run_again goes by."""
    input, options, looks = call.input, call.options, call.looks
    rest = (*first, *call.arguments, *last)
    overload = op.overload(input.device, input.dtype, backend, looks)
    # Neither weights nor probabilities have a gradient by the kernels.
    weight, labels = options.weight, call.target.labels
    if (
        (weight is not None and weight.requires_grad)
        or (labels is not None and labels.requires_grad)
        or (looks is not COMPILE and input.numel() == 0)
    ):
        _look_at_values(name, call)
        looks = FUNC  # the formula is for these cases as well
    if looks is not None:
        loss = op.route.call(looks, overload, (input,), (*rest, False))[0]
    else:
        # No gradient is kept in float16: grad_output's factor, a loss scale, must come before the
        # rounding, for the range's sake. Nor is it where each position has a factor of its own.
        keeps = input.requires_grad and torch.is_grad_enabled()
        keeps = keeps and options.reduction != NONE and input.dtype != torch.float16
        if implementation_of(overload) != "native":
            _look_at_values(name, call)
        try:
            loss = op.route.call(None, overload, (input,), (*rest, keeps))[0]
        except RuntimeError:  # where the kernel refused, it wrote nothing: say why
            _look_at_values(name, call)
            raise
        if call.result == loss.dtype and (call.batched or loss.dim() == 0):
            op.route.keep(key, overload, given, (input, *rest, keeps))
    loss = loss if loss.dtype == call.result else loss.to(call.result)
    return loss if call.batched or loss.dim() == 0 else loss.squeeze(0)


def _look_at_values(name: str, call: CheckedLoss) -> None:
    """Raises what torch raises for labels and shares, where they can be looked at."""
    if call.looks is not FUNC and shows_values(call.input, call.looks):
        check_values(name, call)
