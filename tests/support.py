"""What several test files need: the implementations of this machine, the house's rng_state, two
optimizers side by side, the modules of bench/, and what is asked of a GPU."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from reg_kernels import backends
from reg_kernels.cases.dropout import state as rng_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = backends.DTYPES
DTYPE_IDS = [str(d).removeprefix("torch.") for d in DTYPES]


def bench_module(name: str) -> ModuleType:
    """A module of bench/, which is no package: the very one that its other modules import."""
    folder = str(Path(__file__).parents[1] / "bench")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def run_program(command: Sequence[object], **options: Any) -> Any:
    """A program's exit code and output, as subprocess.run's; one that never ends is an error."""
    return bench_module("watchdog").run(command, **options)


def implementations(device: str = DEVICE) -> list[object]:
    """The implementations as parameters; one that cannot run is skipped with its reason."""
    parameters = []
    for name in backends.NAMES:
        reason = backends.why_not(name, device, torch.float32)
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def isas() -> list[str]:
    """The instruction sets that the native CPU kernels were built for and this machine has."""
    if backends.why_not("native", "cpu", torch.float32) is not None:
        return []
    from reg_kernels import _C

    return _C.isas()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


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
    "check_device_assertion",
    "implementations",
    "isas",
    "no_waiting",
    "rng_state",
    "run_program",
]
