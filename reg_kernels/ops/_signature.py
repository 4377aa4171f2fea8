"""Calls that need no checks, since one like them has passed them.

All rules of what an argument has to be, and who looks at a call, stand in the Python of each op. A
call whose signature is that of an earlier one would be answered alike, so what was found out then
is kept and taken again: that is a look-up instead of some twenty questions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .._extension import extension
from ._modes import QUESTIONS

is_compiling = torch.compiler.is_compiling  # which compiles no call of C: ask it before


def _find() -> Callable[..., bytes | None]:
    module = extension()
    try:
        function = functools.partial(module.signature, QUESTIONS)  # type: ignore[union-attr]
        function()  # raises where torch has no DLPack exchange
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return lambda *arguments: None
    return function


# What the checks of a call's arguments go by, as bytes (csrc/python/call_signature.cpp): of a
# tensor its dtype, device, shape, strides and whether it requires grad; the value of None, a bool,
# an int, a float or a str; and whether gradients are recorded. None where anything but autograd
# looks at the call, or an argument is anything else, a subclass for one.
signature: Callable[..., bytes | None] = _find()


class Known(dict[bytes | None, Any]):
    """What was found out of an op's calls, by their signatures."""

    _MOST = 1000  # calls, for those who never call alike twice

    def keep(self, key: bytes | None, found: Any) -> None:
        if key is None:
            return
        if len(self) >= self._MOST:
            self.clear()
        self[key] = found
