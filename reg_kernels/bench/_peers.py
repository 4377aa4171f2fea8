"""Other libraries that are contenders where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from ._measure import Skipped

LIGER, OPTIMI, TIMM = "liger", "optimi", "timm"


def peer(
    name: str, module: str, file: str | None = None, remedy: str = "make bench-peers"
) -> ModuleType | Skipped:
    """The module of the peer `name`, or why it is no contender.

    Args:
        name: the contender's name.
        module: the module to import.
        file: a file of the package `module` to load alone: importing the package may need what
            does not run beside every build of torch.
        remedy: what installs it.
    """
    try:
        return importlib.import_module(module) if file is None else _alone(module, file)
    except ImportError as error:
        return Skipped(name, f"not installed ({error}): {remedy}")
    except Exception as error:  # one that breaks when it is loaded is not the end of a benchmark
        return Skipped(name, f"does not load ({type(error).__name__}: {error})")


def _alone(package: str, file: str) -> ModuleType:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    path = Path(found.origin).parent / file
    if not path.exists():
        raise ImportError(f"{package} has no {file}")
    spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
