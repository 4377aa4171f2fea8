"""What several test files need: the implementations of this machine, the house's rng_state, two
optimizers side by side, and what is asked of a GPU."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from reg_kernels import backends
from reg_kernels.cases.dropout import state as rng_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = backends.DTYPES
DTYPE_IDS = [str(d).removeprefix("torch.") for d in DTYPES]


def run_program(command: Sequence[object], **options: Any) -> Any:
    """A program's exit code and output, as subprocess.run's; one that never ends is an error."""
    from bench import watchdog  # which a program of tests/ has not in its path, nor needs

    return watchdog.run(command, **options)


def implementations(device: str = DEVICE) -> list[object]:
    """The implementations as parameters; one that cannot run is skipped with its reason."""
    parameters = []
    for name in backends.NAMES:
        reason = backends.why_not(name, device, torch.float32)
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


@functools.cache
def isas() -> list[str]:
    """The instruction sets that the native CPU kernels were built for and this machine has."""
    if backends.why_not("native", "cpu", torch.float32) is not None:
        return []
    from reg_kernels import _C

    return _C.isas()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    if DEVICE == "cpu":
        yield
        return
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def captured(function: Callable[[], Any], warm_up: Callable[[], Any] | None = None) -> Any:
    """(what does it once more, in the same memory; the results of function()): the replay of a CUDA
    graph, after a few runs of what warms it up, by default itself. On the CPU, which has no graphs,
    a call, whose results go where the first one's are."""
    if DEVICE == "cpu":
        results = function()

        def replay() -> None:
            both = zip(tree_leaves(results), tree_leaves(function()), strict=True)
            for x, y in both:
                if x is not None:
                    x.copy_(y)

        return replay, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            (warm_up or function)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def check_device_assertion(program: str) -> None:
    """That `program` prints "raised:" and torch's error of a device-side assertion. It runs in a
    process of its own, since no call of CUDA works afterwards."""
    done = run_program([sys.executable, "-c", textwrap.dedent(program)], together=True)
    assert "raised: CUDA error: device-side assert triggered" in done.stdout, done.stdout


class Twins:
    """An optimizer and the one that it is held to, on the same parameters and gradients.

    `ours` and `theirs` are optimizers' classes or what makes one of a list of parameters.
    """

    def __init__(self, ours: Any, theirs: Any, tensors: Sequence[torch.Tensor]) -> None:
        # A deep copy keeps strides, also those of what is not dense.
        self.params = [copy.deepcopy(x).requires_grad_() for x in tensors]
        self.their_params = [copy.deepcopy(x).requires_grad_() for x in tensors]
        self.ours, self.theirs = ours(self.params), theirs(self.their_params)

    def give(self, grads: Sequence[torch.Tensor | None] | None = None) -> None:
        """Gradients, by default random ones; each side gets tensors of its own."""
        if grads is None:
            grads = [torch.randn_like(p) for p in self.params]
        for params in (self.params, self.their_params):
            for p, g in zip(params, grads, strict=True):
                p.grad = None if g is None else g.detach().clone()

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.give()
            self.ours.step()
            self.theirs.step()

    def check(self, **tolerances: float) -> None:
        """By default to within roundings of float64."""
        tolerances = tolerances or {"rtol": 1e-12, "atol": 1e-13}
        for p, q in zip(self.params, self.their_params, strict=True):
            torch.testing.assert_close(p, q, **tolerances)


__all__ = [
    "DEVICE",
    "DTYPES",
    "DTYPE_IDS",
    "Twins",
    "captured",
    "check_device_assertion",
    "implementations",
    "isas",
    "no_waiting",
    "rng_state",
    "run_program",
]
