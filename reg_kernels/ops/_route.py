"""What every op does between its public function and its kernel, once.

`Linear` registers an op that is linear in its input, fresh and in place, from one declaration, and
has its gradient. `draw` runs those of them whose multipliers are random, the random elementwise
family: dropout and what is like it. The rest is for any op: what its result looks like, the order
its kernels walk, that autograd hears of what was written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _layout, _rng
from .._dtypes import DTYPES
from .._layout import (
    as_torch_returns,
    dense_like,
    has_samples_outermost,
    is_dense,
    keeps_channels_last,
    with_strides,
)
from .._numbers import integer
from ._checks import check_dtype, check_in_place, refuse
from ._modes import COMPILE, TRACE, below_autograd, unrecorded, watcher
from ._registry import Op, register


def wants_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def count_changes(*tensors: Tensor) -> None:
    """Tells autograd that these were written."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def without_functorch(function: type[torch.autograd.Function]) -> Any:
    """`apply` without the two microseconds that it spends on preparing for torch.func, for where
    that is known to be away."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def asked(looks: str | None, question: Callable[..., Any], *arguments: Any) -> Any:
    """What is asked of arguments, and is no part of a program that torch.jit.trace records."""
    if looks is not TRACE:
        return question(*arguments)
    with unrecorded():
        return question(*arguments)


def in_order(x: Tensor, looks: str | None) -> Tensor:
    """x, (N, C, ...), as kernels take it: contiguous, or dense with the channels last."""
    if looks is TRACE:  # what is traced for one order has to bring any other into it
        return _layout.ordered(x, asked(TRACE, keeps_channels_last, x)).resolve_neg()
    if not x.is_contiguous():
        x = _layout.ordered(x, keeps_channels_last(x))
    return x.resolve_neg()


# Ops that are linear in their input


def _getter(
    names: Sequence[str], wanted: Sequence[str]
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What picks those that are wanted, in their order, from values of these names."""
    places = [names.index(name) for name in wanted]
    # An itemgetter of one place does not return a sequence.
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


