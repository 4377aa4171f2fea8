"""What an optimizer keeps between steps: which tensors go into which launch.

A plan is made when the parameters that have a gradient, their state or their options change, and
looks at everything once. Each step then checks, without touching a tensor, that it still holds:
in the end by comparing lists of objects and of addresses.
"""

from __future__ import annotations

from collections import Counter
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import _rng, backends
from ..ops.optimizer_step import MOST_GROUPS
from ..ops.penalty import sum_into
from ._launch import STATE, Launch, Member, gradient, is_memoryless, option, same

if TYPE_CHECKING:
    from ._base import FusedOptimizer


class Plan:
    """The launches of an optimizer's step."""

    @torch.no_grad()
    def __init__(self, optimizer: FusedOptimizer) -> None:
        """Raises, with nothing changed, where a gradient or a state cannot be taken."""
        self._optimizer = optimizer
        name = type(optimizer).__name__
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name}: a step must be taken before one is captured in a CUDA graph, and again "
                "when parameters, options or state have changed: state is made then"
            )
        for group in optimizer.param_groups:
            optimizer._check_options(group)  # again: somebody may have changed it
        members: list[Member] = []
        self._idle: list[Tensor] = []  # parameters without a gradient
        self._lazy: list[Tensor] = []  # and those of them that are not there yet
        self._groups = [(g, list(g["params"]), _options(g)) for g in optimizer.param_groups]
        offset = 0
        for number, (group, params, _) in enumerate(self._groups):
            for i, param in enumerate(params):
                if param.grad is None:
                    (self._lazy if is_lazy(param) else self._idle).append(param)
                averaged = option(group, "ema_decay") is not None and not is_lazy(param)
                if param.grad is not None or averaged:
                    where = f"parameter {i} of group {number}"
                    if param.grad is not None:
                        _check_gradient(name, where, param, param.grad)
                    _check(optimizer, where, param, optimizer.state.get(param, {}))
                    kind = (param.device.type, param.dtype)
                    backends.choose("optimizer_step", *kind, optimizer.backend)
                    member = Member(optimizer, group, param)
                    member.element_offset = offset
                    members.append(member)
                if not is_lazy(param):
                    # By whole draws, and past those without a gradient: each keeps its own.
                    offset += -(-param.numel() // 8) * 8
        optimizer._counters = {p: c for p, c in optimizer._counters.items() if p in optimizer.state}
        for member in members:
            # SGD without a momentum keeps nothing, as torch's does not.
            state = optimizer.state[member.param] if member.state_names else {}
            member.prepare(state, optimizer._counters)
        self.launches = [Launch(optimizer, of) for of in _by_launch(members)]
        self._state = optimizer.state
        self._values = list(optimizer.state.values())
        counts = Counter(launch.device for launch in self.launches if not launch.averages)
        self._rng_states = {
            device: torch.empty(2, dtype=torch.int64, device="cpu") for device in counts
        }
        # A slot for each launch; those of one device add up to its gradients' square.
        self._squares = {
            device: torch.zeros(count, dtype=torch.float64, device=device)
            for device, count in counts.items()
        }

    def is_current(self) -> bool:
        """Whether parameters, options and state are still those that it was made of."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        if len(groups) != len(self._groups):
            return False
        for group, (planned, params, options) in zip(groups, self._groups, strict=True):
            now = group["params"]
            if group is not planned or len(now) != len(params) or not same(now, params):
                return False
            if _options(group) != options:
                return False
        state = optimizer.state
        if state is not self._state or len(state) != len(self._values):
            return False
        if not same(state.values(), self._values):
            return False
        if not all(map(is_, map(gradient, self._idle), repeat(None))):
            return False
        if not all(is_lazy(p) and p.grad is None for p in self._lazy):
            return False
        try:
            return all(launch.is_current() for launch in self.launches)
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
        chosen = [launch.step.backend(backend) for launch in self.launches]
        hyperparameters = [launch.hyperparameters() for launch in self.launches]
        for launch in self.launches:
            launch.load()
        squares = None if max_norm is None else self._norm(chosen)
        states: dict[torch.device, Tensor] = {}
        for launch, implementation, of_groups in zip(
            self.launches, chosen, hyperparameters, strict=True
        ):
            device = launch.device
            if launch.averages:
                found = _scalar(found_inf, device)
                launch.step.run([], implementation, (*of_groups, 0, None, 0.0, None, found, None))
                continue
            rng_state = None
            if launch.stochastic:
                if device not in states:
                    states[device] = _rng.draw_state(device, self._rng_states[device])
                rng_state = states[device]
            common = (
                *of_groups,
                launch.rounding,
                None if squares is None else squares.to(device, non_blocking=True),
                0.0 if max_norm is None else max_norm,
                _scalar(grad_scale, device),
                _scalar(found_inf, device),
                rng_state,
            )
            launch.step.run(launch.grads, implementation, common)
            launch.store()
        return squares

    def _norm(self, chosen: list[str]) -> Tensor:
        """The parts of the squared norm: one a launch; of the first one's device."""
        slots = dict.fromkeys(self._squares, 0)
        for launch, implementation in zip(self.launches, chosen, strict=True):
            if launch.averages:
                continue
            sums, slot = self._squares[launch.device], slots[launch.device]
            slots[launch.device] += 1
            sum_into(launch.step.table, launch.grads, 2, sums, slot, implementation)
        if len(self._squares) == 1:
            return next(iter(self._squares.values()))
        first = self.launches[0].device if self.launches else torch.device("cpu")
        parts = [
            sums.to(first, non_blocking=first.type != "cpu") for sums in self._squares.values()
        ]
        return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64, device="cpu")


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    """The options that decide which state there is and who goes with whom, or what is a word."""
    names = ("amsgrad", "decay", "decay_lr", "decoupled_weight_decay", "rounding", "state_dtype")
    return (*map(group.get, names), group.get("momentum", 0) != 0, group.get("ema_decay") is None)


