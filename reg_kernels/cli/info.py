"""Shows torch, the devices, which implementation each op uses here and why others cannot."""

from __future__ import annotations

import argparse
import platform

import torch
from rich.console import Console
from rich.table import Table

import reg_kernels

from .. import backends
from ..ops._registry import OPS

SUMMARY = "torch, devices, and which implementation each op will use here and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass  # nothing to choose


def run(args: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    for name, value in facts().items():
        console.print(f"{name + ':':<14}{value}", highlight=False)
    table = Table(title="implementations, first that can run is used")
    table.add_column("op")
    table.add_column("device")
    for name in backends.NAMES:
        table.add_column(name)
    for op in [name for name in OPS if not name.endswith("_")]:  # in place is as out of place
        for device in devices():
            used = backends.choose(op, device, torch.float32)
            cells = [_cell(name, device, name == used) for name in backends.NAMES]
            table.add_row(op, device, *cells)
    console.print(table)
    console.print(f"forced by {backends.forced_by() or 'nobody: the choice is automatic'}")
    return 0


def _cell(name: str, device: str, used: bool) -> str:
    reason = backends.why_not(name, device, torch.float32)
    if reason is not None:
        return f"no: {reason}"
    return "[bold]used[/bold]" if used else "can run"


def devices() -> list[str]:
    """The kinds of device that torch can use here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def facts() -> dict[str, str]:
    """What a report of a fault should say about this machine."""
    result = {
        "reg_kernels": reg_kernels.__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} CPU threads",
    }
    missing = backends.why_not("native", "cpu", torch.float32)
    if missing is None:
        from .. import _C

        result["native CPU"] = (
            f"{_C.isa()} (of {', '.join(_C.isas())}), built by {_C.compiler} "
            f"for torch 2.11 and later (headers of {_C.torch_version_built_with})"
        )
    else:
        result["native CPU"] = f"missing: {missing}"
    missing = backends.why_not("native", "cuda", torch.float32)
    result["CUDA C++"] = "built" if missing is None else f"missing: {missing}"
    missing = backends.why_not("triton", "cuda", torch.float32)
    result["Triton"] = "installed" if missing is None else f"missing: {missing}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        result["GPUs"] = ", ".join(names)
    else:
        result["GPUs"] = "none that torch sees"
    return result
