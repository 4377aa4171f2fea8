"""Shows torch, the devices, which implementation the ops use here and why others cannot."""

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Iterator

import torch

import reg_kernels

from .. import _extension, _extras, backends
from ..ops._registry import OPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass  # nothing to choose


def run(args: argparse.Namespace) -> int:
    found = facts()
    width = max(map(len, found)) + 2
    for name, value in found.items():
        print(f"{name + ':':<{width}}{value}")
    for device in devices():
        print(f"\non {device}, the first that can run is used by every op:")
        for name, verdict in implementations(device):
            print(f"  {name:<12}{verdict}")
    ops = sorted({name.removesuffix("_") for name in OPS if not name.endswith("_backward")})
    print(f"\nops: {', '.join(ops)}")
    print(f"forced by {backends.forced_by() or 'nobody: the choice is automatic'}")
    return 0


def implementations(device: str) -> Iterator[tuple[str, str]]:
    """Each implementation, and whether it runs on a kind of device: no op is an exception."""
    with warnings.catch_warnings(action="ignore"):  # that native is missing stands below
        used = backends.choose("info", device, torch.float32)
    for name in backends.NAMES:
        reason = backends.why_not(name, device, torch.float32)
        slowly = " (slow, plain PyTorch)" if name == "reference" else ""
        yield name, f"no: {reason}" if reason else f"used{slowly}" if name == used else "can run"


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
        module = _extension.extension()
        result["native CPU"] = (
            f"built; calls cost more, since reg_kernels._C does not load: {_extension.why_not()}"
            if module is None
            else f"{module.isa()} (of {', '.join(module.isas())}), built by {module.compiler} "
            f"for torch 2.11 and later (headers of {module.torch_version_built_with})"
        )
        if note := backends.build_facts().get("native_note"):
            result["native CPU"] += f"; {note}"
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
    for extra in _extras.EXTRAS:
        lacking = _extras.missing(extra)
        remedy = f"lacks {', '.join(lacking)}: {_extras.remedy(lacking)}"
        result[f"extra {extra}"] = remedy if lacking else "installed"
    return result