class Linear:
    """An op that is linear in its input, registered with its in-place twin `<name>_`.

    The schema of the fresh form is (Tensor input, {addends}, {arguments}, {result}) -> Tensor, and
    that of the twin, which is derived from it, (Tensor(a!) input, {arguments}) -> ().

    Attributes:
        fresh, in_place: the registered ops; `in_place` is None where there are addends.
    """

    fresh: Op
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
        reads_dropped: bool = True,
        addends: tuple[str, ...] = (),
        result: str = "",
        like: Callable[[Tensor], tuple[Any, ...]] = lambda input: (),
        fake: Callable[..., Tensor] = lambda input, *arguments: dense_like(input),
        adjoint: Callable[..., Tensor] | None = None,
    ) -> None:
        """
        Args:
            name: the op's.
            arguments: of both forms' schemas, behind the tensors that have a gradient.
            reference: the fresh form in plain PyTorch.
            triton: the module below reg_kernels.triton that has functions of both forms' names.
            check: called as check(name, arguments, in_place=...), else as `register` has it.
            keeps: the tensors among the arguments that a gradient is made with.
            reads_dropped: whether what is multiplied by 0 counts all the same: a NaN stays one.
            addends: tensors, or None, that the result is the sum of, beside the linear part.
            result: arguments of the fresh form alone, that say what its result is like.
            like: their values where the result is the input itself.
            fake: what the fresh form's result looks like.
            adjoint: (overload, grad_output, input's like, output's strides, *arguments) -> the
                gradient by the input. By default the op is its own: each element by itself.
        """
        tensors = "".join(f", Tensor? {name}" for name in addends)
        last = f", {result}" if result else ""
        self._adjoint = self._by_itself if adjoint is None else adjoint
        self._like = like
        self.reads_dropped = reads_dropped
        self._addends = len(addends)
        self.fresh = register(
            name,
            f"(Tensor input{tensors}, {arguments}{last}) -> Tensor",
            fake=fake,
            reference=reference,
            triton=f"{triton}:{name}",
            autograd=self.run,
            check=functools.partial(check, in_place=False),
        )
        schema = self.fresh.overloads["native"]._schema.arguments[1 + self._addends :]
        self._count = len(schema)
        self._defaults = [x.default_value for x in schema if x.has_default_value()]
        if not addends:

            def by_reference(input: Tensor, *arguments: Any) -> None:
                input.copy_(reference(input, *arguments, *like(input)))

            self.in_place = register(
                f"{name}_",
                f"(Tensor(a!) input, {arguments}) -> ()",
                fake=lambda input, *arguments: None,
                reference=by_reference,
                triton=f"{triton}:{name}_",
                autograd=self.write_over,
                check=functools.partial(check, in_place=True),
            )
        # Those that both forms have.
        names = (self.in_place or self.fresh).argument_names[1 + self._addends :]
        # What a gradient keeps of the arguments: tensors, and all that is left. One more getter
        # brings both, one behind the other, back into the arguments' order.
        others = [name for name in names if name not in keeps]
        self._kept_of = _getter(names, keeps)
        self._others_of = _getter(names, others)
        self._in_order = _getter((*keeps, *others), names)

    def run(self, overload: Any, input: Tensor, *rest: Any) -> Tensor:
        """The fresh form by an overload of it, with its gradient where one is wanted."""
        addends, arguments = rest[: self._addends], rest[self._addends :]
        if wants_gradient(input, *addends):
            return _Linear.apply((self, overload, None, self._all(arguments)), input, *addends)
        with below_autograd():
            return overload(input, *rest)

    def run_eagerly(
        self,
        overload: Any,
        input: Tensor,
        arguments: tuple[Any, ...],
        addends: tuple[Tensor | None, ...] = (),
    ) -> Tensor:
        """The same of all arguments where nobody but autograd looks at the call."""
        if addends:
            wanted = wants_gradient(input, *addends)
        else:
            wanted = input.requires_grad and torch.is_grad_enabled()
        if wanted:
            return _apply_linear((self, overload, None, arguments), input, *addends)
        with below_autograd():
            return overload(input, *addends, *arguments)

    def write_over(self, in_place: Any, input: Tensor, *arguments: Any) -> None:
        """The same of the in-place form."""
        if input.requires_grad and torch.is_grad_enabled():
            fresh = self.fresh.like(in_place)
            _Linear.apply((self, fresh, in_place, self._all(arguments)), input)
            return
        with below_autograd():
            in_place(input, *arguments)
        count_changes(input)

    def _all(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments with the defaults at their end, which the dispatcher leaves away."""
        missing = self._count - len(arguments) if self._defaults else 0
        return (*arguments, *self._defaults[-missing:]) if missing else arguments

    def _by_itself(
        self, overload: Any, grad_output: Tensor, like: Any, strides: Any, *arguments: Any
    ) -> Tensor:
        # What was drawn follows storage order, so the gradient has to come in the output's.
        grad_output = with_strides(grad_output, strides)
        return self.run(overload, grad_output, *[None] * self._addends, *arguments)


class _Linear(torch.autograd.Function):
    """A Linear's call.

    `call` is one object to autograd: (the Linear, the overload of its fresh form, that of its
    in-place form or None, the arguments behind the tensors that have a gradient).
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], input: Tensor, *addends: Tensor | None) -> Tensor:
        op, overload, in_place, arguments = call
        with below_autograd():
            if in_place is None:
                output = overload(input, *addends, *arguments)
            else:
                ctx.mark_dirty(input)
                in_place(input, *arguments)
                output = input
        ctx.save_for_backward(*op._kept_of(arguments))
        ctx.call = (overload, op, op._others_of(arguments), op._like(input), output.stride())
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        overload, op, others, like, strides = ctx.call
        _, wants_input, *wants_addends = ctx.needs_input_grad
        gradient = None
        if wants_input:
            arguments = op._in_order((*ctx.saved_tensors, *others))
            gradient = op._adjoint(overload, grad_output, like, strides, *arguments)
        return None, gradient, *(grad_output if wanted else None for wanted in wants_addends)


_apply_linear = without_functorch(_Linear)


# The random elementwise family


class Draw(NamedTuple):
    """What a call draws its mask by: (N,) or whatever is dropped as a whole, in storage order."""

    p: float
    rng_state: Tensor | None
    element_offset: int
    backend: str | None


# A compiled program passes p as a float64 tensor, traced_p, which then counts instead of p: a float
# would be a constant of the program, and each new value a recompile.
DRAWN = "Tensor rng_state, int element_offset=0, Tensor? traced_p=None"


