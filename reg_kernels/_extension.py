"""csrc/python/, what is asked of Python's objects in C. Everything works without it, slower."""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def _load() -> ModuleType | str:
    try:
        from . import _C
    except ImportError as error:
        return str(error)
    return _C


def extension() -> ModuleType | None:
    """reg_kernels._C, or None where it is not built or this Python cannot load it: one without a
    global lock has no limited interface."""
    found = _load()
    return None if isinstance(found, str) else found


def why_not() -> str | None:
    """Why there is none, or None where there is one."""
    found = _load()
    return found if isinstance(found, str) else None
