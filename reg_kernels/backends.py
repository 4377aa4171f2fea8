"""Which implementation an op runs, and why the others cannot.

An op has up to three on a device: `native` (C++ on the CPU, CUDA C++ on a GPU), `triton` and
`reference` (plain PyTorch). The first that can run on the input's device and dtype is taken, in
that order. `with reg_kernels.backend("triton"):` forces one for a block, an argument `backend=` for
a call, and the environment variable REG_KERNELS_BACKEND for a process. A forced implementation that
cannot run raises `BackendUnavailable` and never falls back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from ._compiler import constant
from ._dtypes import DTYPES as DTYPES
from ._dtypes import SUPPORTED, named

NAMES = ("native", "triton", "reference")

_ENVIRONMENT = "REG_KERNELS_BACKEND"
_NOT_BUILT = "reg_kernels was not built: run `python setup.py build_ext --inplace` or install it"
# By `backend(...)`, for the whole process; a name from the environment is checked when it is used.
_forced: str | None = os.environ.get(_ENVIRONMENT) or None
# The names of the blocks that are open, each in a list of its own; of threads they may overlap.
_blocks: list[list[str | None]] = [[_forced]]
_changing = threading.Lock()


class BackendUnavailable(RuntimeError):
    """A forced implementation cannot run here. The message says why, and which ones can."""


def check_name(name: str, source: str) -> str:
    """`name`, if it names an implementation; `source` is what to blame if not."""
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces an implementation inside a `with` block, in every thread. Of blocks of several threads
    the one that was entered last counts, of those that are open.

    Args:
        name: "native", "triton" or "reference"; None makes the choice automatic.

    Raises:
        ValueError: the name is another one.

    The backward of a call runs where its forward did, whatever is forced by then.
    """
    global _forced
    if name is not None:
        check_name(name, "backend")
    if torch.compiler.is_compiling():  # the code of one thread, in which a lock cannot be recorded
        previous, _forced = _forced, name
        try:
            yield
        finally:
            _forced = previous
        return
    block = [name]
    with _changing:
        _blocks.append(block)
        _forced = name
    try:
        yield
    finally:
        with _changing:
            # By what it is, not by its name, which other blocks may have.
            _blocks[:] = [each for each in _blocks if each is not block]
            (_forced,) = _blocks[-1]


@functools.cache
def build_facts() -> dict[str, str | None]:
    """`native_missing` and `cuda_missing`: why that part was not built, or None where it was."""
    try:
        return json.loads((Path(__file__).parent / "_build.json").read_text())
    except FileNotFoundError:
        return {"native_missing": _NOT_BUILT, "cuda_missing": _NOT_BUILT}


@functools.cache
def _load_native() -> str | None:
    """Loads the CPU kernels; returns why they are missing, or None."""
    if (missing := build_facts()["native_missing"]) is not None:
        return missing
    path = Path(__file__).parent / "libreg_kernels_cpu.so"
    try:
        torch.ops.load_library(path)  # registers the kernels
        isa = ctypes.CDLL(str(path)).reg_kernels_isa
    except (OSError, AttributeError) as error:
        return f"the native library does not load ({error})"
    isa.restype = ctypes.c_char_p
    if isa() is None:
        return (
            "the native library was built for an instruction set that this CPU lacks "
            "(REG_KERNELS_ISA): build it again here"
        )
    return None


@functools.cache
def _load_cuda() -> str | None:
    """Loads the CUDA kernels; returns why they are missing, or None."""
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if (missing := build_facts()["cuda_missing"]) is not None:
        return missing
    try:
        torch.ops.load_library(Path(__file__).parent / "libreg_kernels_cuda.so")
    except OSError as error:
        return f"the CUDA library does not load ({error})"
    return None


def load_libraries() -> None:
    """Loads what was built for this torch; what was not is no error, `why_not` tells it."""
    _load_native()
    _load_cuda()