def draw(
    op: Linear,
    input: Tensor,
    p: float,
    state: Tensor | None,
    element_offset: int,
    backend: str | None,
    inplace: bool = False,
    options: tuple[Any, ...] = (),
    addends: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """A call of an op of the schema (input, {addends}, p, {options}, {DRAWN}), with a state of its
    own where none is given; from `p` on a Draw. An input of no elements is returned itself.

    An op that is handed something other than a dense tensor returns a contiguous one.
    """
    looks = watcher()
    if not (input.numel() if looks is None else asked(looks, input.numel)):
        return input
    if p == 1.0:  # nothing is drawn
        if op.reads_dropped:
            return input.mul_(0) if inplace else input * 0
        if state is None:
            state = torch.zeros(2, dtype=torch.int64, device="cpu")
    name, device, dtype = op.fresh.name, input.device, input.dtype
    if type(element_offset) is not int:
        element_offset = integer(name, "element_offset", element_offset)
    if not 0 <= element_offset < 2**62:
        refuse(name, "element_offset", "in [0, 2^62)", element_offset, ValueError)
    if dtype not in DTYPES:
        check_dtype(name, "input", dtype)
    overload = op.fresh.overload(device, dtype, backend, looks)
    if state is not None:
        state = _rng.checked_state(state, device, name)
    if looks is not None:
        if state is None:
            state = _rng.draw_traced_state(device)
        return _watched(
            *(op, looks, overload, input, (p, *options, state, element_offset), addends, inplace)
        )
    if inplace:
        check_in_place(name, input)  # before the generator moves on
    if state is None:
        state = _rng.draw_state(device)
    arguments = (p, *options, state, element_offset, None)
    if not (input.is_contiguous() or is_dense(input)) or (inplace and input.is_neg()):
        output = op.run(overload, input, *addends, *arguments)
        return input.copy_(output) if inplace else as_torch_returns(output, input)
    if inplace:
        # Not by the dispatcher, which in inference mode leaves autograd and its versions out.
        op.write_over(op.in_place.like(overload), input, *arguments)
        return input
    return op.run_eagerly(overload, input, arguments, addends)


def draw_samples(
    op: Linear,
    input: Tensor,
    how: Draw,
    options: tuple[Any, ...] = (),
    addends: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """The same of an op whose draws are each for a sample of a batch (N, ...): it takes each as one
    stretch of memory."""
    looks = watcher()
    if asked(looks, input.numel) == 0:
        return sum((x for x in addends if x is not None), input)
    # What is traced for one layout has to bring any other into it.
    fits = looks is not TRACE and has_samples_outermost(input)
    x = input if fits else input.contiguous()
    addends = tuple(a if a is None else with_strides(a, x.stride()) for a in addends)
    y = draw(op, x, *how, False, options, addends)
    return y if fits or looks is TRACE else as_torch_returns(y, input)


def _watched(
    op: Linear,
    looks: str,
    overload: Any,
    input: Tensor,
    arguments: tuple[Any, ...],
    addends: tuple[Tensor | None, ...],
    inplace: bool,
) -> Tensor:
    """The call as operations that whoever looks at it can record or transform."""
    if looks is COMPILE:
        p, *drawn = arguments
        # Times a tensor, a float that varies can stay one input of the program: see DRAWN.
        traced_p = torch.ones((), dtype=torch.float64, device=input.device) * p
        output = overload(input, *addends, 0.0, *drawn, traced_p)
    elif looks is TRACE:
        output = overload(input, *addends, *arguments)
    else:
        output = _by_torch(op, overload, input, arguments, addends)
    if inplace:
        return input.copy_(output)
    return output if looks is TRACE else as_torch_returns(output, input)


def _by_torch(
    op: Linear,
    overload: Any,
    input: Tensor,
    arguments: tuple[Any, ...],
    addends: tuple[Tensor | None, ...],
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
    multipliers = overload(ones, *[None] * len(addends), *arguments)
    output = input.to(dtype) * multipliers
    if not op.reads_dropped:
        output = torch.where(multipliers == 0, 0, output)
    for addend in addends:
        if addend is not None:
            output = output + addend.to(dtype)
    return output.to(input.dtype)
