"""Marks for torch.compile. torch's own decorators import all of its compiler, which takes longer
than the rest of torch; these leave that to whoever compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from torch._compile import _disable_dynamo

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant(function: _Function) -> _Function:
    """As torch.compiler.assume_constant_result: of one call's answer, not code to trace."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: _Function) -> _Function:
    """As torch.compiler.disable: the function and all that it calls run as they are."""
    return cast(_Function, _disable_dynamo(function))
