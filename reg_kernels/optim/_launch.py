"""The launches of an optimizer's step: which parameters go together, what tells that they and their
state still lie where they did, and their running.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .. import _rng
from .._dtensor import ShardSums, is_dtensor, is_placed_like, local_of
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
from ._checks import check_gradient
from ._member import Member
from ._watch import describe, gradient, look


class Launch:
    """The parameters of one launch: one device and dtype, and the same kinds of state."""

    def __init__(self, algorithm: Algorithm, members: list[Member]) -> None:
        self.members = members
        self.groups: list[Group] = []
        for m in members:
            if not any(m.group is g for g in self.groups):
                self.groups.append(m.group)
        first = members[0]
        self.device, self.dtype = first.param.device, first.param.dtype
        self.averages = first.averages
        self.rounding = ROUNDINGS.index(first.rounding)
        self.stochastic = first.is_stochastic
        self.column = first.column
        self._shards = [Shard(m) for m in members if is_dtensor(m.owner)]
        self._algorithm = algorithm

        # What is not dense goes through buffers that are, made here once.
        self._staged = [(m.param, m.dense) for m in members if m.dense is not m.param]
        self._buffers: dict[int, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []  # from gradients into their buffers

        dense = [m.dense for m in members]
        names = first.state_names
        by_name = {name: [m.state[name] for m in members] for name in names}
        rows = ("first_moments", "second_moments", "max_second_moments")
        index = {id(g): i for i, g in enumerate(self.groups)}
        lists = StepLists(
            params=dense,
            grads=[] if self.averages else [local_of(gradient(m.owner)) for m in members],
            steps=[m.step for m in members if m.step is not None],
            emas=by_name.get("ema", ()),
            compensations=by_name.get("compensation", ()),
            groups=[index[id(m.group)] for m in members],
            element_offsets=[m.places.first for m in members],
            runs=[m.places.run for m in members],
            run_strides=[m.places.stride for m in members],
            **{row: by_name[name] for row, name in zip(rows, first.moment_names, strict=False)},
        )
        self.step = PreparedStep("average" if self.averages else algorithm.kind, lists)

        # Of a step, as the kernels take them; between steps None each: zero_grad() is to free them.
        self.grads: list[Any] = [] if self.averages else [None] * len(members)
        self._row = memoryview(bytearray()) if self.averages else self.step.table.row("grad")
        known = [x for m in members for x in (m.param, m.dense, *(m.state[n] for n in names))]
        states = [m.state for m in members]
        self._watched = known, describe(known), states, names, self.grads, self._row
        if not self.is_current():
            raise RuntimeError(
                f"{algorithm.optimizer}: parameters changed while a step began: call step from one "
                "thread at a time"
            )

    def is_current(self) -> bool:
        """Whether it still holds; takes in the gradients, wherever they lie now."""
        if self._shards and not all([shard.is_current() for shard in self._shards]):
            return False
        odd = look(*self._watched)
        if odd is None:
            return False
        for i in odd:
            member, grad = self.members[i], self.grads[i]
            check_gradient(self._algorithm.optimizer, "a parameter", member.param, grad)
            if i not in self._buffers:
                self._buffers[i] = torch.empty_like(member.dense)
            self.grads[i] = self._buffers[i]
            self._copies.append((self.grads[i], grad))
            self._row[i] = self.grads[i].data_ptr()
        if not self.averages:
            self.step.table.send("grad")
        return True

    def load(self) -> None:
        """Brings what is staged up to date."""
        for buffer, grad in self._copies:
            buffer.copy_(grad)
        for param, dense in self._staged:
            dense.copy_(param)

    def store(self) -> None:
        """Writes back what is staged, and tells DTensors that they have changed."""
        for param, dense in self._staged:
            param.copy_(dense)
        if self._shards:
            torch.autograd.graph.increment_version([shard.owner for shard in self._shards])

    def let_go(self) -> None:
        """Lets the gradients go."""
        self.grads[:] = [None] * len(self.grads)
        self._copies.clear()
        for shard in self._shards:
            shard.let_go()

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


class Shard:
    """A DTensor and its state, as they were when its shard was taken for a member."""

    def __init__(self, member: Member) -> None:
        self._member, self.owner, self._local = member, member.owner, local_of(member.owner)
        self._address = self._local.data_ptr()
        self._state: list[tuple[str, Any, Tensor]] = [
            (n, member.owner_state[n], member.state[n]) for n in member.state_names
        ]

    def is_current(self) -> bool:
        """Whether both still have the shards that they had; hands the gradient's to the member."""
        member = self._member
        owner: Any = self.owner
        # By the attribute, since this is asked of each tensor at every step.
        if owner._local_tensor is not self._local or self._local.data_ptr() != self._address:
            return False
        state = member.owner_state
        for name, value, local in self._state:
            if value is not local and value._local_tensor is not local:
                return False
            if state.get(name) is not value:
                return False
        if member.averages:
            return True
        grad = owner.grad
        if grad is None or not is_placed_like(grad, owner):
            return False
        member.param.grad = local_of(grad)
        return True

    def let_go(self) -> None:
        """Lets the gradient go."""
        self._member.param.grad = None


