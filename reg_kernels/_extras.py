"""What the package can do without, by the extra of pyproject.toml that brings it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

# The base install has torch alone. By the names that are imported.
EXTRAS = {
    "cli": ("rich",),
    "augment": ("PIL", "matplotlib", "numpy", "rich"),
    "train": ("PIL", "matplotlib", "numpy", "rich", "sklearn"),
    "compare": ("PIL", "matplotlib", "numpy", "optuna", "rich", "sklearn"),
    "tensorboard": ("tensorboard",),
}
# By the name that pip knows, where that is another one.
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


class MissingExtra(ImportError):
    """Something that an extra would have brought is not there; the message says what to install."""


def missing(extra: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def remedy(modules: Sequence[str]) -> str:
    """What brings modules, however reg_kernels itself was installed."""
    return " ".join(["pip install", *(_DISTRIBUTIONS.get(name, name) for name in modules)])


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
            f"{what} needs {', '.join(lacking)}, not installed here: {remedy(lacking)}"
        )
