"""What exported programs need of this package beside its ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import backends
from .ops._registry import OPS

__all__ = ["decompositions", "library"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table by which an exported program of evaluation becomes core ATen.

    `program.run_decompositions(decompositions())` does to our ops what `run_decompositions()` does
    to torch's: a chain becomes BatchNorm, sum and activation. torch's default table cannot hold
    them, since it has of other packages the ops alone that run as their decomposition everywhere,
    and ours are to run as one kernel.

    Returns:
        `torch.export.default_decompositions()` with ours beside, to be changed at will: `del
        table[op]` keeps an op as it is. What a program of training runs stays an op of ours.
    """
    table = torch.export.default_decompositions()
    for op in OPS.values():
        formula = getattr(op.route, "in_evaluation", None)
        if formula is not None:
            for overload in op.overloads.values():
                table[overload] = functools.partial(_decompose, formula, overload)
    return table


def library() -> Path:
    """Where libreg_kernels.so lies, which a C++ program loads before a package of AOTInductor.

    It declares the ops and brings the CPU kernels; it knows no Python, and of torch LibTorch's
    stable ABI alone. The CUDA kernels are in libreg_kernels_cuda.so beside it, where they were
    built: a program for a GPU loads that as well.

    Returns:
        Its path, for `dlopen`.

    Raises:
        BackendUnavailable: the native code was not built, or does not load here.
    """
    if (missing := backends.why_not("native", "cpu", torch.float32)) is not None:
        raise backends.BackendUnavailable(f"library: the native code must be built: {missing}")
    return Path(__file__).with_name("libreg_kernels.so")


def _decompose(formula: Callable[..., Any], overload: Any, *arguments: Any) -> Any:
    """The formula of all arguments: a graph leaves defaults at their end away."""
    further = overload._schema.arguments[len(arguments) :]
    return formula(overload, *arguments, *(argument.default_value for argument in further))