class Launches:
    """All launches of a step, in their order, and what they share."""

    def __init__(
        self,
        algorithm: Algorithm,
        members: list[Member],
        sums: ShardSums | None,
        draw_together: set[torch.device],
    ) -> None:
        """`sums`: of the ranks' shards, where there are DTensors; `draw_together`: on which devices
        DTensors are rounded by chance, with a gradient or without."""
        self.all = [Launch(algorithm, of) for of in _by_launch(members)]
        self._sums, self._draw_together = sums, draw_together
        counts = Counter(launch.device for launch in self.all if not launch.averages)
        self._rng_states = {
            device: torch.empty(2, dtype=torch.int64, device="cpu")
            for device in (*counts, *draw_together)
        }
        # A slot for each launch; those of one device add up to its gradients' square.
        self._squares = {
            device: torch.zeros(count, dtype=torch.float64, device=device)
            for device, count in counts.items()
        }
        self._columns: dict[torch.device, Tensor] = {}  # that they are added to, of each

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
        # What is rounded by chance on several ranks is rounded by the draws of one of them. Each
        # rank takes part, also where it has no gradient.
        states = {device: self._draw(device) for device in self._draw_together}
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
                    states[device] = self._draw(device)
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

    def let_go(self) -> None:
        """Lets the gradients go."""
        for launch in self.all:
            launch.let_go()

    def _norm(self, chosen: list[str]) -> Tensor:
        """The parts of the squared norm: one a launch, or what all ranks' shards of a mesh add up
        to; of the first one's device."""
        slots = dict.fromkeys(self._squares, 0)
        for launch, implementation in zip(self.all, chosen, strict=True):
            if launch.averages:
                continue
            sums, slot = self._squares[launch.device], slots[launch.device]
            slots[launch.device] += 1
            sum_into(launch.step.table, launch.grads, 2, sums, slot, implementation)
        if self._sums is not None:
            return self._norm_of_shards(self._sums)
        if len(self._squares) == 1:
            return next(iter(self._squares.values()))
        first = self.all[0].device if self.all else torch.device("cpu")
        parts = [
            sums.to(first, non_blocking=first.type != "cpu") for sums in self._squares.values()
        ]
        return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64, device="cpu")

    def _norm_of_shards(self, sums: ShardSums) -> Tensor:
        """Column 0 is of plain tensors, which every rank has; the others are summed over ranks."""
        own = torch.zeros(1 + len(sums), dtype=torch.float64, device=sums.device)
        for device, squares in self._squares.items():
            if device not in self._columns:
                of = [x.column for x in self.all if x.device == device and not x.averages]
                self._columns[device] = torch.tensor(of, device=own.device)
            own.index_add_(0, self._columns[device], squares.to(own.device))
        own[1:] = sums(own[1:])
        return own

    def _draw(self, device: torch.device) -> Tensor:
        """The state that the step's draws are made of."""
        state = _rng.draw_state(device, self._rng_states[device])
        if device not in self._draw_together or self._sums is None:
            return state
        return self._sums.of_first_rank(state.to(device, non_blocking=True))


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
