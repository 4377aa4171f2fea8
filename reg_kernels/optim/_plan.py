"""What an optimizer keeps between steps.

A plan is made when the parameters that have a gradient, their state or their options change, and
looks at everything once. Each step then asks each tensor once whether it still holds (_watch.py).
"""

from __future__ import annotations

from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import backends
from .._dtensor import (
    Places,
    check_gradient_placement,
    check_sharded,
    check_state_placement,
    is_dtensor,
    local_of,
    places_of,
    shard_sums,
)
from ._algorithm import Algorithm, Group, option
from ._checks import check_gradient, check_param
from ._launch import Launches
from ._member import Counters, Member, rounds_by_chance
from ._watch import gradient, holds

State = dict[Tensor, dict[str, Any]]  # an optimizer's


class StepPlan:
    """The launches of a step, and what they were made of."""

    @torch.no_grad()
    def __init__(
        self,
        algorithm: Algorithm,
        groups: list[Group],
        state: State,
        counters: Counters,
        backend: str | None,
    ) -> None:
        """Raises, with nothing changed, where a gradient or a state cannot be taken."""
        members: list[Member] = []
        self._idle: list[Tensor] = []  # parameters without a gradient
        self._lazy: list[Tensor] = []  # and those of them that are not there yet
        self._groups = [(g, list(g["params"]), _options(g)) for g in groups]
        sums = shard_sums(p for g in groups for p in g["params"])
        draw_together = set()
        offset = 0
        for number, (group, params, _) in enumerate(self._groups):
            for i, param in enumerate(params):
                if param.grad is None:
                    (self._lazy if is_lazy(param) else self._idle).append(param)
                averaged = option(group, "ema_decay") is not None and not is_lazy(param)
                if param.grad is not None or averaged:
                    where = f"parameter {i} of group {number}"
                    _check(algorithm, where, param, state.get(param, {}))
                    backends.choose("optimizer_step", param.device.type, param.dtype, backend)
                    member = Member(algorithm, group, param)
                    member.places = Places(offset)
                    if is_dtensor(param):
                        assert sums is not None
                        member.column = 1 + sums.column(param)
                        if member.is_stochastic:
                            member.places = places_of(algorithm.optimizer, where, param, offset)
                    members.append(member)
                if is_dtensor(param) and rounds_by_chance(group, param):
                    draw_together.add(param.device)
                if not is_lazy(param):
                    # By whole draws, and past those without a gradient: each keeps its own.
                    offset += -(-param.numel() // 8) * 8
        for param in [p for p in counters if p not in state]:
            del counters[param]
        for member in members:
            # SGD without a momentum keeps nothing, as torch's does not.
            member.prepare(state[member.owner] if member.state_names else {}, counters)
        self.launches = Launches(algorithm, members, sums, draw_together)
        self._state = state
        self._values = list(state.values())

    def is_current(self, groups: list[Group], state: State) -> bool:
        """Whether parameters, options and state are still those that it was made of."""
        if len(groups) != len(self._groups):
            return False
        for group, (planned, params, options) in zip(groups, self._groups, strict=True):
            if group is not planned or not holds(group["params"], params):
                return False
            if _options(group) != options:
                return False
        if state is not self._state or not holds(state, self._values):
            return False
        if not all(map(is_, map(gradient, self._idle), repeat(None))):
            return False
        if not all(is_lazy(p) and p.grad is None for p in self._lazy):
            return False
        return self.launches.is_current()


def _check(algorithm: Algorithm, where: str, param: Tensor, state: dict[str, Any]) -> None:
    """Raises unless a step can take a parameter, its gradient and its state."""
    name, grad = algorithm.optimizer, param.grad
    if is_dtensor(param):
        check_sharded(name, where, param)
        check_state_placement(name, where, param, state)
        state = {key: local_of(value) for key, value in state.items()}
    if grad is not None:
        check_gradient_placement(name, where, param, grad)
        check_gradient(name, where, local_of(param), local_of(grad))
    check_param(algorithm, where, local_of(param), state)


def _options(group: Group) -> tuple[Any, ...]:
    """The options that decide which state there is and who goes with whom, or what is a word."""
    names = ("amsgrad", "decay", "decay_lr", "decoupled_weight_decay", "rounding", "state_dtype")
    return (*map(group.get, names), group.get("momentum", 0) != 0, group.get("ema_decay") is None)
