"""What a step knows of its optimizer, and what groups and states hold beyond torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# State that torch's optimizers do not have: `swapped_out` is the parameter itself, while its
# average stands in its place.
OWN_STATE = ("ema", "compensation", "swapped_out")
# What state there can be of a parameter's shape.
STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", *OWN_STATE)

# Options that torch's optimizers do not have, and what they are in a group that does not name them:
# so a group has torch's keys alone until more is asked for. Of `decay`: as its optimizer has it.
OPTIONS = {
    "decay": None,
    "decay_lr": None,
    "l1": 0.0,
    "ema_decay": None,
    "rounding": "nearest",
    "state_dtype": None,
}

Group = dict[str, Any]


def option(group: Group, name: str) -> Any:
    """An option of OPTIONS, as a group has it."""
    return group.get(name, OPTIONS[name])


@dataclass(frozen=True)
class Algorithm:
    """An optimizer's algorithm."""

    kind: str  # of ops/optimizer_step.py's ALGORITHMS
    decay: str  # by default, one of its DECAYS
    counts: bool  # whether torch's keeps a `step` in its state
    required: tuple[str, ...]  # what torch's keeps there as soon as it keeps anything
    moments: Callable[[Group], tuple[str, ...]]  # state that goes into the moments' rows, in order
    rates: Callable[[Group], tuple[float, float, float]]  # beta1, beta2, eps as kernels take them
    optimizer: str = ""  # the class's name, for messages

    def decay_of(self, group: Group) -> str:
        """The kind of decay: one of DECAYS, or what somebody has put there instead."""
        # Adam's flag of torch makes it AdamW where our own word is not there.
        decoupled = self.decay == "l2" and group.get("decoupled_weight_decay")
        return option(group, "decay") or ("decoupled" if decoupled else self.decay)

    def check_complete(self, where: str, state: dict[str, Any], *more: str) -> None:
        """Raises KeyError where state lacks what torch's never goes without."""
        if not state.keys() - set(OWN_STATE):
            return
        for key in (*self.required, *more):
            if state.get(key) is None:
                found = ", ".join(map(str, state))
                raise KeyError(f"{self.optimizer}: {key} of {where} is missing, got {found}")
