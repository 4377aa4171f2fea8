"""The launches of an optimizer's step: which parameters go together, what tells that they and their
state still lie where they did, and their running.
"""

from __future__ import annotations

import weakref
from collections import Counter
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import _rng
from .._tensor_table import addresses
from ..ops.optimizer_step import (
    MOST_GROUPS,
    ROUNDINGS,
    Hyperparameters,
    PreparedStep,
    StepLists,
    StepSettings,
)
from ..ops.penalty import sum_into
from ._algorithm import Algorithm, Group, option
from ._checks import is_memoryless
from ._member import Member, fits

_stride, _numel, _is_contiguous = Tensor.stride, Tensor.numel, Tensor.is_contiguous
_is_neg = Tensor.is_neg
_dtype, _shape, _device = attrgetter("dtype"), attrgetter("shape"), attrgetter("device")
gradient: Any = vars(torch._C.TensorBase)[
    "grad"
].__get__  # `p.grad`, without looking the name up for each


def same(some: Any, others: Any) -> bool:
    """Whether two iterables of one length hold the same objects."""
    return all(map(is_, some, others))


def _layout(params: list[Tensor]) -> tuple[list[Any], ...]:
    """The shapes and dtypes of parameters, which can change in place, as what `Launch._where`
    returns can."""
    return list(map(_shape, params)), list(map(_dtype, params))


class Launch:
    """The parameters of one launch: one device and dtype, and the same kinds of state."""

    def __init__(self, algorithm: Algorithm, members: list[Member]) -> None:
        self.members = members
        self.params = [m.param for m in members]
        self.groups: list[Group] = []
        for m in members:
            if not any(m.group is g for g in self.groups):
                self.groups.append(m.group)
        first = members[0]
        self.device, self.dtype = first.param.device, first.param.dtype
        self.averages = first.averages
        self.rounding = ROUNDINGS.index(first.rounding)
        self.stochastic = first.rounding == "stochastic" and self.dtype == torch.bfloat16
        self._algorithm = algorithm

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

        if not self.averages:
            self.grads = list(map(gradient, self.params))
            self._note_layout(self.grads, addresses(self.grads))
            self._take(self.grads)
        by_name = {name: [m.state[name] for m in members] for name in names}
        rows = ("first_moments", "second_moments", "max_second_moments")
        index = {id(g): i for i, g in enumerate(self.groups)}
        lists = StepLists(
            params=dense,
            grads=self.grads,
            steps=[m.step for m in members if m.step is not None],
            emas=by_name.get("ema", ()),
            compensations=by_name.get("compensation", ()),
            groups=[index[id(m.group)] for m in members],
            element_offsets=[m.element_offset for m in members],
            **{row: by_name[name] for row, name in zip(rows, first.moment_names, strict=False)},
        )
        self.step = PreparedStep("average" if self.averages else algorithm.kind, lists)

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
        """The addresses, numbers of elements and strides of tensors.

        Strides are tuples, of which a step would make so many that the garbage collector runs.
        """
        order: Any = self._contiguous and all(map(_is_contiguous, tensors))
        if not order:
            order = list(map(_stride, tensors))
        return addresses(tensors), list(map(_numel, tensors)), order

    def _where_the_state_is(self) -> list[list[int]]:
        """The addresses of all state, new ones where a tensor was replaced or given other data."""
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
            if not fits(grad, m.dense, self.dtype)
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
                *self._algorithm.rates(group),
                option(group, "ema_decay") or 0.0,
                self._algorithm.decay_of(group),
                group["maximize"],
                group.get("nesterov", False),
                on_device,
            )
            numbers += of_group.numbers()
            flags.append(of_group.flags())
        return numbers, flags, rates


class Launches:
    """All launches of a step, in their order, and what they share."""

    def __init__(self, algorithm: Algorithm, members: list[Member]) -> None:
        self.all = [Launch(algorithm, of) for of in _by_launch(members)]
        counts = Counter(launch.device for launch in self.all if not launch.averages)
        self._rng_states = {
            device: torch.empty(2, dtype=torch.int64, device="cpu") for device in counts
        }
        # A slot for each launch; those of one device add up to its gradients' square.
        self._squares = {
            device: torch.zeros(count, dtype=torch.float64, device=device)
            for device, count in counts.items()
        }

    def is_current(self) -> bool:
        """Whether each of them still holds."""
        try:
            return all(launch.is_current() for launch in self.all)
        except (TypeError, RuntimeError, KeyError):
            # A gradient or a state that is gone or of another kind: a new plan says what is wrong.
            return False

    @torch.no_grad()
    def run(
        self,
        max_norm: float | None,
        backend: str | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor | None:
        """Steps; returns the parts of the gradients' squared norm where `max_norm` is given."""
        # All that can raise comes before the first launch.
        chosen = [launch.step.backend(backend) for launch in self.all]
        hyperparameters = [launch.hyperparameters() for launch in self.all]
        for launch in self.all:
            launch.load()
        squares = None if max_norm is None else self._norm(chosen)
        states: dict[torch.device, Tensor] = {}
        for launch, implementation, of_groups in zip(
            self.all, chosen, hyperparameters, strict=True
        ):
            device = launch.device
            found = _scalar(found_inf, device)
            if launch.averages:
                settings = StepSettings(*of_groups, found_inf=found)
                launch.step.run((), implementation, settings)
                continue
            rng_state = None
            if launch.stochastic:
                if device not in states:
                    states[device] = _rng.draw_state(device, self._rng_states[device])
                rng_state = states[device]
            settings = StepSettings(
                *of_groups,
                rounding=launch.rounding,
                squares=None if squares is None else squares.to(device, non_blocking=True),
                max_norm=0.0 if max_norm is None else max_norm,
                grad_scale=_scalar(grad_scale, device),
                found_inf=found,
                rng_state=rng_state,
            )
            launch.step.run(launch.grads, implementation, settings)
            launch.store()
        return squares

    def _norm(self, chosen: list[str]) -> Tensor:
        """The parts of the squared norm: one a launch; of the first one's device."""
        slots = dict.fromkeys(self._squares, 0)
        for launch, implementation in zip(self.all, chosen, strict=True):
            if launch.averages:
                continue
            sums, slot = self._squares[launch.device], slots[launch.device]
            slots[launch.device] += 1
            sum_into(launch.step.table, launch.grads, 2, sums, slot, implementation)
        if len(self._squares) == 1:
            return next(iter(self._squares.values()))
        first = self.all[0].device if self.all else torch.device("cpu")
        parts = [
            sums.to(first, non_blocking=first.type != "cpu") for sums in self._squares.values()
        ]
        return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64, device="cpu")


def _by_launch(members: list[Member]) -> list[list[Member]]:
    """The members of each launch, in their order."""
    kinds: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        kinds.setdefault(member.kind(), []).append(member)
    launches: list[list[Member]] = []
    for of_kind in kinds.values():
        groups: dict[int, int] = {}
        parts: dict[int, list[Member]] = {}
        for member in of_kind:
            number = groups.setdefault(id(member.group), len(groups))
            parts.setdefault(number // MOST_GROUPS, []).append(member)
        launches += parts.values()
    return launches


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A number that GradScaler hands over, on the device and in the dtype that kernels read."""
    return None if value is None else value.to(device, torch.float32, non_blocking=True)
