"""A parameter of a step, with its state in the kernels' form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtensor import Places, in_order_of, is_dtensor, local_of, wrapped
from .._layout import is_dense
from ._algorithm import Algorithm, Group, option
from ._checks import is_memoryless

# SGD's counts of steps: of each parameter its momentum, as the plan last knew it, and the counter.
# They are no state, which torch's SGD has but the momentum of; they tell one that has not begun.
Counters = dict[Tensor, tuple[Tensor, Tensor]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that elements of `dtype` are computed in."""
    return torch.promote_types(dtype, torch.float32)


def fits(value: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take `value` beside `like` as it is."""
    strides = value.stride() == like.stride() or value.numel() <= 1
    kind = value.dtype == dtype and value.device == like.device
    return strides and kind and not value.is_neg() and not is_memoryless(value)


def _restrided(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as the kernels take it beside `like`, which is dense: itself if it is so already."""
    if fits(value, like, dtype):
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


def rounds_by_chance(group: Group, param: Tensor) -> bool:
    """Whether the update of a parameter draws."""
    return option(group, "rounding") == "stochastic" and param.dtype == torch.bfloat16


class Member:
    """A parameter and what its update needs; one without a gradient is only averaged.

    Of a DTensor, `owner`, the step takes the shard that this rank holds: `param` and `state` are
    that shard's, and are no objects of the user's.
    """

    def __init__(self, algorithm: Algorithm, group: Group, owner: Tensor) -> None:
        # Detached, a shard has room for a gradient that nobody else sees.
        param = local_of(owner).detach() if is_dtensor(owner) else owner
        self.owner, self.param, self.group = owner, param, group
        self.averages = owner.grad is None
        self.rounding: str = "nearest" if self.averages else option(group, "rounding")
        self.is_stochastic = not self.averages and rounds_by_chance(group, param)
        self.moment_names = () if self.averages else algorithm.moments(group)
        self._counts_in_state = algorithm.counts
        names = ["step"] if self.moment_names and self._counts_in_state else []
        names += self.moment_names
        if option(group, "ema_decay") is not None:
            names.append("ema")
        if self.rounding == "kahan" and param.dtype.itemsize == 2:
            names.append("compensation")
        self.state_names = tuple(names)
        wanted = None if self.averages else option(group, "state_dtype")
        self.moments_dtype = _moments_dtype(param.dtype, wanted)
        self.places = Places(0)  # among the draws of stochastic rounding
        self.column = 0  # of the gradients' sums of squares; 0 is that of plain tensors
        self.dense = param
        self.state: dict[str, Tensor] = {}
        self.owner_state: dict[str, Any] = {}  # the same of a plain tensor
        self.step: Tensor | None = None

    def kind(self) -> tuple[Any, ...]:
        """What parameters must have in common to share a launch."""
        return (
            self.param.device,
            self.param.dtype,
            self.moments_dtype,
            self.state_names,
            self.rounding,
            self.averages,
            self.column,
        )

    def prepare(self, state: dict[str, Any], counters: Counters) -> None:
        """Makes the state that is missing, and brings what is there into the kernels' form."""
        momentum = state.get("momentum_buffer")
        if not is_dense(self.param) or self.param.is_neg():
            self.dense = self.param.detach().resolve_neg().contiguous()
        if self.is_stochastic and is_dtensor(self.owner):
            self.dense = in_order_of(self.dense, self.owner)  # that of the draws
        self._prepare_state(state)
        if self.moment_names and not self._counts_in_state:
            # Where there is a momentum a step was taken, unless it is one that was made here.
            buffer, counter = counters.get(self.owner, (None, None))
            if counter is None or momentum is not buffer or counter.device != self.param.device:
                counter = self._counter(momentum is not None)
            self.step = counter
            counters[self.owner] = (state["momentum_buffer"], counter)

    def _prepare_state(self, of_owner: dict[str, Any]) -> None:
        sharded = is_dtensor(self.owner)
        state = {k: local_of(v) for k, v in of_owner.items()} if sharded else of_owner
        self.state, self.owner_state = state, of_owner
        for name in self.state_names:
            if name == "step":
                self.step = state[name] = of_owner[name] = self._step(state)
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
            if sharded and state[name] is not value:
                of_owner[name] = wrapped(state[name], self.owner)
                state[name] = local_of(of_owner[name])

    def _step(self, state: dict[str, Any]) -> Tensor:
        step = state.get("step")
        if isinstance(step, Tensor):
            return step.to(self.param.device, torch.float32)
        return self._counter(0.0 if step is None else float(step))

    def _counter(self, start: float) -> Tensor:
        return torch.full((), start, dtype=torch.float32, device=self.param.device)
