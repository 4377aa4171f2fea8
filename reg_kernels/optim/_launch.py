"""One launch of an optimizer's step: its parameters and their state in the kernels' form, and what
tells that they still lie where they did.

Also what a group and a state hold beyond torch's.
"""

from __future__ import annotations

import weakref
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._layout import is_dense
from .._tensor_table import addresses
from ..ops.optimizer_step import ROUNDINGS, Hyperparameters, PreparedStep, StepLists

if TYPE_CHECKING:
    from ._base import FusedOptimizer

_stride, _numel, _is_contiguous = Tensor.stride, Tensor.numel, Tensor.is_contiguous
_is_neg = Tensor.is_neg
_dtype, _shape, _device = attrgetter("dtype"), attrgetter("shape"), attrgetter("device")
gradient = torch._C.TensorBase.grad.__get__  # `p.grad`, without looking the name up for each


# State that torch's optimizers do not have: `swapped_out` is the parameter itself, while its
# average stands in its place.
OWN_STATE = ("ema", "compensation", "swapped_out")
# What state there can be of a parameter's shape.
STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", *OWN_STATE)

# Options that torch's optimizers do not have, and what they are in a group that does not name them:
# so a group has torch's keys alone until more is asked for. Of `decay`: as its optimizer has it.
OPTIONS = {
    "decay": None,
    "decay_lr": None,
    "l1": 0.0,
    "ema_decay": None,
    "rounding": "nearest",
    "state_dtype": None,
}


def option(group: dict[str, Any], name: str) -> Any:
    """An option of OPTIONS, as a group has it."""
    return group.get(name, OPTIONS[name])


def is_memoryless(value: Tensor) -> bool:
    """Whether there is nothing where the elements of `value` should be: a storage that was freed,
    or zeros that torch's autograd knows of without storing them."""
    return value.data_ptr() == 0 and value.numel() > 0


