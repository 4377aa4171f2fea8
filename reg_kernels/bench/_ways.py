"""The ways to compute an op that its benchmarks compare: ours by backend, eager, torch.compile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ._measure import BACKWARD, BOTH, COMPILE, EAGER, FORWARD, Skipped

_REFERENCE_UP_TO = 2**20  # bytes: the reference is written to be read, not to be fast

Function = Callable[..., Tensor]


class Makers(NamedTuple):
    """Makers of the functions that are compared: PyTorch's, and ours by the name of a backend, or
    None for the one that is chosen automatically."""

    eager: Callable[[], Function]
    ours: Callable[[str | None], Function]
    compiled: Callable[[], Function] | None = None  # for torch.compile, where eager's suits it ill


class Way(NamedTuple):
    """A way to compute an op: with inputs and a check it becomes a contender."""

    name: str
    function: Any  # a Function, or what a benchmark uses instead
    ours: bool
    within: Callable[[], AbstractContextManager[Any]]
    may_fail: bool


class Inputs(NamedTuple):
    """A pool of inputs, for a function and for its backward."""

    arguments: list[tuple[Tensor, ...]]
    wanted: list[tuple[Tensor, ...]]  # whose gradients are computed
    grads: list[Tensor]  # of the outputs


class Calls(NamedTuple):
    """A function in each direction, on input number i of the pool."""

    forward: Callable[[int], Tensor]
    outputs: Callable[[], list[Tensor]]  # that `backward` starts from, computed once
    backward: Callable[[int], tuple[Tensor, ...]]
    both: Callable[[int], tuple[Tensor, ...]]  # the output and the gradients

    def of(self, direction: str) -> Callable[[int], object]:
        return {FORWARD: self.forward, BACKWARD: self.backward, BOTH: self.both}[direction]


def calls(function: Function, inputs: Inputs, wanted: tuple[Tensor, ...] = ()) -> Calls:
    """The calls of `function` over the pool; `wanted` are its own parameters that get gradients."""
    arguments, grads = inputs.arguments, inputs.grads
    pool = len(arguments)
    sources = [(*of_input, *wanted) for of_input in inputs.wanted]

    def forward(i: int) -> Tensor:
        return function(*arguments[i % pool])

    @functools.cache
    def outputs() -> list[Tensor]:
        return [forward(i) for i in range(pool)]

    def backward(i: int) -> tuple[Tensor, ...]:
        i %= pool
        return torch.autograd.grad(outputs()[i], sources[i], grads[i], retain_graph=True)

    def both(i: int) -> tuple[Tensor, ...]:
        i %= pool
        y = function(*arguments[i])
        return y, *torch.autograd.grad(y, sources[i], grads[i])

    return Calls(forward, outputs, backward, both)


def ways(
    op: str,
    makers: Makers,
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    compiled: bool,
) -> Iterator[Way | Skipped]:
    """Every way to compute `op` on inputs of `size` bytes, and those that cannot run here."""
    yield from our_ways(op, makers.ours, device, dtype, size)
    yield Way(EAGER, makers.eager(), False, contextlib.nullcontext, False)
    if compiled:
        torch.compiler.reset()  # or torch stops compiling a function it has compiled a few times
        make = makers.compiled or makers.eager
        function = torch.compile(make(), dynamic=False, fullgraph=True)
        within = _repeatable_backward if direction == BACKWARD else contextlib.nullcontext
        yield Way(COMPILE, function, False, within, True)
    else:
        yield Skipped(COMPILE, "left out: compiling takes seconds a benchmark")


def our_ways(
    op: str,
    make: Callable[[str | None], Any],
    device: torch.device,
    dtype: torch.dtype,
    size: int,
) -> Iterator[Way | Skipped]:
    """Our implementations of `op`, and those that cannot run here."""
    with backends.backend(None):
        automatic = backends.choose(op, device.type, dtype)
    forced = backends.forced_by() is not None
    for name in backends.NAMES:
        if name == "reference" and size > _REFERENCE_UP_TO:
            continue
        reason = backends.why_not(name, device.type, dtype)
        if reason is None and name == "triton" and device.type != "cuda":
            reason = "triton's interpreter is not made for speed"
        if reason is not None:
            yield Skipped(name, reason)
            continue
        # The automatic choice is called as users call it: a name would cost one more check.
        function = make(None if name == automatic and not forced else name)
        yield Way(name, function, True, contextlib.nullcontext, False)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x as a benchmark's `layout` wants it stored."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _repeatable_backward() -> Any:
    """Lets a compiled backward run twice: by default it may reuse what the forward saved."""
    from torch._functorch import config

    return config.patch(donated_buffer=False)
