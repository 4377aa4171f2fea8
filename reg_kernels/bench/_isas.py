"""The instruction sets by which the native CPU code is measured.

The contender that is called `native` runs the first of those that are asked for, by default the
best, as users' calls do; one that is held to a further one is called `native[avx2]` or the like.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import backends

NATIVE = "native"


def here() -> tuple[str, ...]:
    """Those that were built and that this machine has, the best first."""
    if backends.why_not(NATIVE, "cpu", torch.float32) is not None:
        return ()
    from .. import _C

    return tuple(reversed(_C.isas()))


@contextlib.contextmanager
def held_to(isa: str, within: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Native CPU code runs `isa`, within what a contender has around its samples."""
    from .. import _C

    previous = _C.isa()
    _C.set_isa(isa)
    try:
        with within():
            yield
    finally:
        _C.set_isa(previous)


def further(isa: str) -> str:
    """The name of the contender that is held to a further instruction set."""
    return f"{NATIVE}[{isa}]"


def implementation(name: str) -> str:
    """The implementation that a contender is of."""
    return name.partition("[")[0]


def of_name(name: str, first: str | None) -> str | None:
    """The instruction set of a contender, where `native` is measured by `first`."""
    if implementation(name) != NATIVE:
        return None
    return first if name == NATIVE else name.removeprefix(f"{NATIVE}[").removesuffix("]")
