"""csrc/python/, what is asked of Python's objects in C. Everything works without it, slower."""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def extension() -> ModuleType | None:
    """reg_kernels._C, or None where it is not built or this Python cannot load it: one without a
    global lock has no limited interface."""
    try:
        from . import _C
    except ImportError:
        return None
    return _C
