"""What the table finds fault with, and the reasons of what is left as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VECTOR = 16  # bytes: the widest access of a thread that every architecture has
LEAST_OCCUPANCY = 25  # percent

SPILLS, OCCUPANCY, NARROW, INSTRUCTIONS = "stack", "occupancy", "narrow", "instructions"


@dataclass(frozen=True)
class Finding:
    kernel: str  # "source kernel<...>"
    architecture: int
    what: str
    detail: str

    @property
    def reason(self) -> str | None:
        """Why it is left as it is, where that is written down."""
        for what, pattern, reason in EXPLAINED:
            if what == self.what and re.search(pattern, self.kernel):
                return reason
        return None


# (what, pattern of "source kernel<...>", why). The first that fits counts.
EXPLAINED: list[tuple[str, str, str]] = [
    (
        INSTRUCTIONS,
        r"^cuda/dropout dropout_kernel<(b?float16)>",
        "Ten Philox rounds for eight elements are the contract; 16 bits an element is their least.",
    ),
    (
        INSTRUCTIONS,
        r"^cuda/dropout feature_dropout_kernel",
        "Every vector of 16 bytes finds its channel by a division and draws for itself: some 290 "
        "instructions. Vectors of one channel could share both; not done yet.",
    ),
    (
        NARROW,
        r"planes_(backward_)?kernel",
        "A thread takes a position and its neighbour the next: a plane may begin anywhere, and a "
        "warp reads whole sectors of it.",
    ),
    (
        NARROW,
        r"mixup_(kernel|transpose_kernel)<\d, (?!(.+), \1>)",
        "As many elements of the shorter type as fill 16 bytes of the longer.",
    ),
    (NARROW, r"count_batch_kernel", "It adds 1 to one number."),
    (NARROW, r"target_sums_kernel", "It reads labels, int64, one a thread: no logits."),
    (
        NARROW,
        r"optimizer_step_kernel<\d, (b?float16, float|float, bfloat16)>",
        "As many elements of 16 bits as fill 16 bytes in the array of 32 bits beside them.",
    ),
]


def findings(row: dict[str, Any]) -> Iterator[Finding]:
    """Of one kernel instance on one architecture."""
    kernel, architecture = f"{row['source']} {row['kernel']}", row["architecture"]

    def found(what: str, detail: str) -> Finding:
        return Finding(kernel, architecture, what, detail)

    if row["stack"]:
        yield found(SPILLS, f"{row['stack']} B of stack a thread")
    if row["limit"] == "registers" and row["occupancy"] < LEAST_OCCUPANCY:
        yield found(OCCUPANCY, f"{row['occupancy']} % by {row['registers']} registers")
    for hot in row["hot"]:
        for kind in ("loads", "stores"):
            widths = [int(width) for width in hot[kind]]
            if widths and min(widths) < VECTOR:
                yield found(NARROW, f"{kind} of {min(widths)} B")
        for gpu, (share, pipe) in hot["bounds"].items():
            if share < 1:
                yield found(INSTRUCTIONS, f"{gpu}: {share:.2f} of the bandwidth ({pipe})")
