"""The way from an op's public function to its kernel, in one place for all ops.

A `Route` takes an op's calls to the kernel and records their gradient; how depends on who looks at
a call. `Linear` is the Route of an op that is linear in its input; one declaration registers the op
and its in-place twin. How such an op draws lies in _draw.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import _layout
from .._dtypes import computed_in
from .._layout import (
    dense_like,
    is_channels_last,
    is_dense,
    keeps_channels_last,
    with_strides,
)
from ._modes import COMPILE, FUNC, ONNX, TRACE, below_autograd, unrecorded
from ._registry import Op, register
from ._signature import Known


class Route:
    """The way of an op's calls to a kernel. It depends on who looks at a call.

    torch.compile and torch.jit.trace record the op, and for that the dispatcher runs the route
    later. torch.func gets the formula in torch's own operations, and so does torch.onnx. Any other
    call goes below autograd at once or, where a gradient is wanted, through the op's autograd
    Function.
    """

    def __init__(
        self,
        inputs: int = 0,
        graph: type[torch.autograd.Function] | None = None,
        *,
        eager: type[torch.autograd.Function] | None = None,
        by_torch: Any = None,  # a function
        backward: Any = None,
        moves: Any = None,  # a function
        lists: bool = False,
        in_evaluation: Any = None,  # a function
    ) -> None:
        """
        Args:
            inputs: how many of the op's arguments have a gradient; they are the first ones.
            graph: the Function that records the gradient, called as graph.apply((route, overload,
                the other arguments), *inputs). Without it autograd records the formula; an op that
                is a gradient itself has none.
            eager: likewise for calls that nothing but autograd looks at, which may leave out
                results that only a recorded op has to have. By default `graph` itself.
            by_torch: the formula, called as by_torch(overload, *arguments).
            backward: the Op or Linear that `graph` computes a gradient with.
            moves: called as moves(inputs, rest), returns what the op writes beside its results.
            lists: whether the first argument is a list of tensors.
            in_evaluation: the formula of an op that evaluation runs as operations of core ATen,
                called as by_torch is; NotImplemented of a call that draws.
        """
        self.by_torch = by_torch
        self.in_evaluation = in_evaluation
        self.backward = backward
        self._inputs = inputs
        self._moves = moves
        self._lists = lists
        self._apply: Any = None
        if graph is not None:
            self._apply = graph.apply
            # This `apply` saves two microseconds: it prepares nothing for torch.func.
            self._apply_eagerly = super(torch.autograd.Function, eager or graph).apply  # type: ignore[misc]

    def __call__(self, overload: Any, *arguments: Any) -> Any:
        """The op as autograd sees it."""
        inputs, rest = arguments[: self._inputs], arguments[self._inputs :]
        return self.call(None, overload, inputs, rest, self._apply)

    def call(
        self,
        looks: str | None,
        overload: Any,
        inputs: tuple[Any, ...],
        rest: tuple[Any, ...],
        apply: Any = None,
    ) -> Any:
        """The op as a public function calls it, with all of its arguments."""
        if looks is not None:
            if looks is FUNC or looks is ONNX:
                return self.by_torch(overload, *inputs, *rest)
            return overload(*inputs, *rest)
        tensors = (*inputs[0], *inputs[1:]) if self._lists else inputs
        if not wants_gradient(tensors):
            return self.run(overload, False, inputs, rest)
        if self._apply is None:
            return self.by_torch(overload, *inputs, *rest)
        return (apply or self._apply_eagerly)((self, overload, rest), *tensors)

    def run(
        self, overload: Any, gradient: bool, inputs: tuple[Any, ...], rest: tuple[Any, ...]
    ) -> Any:
        """A call that nothing but autograd looks at; `gradient`: whether one is wanted, by the op's
        Function, of inputs that are tensors or None."""
        if gradient:
            return self._apply_eagerly((self, overload, rest), *inputs)
        with below_autograd():
            outputs = overload._op(*inputs, *rest)  # what its __call__ does, a Python call less
        if self._moves is not None:
            self.count_changes(inputs, rest)
        return outputs

    def count_changes(self, inputs: Sequence[Any], rest: tuple[Any, ...]) -> None:
        """Tells autograd of what the op has written."""
        moved = [x for x in self._moves(inputs, rest) if not x.is_inference()]
        torch.autograd.graph.increment_version(moved)


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is made of these."""
    for x in tensors:
        if x is not None and x.requires_grad:
            return torch.is_grad_enabled()
    return False


def formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Route's `by_torch` that is the same for each implementation."""
    return lambda overload, *arguments: function(*arguments)


def asked(looks: str | None, question: Callable[..., Any], *arguments: Any) -> Any:
    """Asks a question about arguments, and keeps it out of what torch.jit.trace records, which
    torch.onnx may export."""
    if looks is not TRACE and looks is not ONNX:
        return question(*arguments)
    with unrecorded():
        return question(*arguments)


def in_order(x: Tensor, looks: str | None, like: Tensor | None = None) -> Tensor:
    """Brings x, (N, C, ...), into an order that kernels take: contiguous, or dense with the
    channels last. If x has such an order, it is returned itself. If `like` is given, which has one,
    x gets that of `like`."""
    if looks is TRACE:  # the trace of one order has to bring any other into it
        channels_last = asked(TRACE, keeps_channels_last, x if like is None else like)
        return _layout.ordered(x, channels_last).resolve_neg()
    if like is not None:
        return with_strides(x, like.stride())
    if not (x.is_contiguous() or is_channels_last(x)):
        x = _layout.ordered(x, is_channels_last(torch.empty_like(x)))
    # A program needs no such operation: its op gets what is negated from the dispatcher, negated.
    return x if looks is COMPILE or looks is ONNX else x.resolve_neg()


# What a gradient keeps


