"""What a measurement states of its machine and its software."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends

# glibc hands freed large blocks back to the kernel. Each new one then costs page faults, which take
# up to ten times as long as writing to it. With these settings glibc keeps freed blocks.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
PEERS = ("timm", "torch-optimi", "liger-kernel")  # packages of possible contenders
COMMIT = "REG_KERNELS_COMMIT"  # names the commit where the sources are no git checkout

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (".", ":(exclude)bench/results")


def allocator() -> dict[str, str] | None:
    """The allocator's settings, or None where they are not those of ALLOCATOR."""
    return dict(ALLOCATOR) if ALLOCATOR.items() <= os.environ.items() else None


def has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, date, device, versions and settings, as JSON holds them."""
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": facts_of(device),
        "versions": {
            "reg_kernels": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "python": platform.python_version(),
            **{name: _version(name) for name in PEERS},
        },
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
    }


def commit() -> dict[str, Any] | None:
    """The commit of the sources and whether they differ from it; None where nobody knows.

    "dirty" is None where the commit is taken from the environment and cannot be verified.
    """
    head = _output("git", "-C", str(_ROOT), "rev-parse", "--show-toplevel", "HEAD")
    root, _, revision = (head or "").partition("\n")
    # An installed package may lie inside somebody else's checkout.
    if revision and Path(root) == _ROOT:
        # Results are no sources: writing them must not make their own commit look changed.
        status = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--", *_SOURCES)
        return {"hash": revision, "dirty": bool(status)}
    if named := os.environ.get(COMMIT):
        return {"hash": named, "dirty": None}
    return None


def facts_of(device: torch.device) -> dict[str, Any]:
    """What identifies a device, as the system states it; None where the system does not."""
    if device.type == "cuda":
        return {
            "type": "cuda",
            "name": torch.cuda.get_device_name(device),
            "driver": _driver(),
        }
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    return {"type": "cpu", **_processor(cpuinfo), "isa": _isa()}


def _processor(cpuinfo: str) -> dict[str, str | None]:
    """Name, family and model: makers sell different processors under one name."""

    def told(*names: str) -> str | None:
        for name in names:
            if found := re.search(rf"^{name}\s*: *(.+)$", cpuinfo, re.MULTILINE):
                return found[1].strip()
        return None

    return {
        "name": told("model name") or platform.processor() or platform.machine(),
        "family": told("cpu family", "CPU implementer"),
        "model": told("model", "CPU part"),
    }


def folder_name(facts: dict[str, Any]) -> str:
    """A device's name as a folder's: `NVIDIA H200` becomes `nvidia-h200`, and a processor's has its
    family and model, where they are known, and the instruction set that the kernels use."""
    words = [facts["name"]]
    words += [f"{what} {facts[what]}" for what in ("family", "model") if facts.get(what)]
    words += filter(None, [facts.get("isa")])
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") or "unknown"


def _isa() -> str | None:
    """The instruction set of the CPU kernels, where they are built."""
    if backends.why_not("native", "cpu", torch.float32) is not None:
        return None
    from .. import _C

    return _C.isa()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.split("\n")[0] if versions else None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it fails, does not exist or does not come back."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