def forced_by() -> str | None:
    """The implementation that `backend(...)` or REG_KERNELS_BACKEND forces, or None."""
    return _forced


def triton_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# A fact of the process: torch.compile takes it as a constant, not as code to trace.
@constant
def why_not(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Says why an implementation cannot run, or returns None where it can.

    Args:
        name: "native", "triton" or "reference".
        device_type: the type of the device, as `torch.device.type` names it.
        dtype: the dtype of the input.
    """
    if dtype not in DTYPES:
        return f"dtype {named(dtype)} is none of {SUPPORTED}"
    if name == "reference":
        return None
    if name == "native":
        if device_type == "cpu":
            return _load_native()
        if device_type == "cuda":
            return _load_cuda()
        return f"there is no native code for {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and triton_interpreted()):
        return None
    if device_type == "cpu":
        return "triton compiles for a GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return f"there is no triton code for {device_type}"


# What an implementation of an op takes, where that is not all of DTYPES.
_TAKES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {}


def takes(op: str, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Says that an implementation of an op computes in these types alone."""
    _TAKES[op, name] = dtypes


def why_not_op(op: str, name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """As `why_not`, of one op."""
    reason = why_not(name, device_type, dtype)
    taken = _TAKES.get((op, name), DTYPES)
    if reason is not None or dtype in taken:
        return reason
    types = ", ".join(map(named, taken))
    return f"of {op} it takes {types} alone" if taken else f"it has no {op}"


def choose(op: str, device_type: str, dtype: torch.dtype, name: str | None = None) -> str:
    """Returns the name of the implementation that `op` runs on this device and dtype.

    Args:
        op: the name of the op, for the message of an error.
        device_type: the type of the device, as `torch.device.type` names it.
        dtype: the dtype of the input.
        name: the implementation to force. None takes what `backend(...)` or REG_KERNELS_BACKEND
            forces, else the first that can run.

    Raises:
        BackendUnavailable: the forced implementation cannot run here.
        RuntimeError: none can, for the dtype is not one of the kernels'.
        ValueError: there is no implementation of that name.
    """
    if name is not None:
        check_name(name, "backend")
    elif _forced is not None:
        name = check_name(_forced, _ENVIRONMENT)
    elif (name := _automatic(op, device_type, dtype)) is not None:
        return name
    else:
        raise RuntimeError(f"{op}: dtype must be one of {SUPPORTED}, got {named(dtype)}")
    if (reason := why_not_op(op, name, device_type, dtype)) is not None:
        others = [n for n in NAMES if why_not_op(op, n, device_type, dtype) is None]
        remedy = (
            f"use {' or '.join(others)}, or leave backend unset" if others else "convert the input"
        )
        raise BackendUnavailable(
            f"{op}: backend {name!r} cannot run on {device_type}: {reason}; {remedy}"
        )
    return name


@constant
def _automatic(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    alike = all((op, name) not in _TAKES for name in NAMES)  # most ops are
    return _first_that_runs("" if alike else op, device_type, dtype)


@functools.cache
def _first_that_runs(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    first = next((n for n in NAMES if why_not_op(op, n, device_type, dtype) is None), None)
    if first == "reference" and device_type == "cpu" and not op:
        _warn_of_slow_reference()
    return first


@functools.cache
def _warn_of_slow_reference() -> None:
    """Warns, once a process, that the CPU kernels are missing, unless the build left them out."""
    if build_facts()["native_missing"] in (None, _NOT_BUILT):
        frame, depth = sys._getframe(), 1  # up to whoever called this package
        while frame.f_back and str(frame.f_globals.get("__package__")).startswith("reg_kernels"):
            frame, depth = frame.f_back, depth + 1
        warnings.warn(
            f"reg_kernels, imported from {Path(__file__).parent}, runs its slow reference on the "
            f"CPU: {_load_native()}",
            stacklevel=depth,
        )