def _by_launch(members: list[Member]) -> list[list[Member]]:
    """The members of each launch, in their order."""
    kinds: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        kinds.setdefault(member.kind(), []).append(member)
    launches = []
    for of_kind in kinds.values():
        groups: dict[int, int] = {}
        parts: dict[int, list[Member]] = {}
        for member in of_kind:
            number = groups.setdefault(id(member.group), len(groups))
            parts.setdefault(number // MOST_GROUPS, []).append(member)
        launches += parts.values()
    return launches


def _check_gradient(name: str, where: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        layout = str(grad.layout).removeprefix("torch.")
        raise RuntimeError(
            f"{name}: gradients must be dense, got {layout} for {where}: sparse gradients are for "
            "torch.optim.SparseAdam"
        )
    if grad.device != param.device or grad.shape != param.shape or not grad.is_floating_point():
        raise RuntimeError(
            f"{name}: a gradient must have its parameter's shape and device, got "
            f"{tuple(grad.shape)} on {grad.device} for {where}, {tuple(param.shape)} on "
            f"{param.device}"
        )
    if is_memoryless(grad) and not grad._is_zerotensor():
        raise RuntimeError(f"{name}: a gradient must have memory of its own, got none for {where}")


def _check(optimizer: FusedOptimizer, where: str, param: Tensor, state: dict[str, Any]) -> None:
    name = type(optimizer).__name__
    if is_memoryless(param):
        raise RuntimeError(f"{name}: a parameter must have memory of its own, got none for {where}")
    if torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            f"{name}: a parameter's elements must lie apart, got strides {param.stride()} of shape "
            f"{tuple(param.shape)} for {where}"
        )
    for key in STATE:
        value = state.get(key)
        if not isinstance(value, Tensor):
            continue
        if value.shape != param.shape:
            raise ValueError(
                f"{name}: {key} of {where} must have shape {tuple(param.shape)}, "
                f"got {tuple(value.shape)}"
            )
        if is_memoryless(value) and not value._is_zerotensor():
            raise RuntimeError(f"{name}: {key} of {where} must have memory of its own, got none")
    optimizer._check_complete(where, state)


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    """What GradScaler hands over, where and as the kernels read it."""
    return None if value is None else value.to(device, torch.float32, non_blocking=True)