def _getter(
    names: Sequence[str], wanted: Sequence[str]
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks the wanted values, in that order, from the values of `names`."""
    places = [names.index(name) for name in wanted]
    # An itemgetter of one place does not return a sequence.
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


class Kept:
    """How a gradient keeps arguments: in two parts, tensors and all that is left.

    Attributes:
        tensors_of, others_of: each picks its part of the arguments.
        in_order: brings both parts, one behind the other, back into the arguments' order.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[str]) -> None:
        others = [name for name in names if name not in tensors]
        self.tensors_of = _getter(names, tensors)
        self.others_of = _getter(names, others)
        self.in_order = _getter((*tensors, *others), names)


# Ops that are linear in their input


class Linear(Route):
    """An op that is linear in its input, registered, mostly, with its in-place twin `<name>_`.

    The schema of the fresh form is (Tensor input, {addends}, {arguments}, {result}) -> Tensor, and
    that of the twin, which is derived from it, (Tensor(a!) input, {arguments}) -> (). A multiplier,
    where the op has one, stands behind the addends.

    Attributes:
        fresh, in_place: the registered ops; `in_place` is None where there is no twin.
        known: calls of the fresh form whose arguments need no checks.
        by_multiplier: computes the multiplier's gradient, of an op that has one.
    """

    fresh: Op
    known: Known
    in_place: Any = None  # an Op

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        reference: Callable[..., Tensor],
        triton: str,
        check: Callable[..., None],
        keeps: tuple[str, ...],
        drops: bool = True,
        draws_of: int | None = None,
        reads_dropped: bool = True,
        takes_bytes: bool = False,
        addends: tuple[str, ...] = (),
        multiplier: str = "",
        by_multiplier: Callable[..., Tensor] | None = None,
        result: str = "",
        like: Callable[[Tensor], tuple[Any, ...]] = lambda input: (),
        fake: Callable[..., Tensor] = lambda input, *arguments: dense_like(input),
        adjoint: Callable[..., Tensor] | None = None,
        adds_alone: Callable[[tuple[Any, ...]], bool] | None = None,
        by_torch: Callable[..., Tensor] | None = None,
        has_in_place: bool = True,
    ) -> None:
        """
        Args:
            name: the op's name.
            arguments: what both forms' schemas have behind the tensors that have a gradient.
            reference: the fresh form in plain PyTorch.
            triton: the module below reg_kernels.triton with functions of both forms' names.
            check: called as check(name, arguments, in_place=...), otherwise as for `register`.
            keeps: the names of the tensors among the arguments that a gradient needs.
            drops: whether the number of a random op is the probability of dropping an element.
            draws_of: how many leading dimensions of the input have a draw a place; None: all.
            reads_dropped: whether a dropped element is multiplied by 0, so that a NaN stays one.
            takes_bytes: whether a random op also takes bytes, which are computed in float32.
            addends: the names of optional tensors that are added to the linear part.
            multiplier: the name of an optional tensor that the linear part is multiplied by; it
                broadcasts against the input, in the type of computing.
            by_multiplier: (overload, grad_output, input, multiplier, *arguments) -> the
                multiplier's gradient.
            result: further arguments of the fresh form alone, which describe its result.
            like: returns the values of those for a result that is like the input.
            fake: what the fresh form's result looks like.
            adjoint: (overload, grad_output, input's like, output's strides, *arguments) -> the
                input's gradient. By default it is the op itself: each element is multiplied.
            by_torch: as for a Route; by default the product with the op's multipliers.
            adds_alone: called with the arguments behind the input, says whether the op adds to it
                what does not depend on it: its gradient is the output's own, and nothing is kept.
            has_in_place: whether there is a twin in place; there is none where tensors are added.
        """
        by_torch = self._product if by_torch is None else by_torch
        beside = (*addends, multiplier) if multiplier else addends
        super().__init__(
            1 + len(beside),
            _Linear,
            by_torch=by_torch,
            backward=self,
            # Without draws, only what multiplies is left of it to run.
            in_evaluation=self._without_draws if multiplier else None,
        )
        tensors = "".join(f", Tensor? {name}" for name in beside)
        last = f", {result}" if result else ""
        self._adjoint = self.by_itself if adjoint is None else adjoint
        self._like = like
        self.known = Known()
        self._addends = (None,) * len(addends)
        self._no_beside = (None,) * len(beside)
        self.by_multiplier = by_multiplier
        self.adds_alone = adds_alone
        self.drops = drops
        self.draws_of = draws_of
        self.reads_dropped = reads_dropped
        self.also_takes = "uint8" if takes_bytes else ""
        self.fresh = register(
            name,
            f"(Tensor input{tensors}, {arguments}{last}) -> Tensor",
            fake=fake,
            reference=reference,
            triton=f"{triton}:{name}",
            route=self,
            check=functools.partial(check, in_place=False),
        )
        if has_in_place and not beside:

            def by_reference(input: Tensor, *arguments: Any) -> None:
                input.copy_(reference(input, *arguments, *like(input)))

            self.in_place = register(
                f"{name}_",
                f"(Tensor(a!) input, {arguments}) -> ()",
                fake=lambda input, *arguments: None,
                reference=by_reference,
                triton=f"{triton}:{name}_",
                route=Route(1, _Linear, backward=self, moves=lambda inputs, rest: inputs),
                check=functools.partial(check, in_place=True),
            )
        # The arguments that both forms have.
        names = (self.in_place or self.fresh).argument_names[self._inputs :]
        self._kept = Kept(names, keeps)

    def write_over(self, overload: Any, input: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """Writes the result over the input and returns that, for a call that only autograd looks
        at; the overload is the fresh form's."""
        # Not through the dispatcher: in inference mode it leaves autograd and its versions out.
        self.in_place.route.call(None, self.in_place.like(overload), (input,), arguments)
        return input

    def by_itself(
        self,
        overload: Any,
        grad_output: Tensor,
        like: Any,
        strides: Any,
        *arguments: Any,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """The adjoint of an op that multiplies each element: the op of the gradient."""
        beside = self._no_beside if multiplier is None else (*self._addends, multiplier)
        # What was drawn follows storage order, so the gradient has to come in the output's.
        inputs = (with_strides(grad_output, strides), *beside)
        return self.call(None, overload, inputs, arguments, self._apply)

    def drawn(self, overload: Any, ones: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """What `ones` are multiplied by, as a tensor that has no gradient."""
        return self.call(None, overload, (ones, *self._no_beside), arguments)

    def _product(self, overload: Any, input: Tensor, *rest: Any) -> Tensor:
        """The result as a product that torch itself can transform: grad, jvp, vmap.

        Only the multipliers come from the op, in the type that it computes in; under vmap,
        `randomness` decides whether the samples share them, by what it makes of the draw of
        rng_state.
        """
        compute, arguments = computed_in(input.dtype), rest[self._inputs - 1 :]
        addends = rest[: len(self._addends)]
        factors = [x for x in rest[len(self._addends) : self._inputs - 1] if x is not None]
        drawn = None
        if not self._drops_nothing(arguments):
            drawn = overload(filled(input, 1.0), *self._no_beside, *arguments)
            factors.append(drawn)
        output = input.to(compute)
        if factors:
            output = output * functools.reduce(torch.mul, factors)
        if drawn is not None and not self.reads_dropped:
            output = torch.where(drawn == 0, 0, output)
        for addend in addends:
            if addend is not None:
                output = output + addend.to(compute)
        return output.to(input.dtype)

    def _drops_nothing(self, arguments: tuple[Any, ...]) -> bool:
        """Of a random op's arguments behind its tensors."""
        number, *_, traced_p = arguments
        return bool(number == 0.0 and traced_p is None)

    def _without_draws(self, overload: Any, input: Tensor, *rest: Any) -> Tensor:
        """A random op's `in_evaluation`."""
        if not self._drops_nothing(rest[self._inputs - 1 :]):
            return NotImplemented
        return self._product(overload, input, *rest)


def filled(input: Tensor, value: float) -> Tensor:
    """A tensor of one value in the type that an input is computed in, which draws as the input
    does: with its strides, where those are dense, since draws follow storage order."""
    dtype = computed_in(input.dtype)
    x = torch.full(input.shape, value, dtype=dtype, device=input.device)
    return with_strides(x, input.stride()) if is_dense(input) else x


class _Linear(torch.autograd.Function):
    """A Linear's call, fresh or in place."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], input: Tensor, *beside: Tensor | None) -> Tensor:
        route, overload, arguments = call
        with below_autograd():
            output = overload._op(input, *beside, *arguments)
        op = route.backward
        if route is not op:
            ctx.mark_dirty(input)
            overload, output = op.fresh.like(overload), input
        if op.adds_alone is not None and op.adds_alone(arguments):
            ctx.call = None
            return output
        tensors = op._kept.tensors_of(arguments)
        ctx.multiplied = op.by_multiplier is not None and beside[-1] is not None
        if ctx.multiplied:
            tensors = (*tensors, beside[-1], input if ctx.needs_input_grad[-1] else None)
        ctx.save_for_backward(*tensors)
        ctx.call = (overload, op, op._kept.others_of(arguments), op._like(input), output.stride())
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if ctx.call is None:
            return None, grad_output
        overload, op, others, like, strides = ctx.call
        wants = ctx.needs_input_grad
        if ctx.multiplied:
            return _Linear._backward_multiplied(ctx, grad_output)
        gradient = None
        if wants[1]:
            arguments = op._kept.in_order((*ctx.saved_tensors, *others))
            gradient = op._adjoint(overload, grad_output, like, strides, *arguments)
        if not op._no_beside:  # most ops: the short way
            return None, gradient
        return None, gradient, *(grad_output if wanted else None for wanted in wants[2:])

    @staticmethod
    def _backward_multiplied(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        overload, op, others, like, strides = ctx.call
        _, wants, *added, by_multiplier = ctx.needs_input_grad
        *tensors, multiplier, input = ctx.saved_tensors
        arguments = op._kept.in_order((*tensors, *others))
        gradient = of_multiplier = None
        if wants:
            given = (overload, grad_output, like, strides, *arguments)
            gradient = op.by_itself(*given, multiplier=multiplier)
        if by_multiplier:
            given = (overload, grad_output, input, multiplier, *arguments)
            of_multiplier = op.by_multiplier(*given)
        of_addends = (grad_output if wanted else None for wanted in added)
        return None, gradient, *of_addends, of_multiplier
