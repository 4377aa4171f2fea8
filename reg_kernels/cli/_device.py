"""`--device` and `--backend`: where a command runs, and which implementations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import backends
from ._errors import UsageError


def device_from(name: str | None) -> torch.device:
    """The device that `--device` names; by default the GPU where torch sees one."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UsageError(f"--device {name}: torch sees {found} GPUs here")
    return device


def forced_implementations(given: Sequence[str | None], device: torch.device) -> list[str]:
    """Those that `--backend` names, else the one that REG_KERNELS_BACKEND does, if any. Each can
    run on the device."""
    names, source = [name for name in given if name is not None], "--backend "
    if not names and (name := backends.forced_by()) is not None:
        names, source = [name], "REG_KERNELS_BACKEND="
    for name in names:
        if (reason := backends.why_not(name, device.type, torch.float32)) is not None:
            raise UsageError(f"{source}{name} cannot run on {device.type}: {reason}")
    return names