# SGD's counts of steps: of each parameter its momentum, as the plan last knew it, and the counter.
# They are no state, which torch's SGD has but the momentum of; they tell one that has not begun.
Counters = dict[Tensor, tuple[Tensor, Tensor]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that elements of `dtype` are computed in."""
    return torch.promote_types(dtype, torch.float32)


def same(some: Any, others: Any) -> bool:
    """Whether two iterables of one length hold the same objects."""
    return all(map(is_, some, others))


def _fits(value: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take `value` beside `like` as it is."""
    strides = value.stride() == like.stride() or value.numel() <= 1
    kind = value.dtype == dtype and value.device == like.device
    return strides and kind and not value.is_neg() and not is_memoryless(value)


def _restrided(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as the kernels take it beside `like`, which is dense: itself if it is so already."""
    if _fits(value, like, dtype):
        return value
    new = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device)
    return new.copy_(value)


def _moments_dtype(param: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the moments: `wanted` where the kernels have it for such parameters."""
    if wanted == torch.float32 and param in (torch.float16, torch.bfloat16):
        return wanted
    if wanted == torch.bfloat16 and param == torch.float32:
        return wanted
    return param


def _layout(params: list[Tensor]) -> tuple[list[Any], ...]:
    """What of parameters can change in place, other than what `Launch._where` tells."""
    return list(map(_shape, params)), list(map(_dtype, params))


class Launch:
    """The parameters of one launch: one device and dtype, and the same kinds of state."""

    def __init__(self, optimizer: FusedOptimizer, members: list[Member]) -> None:
        self.members = members
        self.params = [m.param for m in members]
        self.groups: list[dict[str, Any]] = []
        for m in members:
            if not any(m.group is g for g in self.groups):
                self.groups.append(m.group)
        first = members[0]
        self.device, self.dtype = first.param.device, first.param.dtype
        self.averages = first.averages
        self.rounding = ROUNDINGS.index(first.rounding)
        self.stochastic = first.rounding == "stochastic" and self.dtype == torch.bfloat16
        self._optimizer = optimizer

        names = first.state_names
        self._states = [m.state for m in members]
        self._getters = [itemgetter(name) for name in names]
        self._state_addresses = self._where_the_state_is()
        # What is not dense goes through buffers that are, made here once.
        self._staged = [(m.param, m.dense) for m in members if m.dense is not m.param]
        dense = [m.dense for m in members]
        self._layout = _layout(self.params)
        self._devices = [self.device] * len(members)
        self._contiguous = all(map(_is_contiguous, self.params))
        self._places = self._where(self.params)
        self._without_elements = list(map(_numel, self.params)).count(0)
        self._buffers: dict[int, Tensor] = {}
        self._staged_grads: list[int] = []
        self._grad_addresses: list[int] = []
        self.grads: list[Tensor] = []  # of a step, as the kernels take them
        # Gradients are held between steps only if they outlive them anyway, which the first one
        # tells: zero_grad() is to free them.
        self._held: list[Tensor] = []
        self._given: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []  # from gradients into their buffers
        self._first_given: weakref.ref[Tensor] | None = None

        by_name = {name: [m.state[name] for m in members] for name in names}
        moments = [by_name[name] for name in first.moment_names]
        index = {id(g): i for i, g in enumerate(self.groups)}
        lists = StepLists(
            dense,
            [m.step for m in members if m.step is not None],
            *moments,
            *[[]] * (3 - len(moments)),
            by_name.get("ema", []),
            by_name.get("compensation", []),
            [index[id(m.group)] for m in members],
            [m.element_offset for m in members],
        )
        if self.averages:
            self.step = PreparedStep("average", lists, [])
            return
        self.grads = list(map(gradient, self.params))
        self._note_layout(self.grads, addresses(self.grads))
        self._take(self.grads)
        self.step = PreparedStep(optimizer._algorithm, lists, self.grads)

    def is_current(self) -> bool:
        """Whether it still holds; takes in gradients that have come to lie elsewhere."""
        params = self.params
        if self._where(params) != self._places:
            return False
        if self.averages:
            alike = _layout(params) == self._layout
            return alike and self._where_the_state_is() == self._state_addresses
        grads = list(map(gradient, params))
        where = addresses(grads)
        # The objects of the last step, held since then, are the same gradients. Of others not even
        # the id says that they are new: all is looked at.
        if not (self._held and same(grads, self._held) and where == self._grad_addresses):
            if _layout(params) != self._layout or not self._note_layout(grads, where):
                return False
            self._grad_addresses = where
        self._take(grads)
        self.step.table.set_row("grad", addresses(self.grads) if self._staged_grads else where)
        return self._where_the_state_is() == self._state_addresses

    def _where(self, tensors: list[Tensor]) -> tuple[Any, ...]:
        """Where tensors lie, how much of it is theirs, and in which order.

        Strides are tuples, of which a step would make so many that the garbage collector runs.
        """
        order: Any = self._contiguous and all(map(_is_contiguous, tensors))
        if not order:
            order = list(map(_stride, tensors))
        return addresses(tensors), list(map(_numel, tensors)), order

    def _where_the_state_is(self) -> list[list[int]]:
        """Of state that was replaced, and of a tensor that was given other data."""
        return [addresses(map(getter, self._states)) for getter in self._getters]

    def _note_layout(self, grads: list[Tensor], where: list[int]) -> bool:
        """Finds out which gradients have to go through buffers: those of other strides or dtype
        than their parameters, and zeros that have no memory. False where one is not its parameter's
        gradient at all, or was freed."""
        shapes, dtypes = self._layout
        if list(map(_shape, grads)) != shapes or list(map(_device, grads)) != self._devices:
            return False
        all_there = where.count(0) == self._without_elements
        if not all_there and any(is_memoryless(g) and not g._is_zerotensor() for g in grads):
            return False
        alike = (
            all_there
            and self._contiguous
            and all(map(_is_contiguous, grads))
            and list(map(_dtype, grads)) == dtypes
            and not (self._staged or any(map(_is_neg, grads)))
        )
        if alike:  # found out without a look at each by itself
            self._staged_grads = []
            return True
        self._staged_grads = [
            i
            for i, (grad, m) in enumerate(zip(grads, self.members, strict=True))
            if not _fits(grad, m.dense, self.dtype)
        ]
        return True

    def _take(self, grads: list[Tensor]) -> None:
        """Takes the gradients of a step."""
        self._given, self.grads, self._copies = grads, grads, []
        if not self._staged_grads:
            return
        self.grads = list(grads)
        for i in self._staged_grads:
            if i not in self._buffers:
                self._buffers[i] = torch.empty_like(self.members[i].dense)
            self._copies.append((self._buffers[i], grads[i]))
            self.grads[i] = self._buffers[i]

    def load(self) -> None:
        """Brings what is staged up to date."""
        for buffer, grad in self._copies:
            buffer.copy_(grad)
        for param, dense in self._staged:
            dense.copy_(param)

    def store(self) -> None:
        """Writes back what is staged, and lets the gradients go."""
        if self.averages:
            return
        for param, dense in self._staged:
            param.copy_(dense)
        first = self._given[0]
        persisted = self._first_given is not None and self._first_given() is first
        self._held = self._given if persisted else []
        self._first_given = weakref.ref(first)
        self._given, self.grads, self._copies = [], [], []

    def hyperparameters(self) -> tuple[list[float], list[int], list[Tensor]]:
        """`numbers`, `flags` and `rates` of the op, as the groups have them now."""
        numbers: list[float] = []
        flags: list[int] = []
        rates: list[Tensor] = []
        for group in self.groups:
            lr, decay_lr = group["lr"], option(group, "decay_lr")
            on_device = isinstance(lr, Tensor) and lr.is_cuda and lr.device == self.device
            if on_device:
                rates.append(lr.detach().to(torch.float32))
            of_group = Hyperparameters(
                0.0 if on_device else float(lr),
                decay_lr or 1.0,
                group["weight_decay"],
                option(group, "l1"),
                *self._optimizer._rates(group),
                option(group, "ema_decay") or 0.0,
                self._optimizer._decay_of(group),
                group["maximize"],
                group.get("nesterov", False),
                on_device,
            )
            numbers += of_group.numbers()
            flags.append(of_group.flags())
        return numbers, flags, rates


class Member:
    """A parameter and what its update needs; one without a gradient is only averaged."""

    def __init__(self, optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor) -> None:
        self.param, self.group = param, group
        self.averages = param.grad is None
        self.rounding: str = "nearest" if self.averages else option(group, "rounding")
        self.moment_names = () if self.averages else optimizer._moments(group)
        self._counts_in_state = optimizer._counts
        names = ["step"] if self.moment_names and self._counts_in_state else []
        names += self.moment_names
        if option(group, "ema_decay") is not None:
            names.append("ema")
        if self.rounding == "kahan" and param.dtype.itemsize == 2:
            names.append("compensation")
        self.state_names = tuple(names)
        wanted = None if self.averages else option(group, "state_dtype")
        self.moments_dtype = _moments_dtype(param.dtype, wanted)
        self.element_offset = 0
        self.dense = param
        self.state: dict[str, Tensor] = {}
        self.step: Tensor | None = None

    def kind(self) -> tuple[Any, ...]:
        """What the members of a launch have in common."""
        return (
            self.param.device,
            self.param.dtype,
            self.moments_dtype,
            self.state_names,
            self.rounding,
            self.averages,
        )

    def prepare(self, state: dict[str, Any], counters: Counters) -> None:
        """Makes the state that is missing, and brings what is there into the kernels' form."""
        momentum = state.get("momentum_buffer")
        if not is_dense(self.param) or self.param.is_neg():
            self.dense = self.param.detach().resolve_neg().contiguous()
        self.state = state
        for name in self.state_names:
            if name == "step":
                self.step = state[name] = self._step(state)
                continue
            dtype = self.moments_dtype
            if name == "ema":
                dtype = compute_dtype(self.param.dtype)
            elif name == "compensation":
                dtype = self.param.dtype
            value = state.get(name)
            if value is None:
                new = torch.empty_strided(
                    self.dense.shape, self.dense.stride(), dtype=dtype, device=self.param.device
                )
                state[name] = new.copy_(self.param) if name == "ema" else new.zero_()
            else:
                state[name] = _restrided(value, self.dense, dtype)
        if self.moment_names and not self._counts_in_state:
            # Where there is a momentum a step was taken, unless it is one that was made here.
            buffer, counter = counters.get(self.param, (None, None))
            if counter is None or momentum is not buffer or counter.device != self.param.device:
                counter = self._counter(momentum is not None)
            self.step = counter
            counters[self.param] = (state["momentum_buffer"], counter)

    def _step(self, state: dict[str, Any]) -> Tensor:
        step = state.get("step")
        if isinstance(step, Tensor):
            return step.to(self.param.device, torch.float32)
        return self._counter(0.0 if step is None else float(step))

    def _counter(self, start: float) -> Tensor:
        return torch.full((), start, dtype=torch.float32, device=self.param.device)
