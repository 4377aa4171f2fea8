"""What the package can do without, by the extra of pyproject.toml that brings it."""

from __future__ import annotations

import importlib.util

# The base install has torch alone. By the names that are imported.
EXTRAS = {
    "cli": ("rich",),
    "augment": ("PIL", "matplotlib", "numpy"),
    "train": ("PIL", "matplotlib", "numpy", "rich", "sklearn"),
    "compare": ("PIL", "matplotlib", "numpy", "optuna", "rich", "sklearn"),
    "tensorboard": ("tensorboard",),
}


class MissingExtra(ImportError):
    """Something that an extra would have brought is not installed; the message names the extra."""


def missing(extra: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def remedy(extra: str) -> str:
    """What brings an extra."""
    return f"pip install '.[{extra}]' in the folder of reg_kernels"


def require(what: str, extra: str, *modules: str) -> None:
    """Raises MissingExtra where `what` cannot be had for want of `modules`, or of any of the extra.

    Args:
        what: the command or option that asks.
        extra: the one that brings the modules.
        modules: those of the extra that it takes; by default all.
    """
    lacking = [name for name in missing(extra) if not modules or name in modules]
    if lacking:
        raise MissingExtra(
            f"{what} needs {', '.join(lacking)}, not installed here: {remedy(extra)}"
        )
