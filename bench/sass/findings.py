"""The faults that are looked for in the table, and the reasons why some of them are left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VECTOR = 16  # bytes: the widest access of a thread that every architecture has
LEAST_OCCUPANCY = 25  # percent

SPILLS, OCCUPANCY, NARROW, INSTRUCTIONS = "stack", "occupancy", "narrow", "instructions"
WIDEST = "widest"


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


OF_21_CLASSES = "Open: in planes of 21 classes a tile holds all classes of its positions."

# (what, pattern of "source kernel<...>", why). The first that fits counts. "Open:" marks a true
# finding that nobody has mended or measured yet.
EXPLAINED: list[tuple[str, str, str]] = [
    (
        INSTRUCTIONS,
        r"^cuda/dropout elements_kernel<.*(b?float16)>|^triton/dropout elements_kernel",
        "Ten Philox rounds for eight elements are the contract; 16 bits an element is their least.",
    ),
    (
        INSTRUCTIONS,
        r"^cuda/(gaussian_noise|uniform_noise|salt_and_pepper) elements_kernel",
        "Ten Philox rounds for four elements, or for eight of 16 bits, are the contract, as is the "
        "normal pair's formula, whose products and sums are rounded apart.",
    ),
    (
        NARROW,
        r"^cuda/drop_path channels_kernel<.*true>",
        "A layer scale's factors, one a channel, which the caches hold; the elements are moved 16 "
        "bytes at a time.",
    ),
    (
        INSTRUCTIONS,
        r"drop(out|_path) (channels|rows)_kernel",
        "Open: every vector of 16 bytes finds its channel and draws for itself, some 290 "
        "instructions in CUDA. Vectors of one channel could share both.",
    ),
    (
        INSTRUCTIONS,
        r"distillation",
        "Two exponentials an element, of student and teacher, and their sums: for 2-byte logits "
        "more than the memory of the fastest leaves time for.",
    ),
    (
        INSTRUCTIONS,
        r"^triton/cross_entropy loss_kernel",
        "An exponential an element, its sum and the target's share: for 2-byte logits more than "
        "the memory of the fastest leaves time for.",
    ),
    (
        INSTRUCTIONS,
        r"^triton/optimizer_step \w+<bfloat16> (adamw kahan|sgdw stochastic)",
        "Open: such rounding takes more than the bytes of 2-byte moments leave time for; in CUDA "
        "the same step has instructions to spare.",
    ),
    (
        INSTRUCTIONS,
        r"^cuda/mixup(_backward)? mixup_(kernel|transpose_kernel)<\d, (?!(.+), \1>)",
        "Every element changes its type, in and out by way of float, besides the blend; as many "
        "are taken at once as fill 16 bytes of the longer type.",
    ),
    (
        INSTRUCTIONS,
        r"^cuda/mixup mixup_pairs_kernel<b?float16>",
        "Open: the two of a pair are blended both ways, each with a conversion in and out.",
    ),
    (
        INSTRUCTIONS,
        r"^cuda/cross_entropy planes_(backward_)?kernel",
        "Open: a thread takes one element of each plane, an address and a conversion for 2 bytes. "
        "Two positions a thread, where the planes allow it, would share the addresses.",
    ),
    (
        INSTRUCTIONS,
        r"^cuda/penalty penalty_kernel<\d, b?float16>",
        "An element of 2 bytes is converted, its absolute value or square taken and added to a "
        "sum: just more than the memory of the fastest leaves time for.",
    ),
    (
        INSTRUCTIONS,
        r"adversarial_step (adversarial_)?linf_kernel<",
        "Open: of 2 bytes three elements are converted in, one out, and that one is held to the "
        "ball by integers; in Triton each has the numbers of its channel besides.",
    ),
    (
        INSTRUCTIONS,
        r"adversarial_step (adversarial_)?ball_kernel<",
        "Open: in two of a sample's three passes a square or magnitude of each element is made and "
        "summed up in float64.",
    ),
    (
        INSTRUCTIONS,
        r"batch_norm (batch_norm_kernel<b?float16|moments_kernel<bfloat16)",
        "Open: each of eight 2-byte elements in 16 bytes is converted, shifted and added to two "
        "sums. Sums of pairs would halve the additions.",
    ),
    (
        NARROW,
        r"planes_(backward_)?kernel",
        "A thread takes a position and its neighbour the next: a plane may begin anywhere, and a "
        "warp reads whole sectors of it.",
    ),
    (
        NARROW,
        r"mixup_(kernel|transpose_kernel)<\d, (?!(.+), \1>)|rows_kernel<DistillationLoss|"
        r"rows_backward_kernel<Distillation",
        "As many elements of the shorter type as fill 16 bytes of the longer.",
    ),
    (
        NARROW,
        r"^triton/adversarial_step linf_kernel",
        "A step size and a radius, float64, one a program; the elements are moved 16 bytes at a "
        "time.",
    ),
    (NARROW, r"subset subset_kernel<", "A sample's number, int64, is read once a tile."),
    (NARROW, r"count_batch_kernel", "It adds 1 to one number."),
    (NARROW, r"^cuda/batch_norm batch_norm_ranks_kernel", "Statistics, float64, one a channel."),
    (
        NARROW,
        r"^cuda/augment augment_upload_kernel",
        "It writes programs, some hundred bytes a sample, which are its argument.",
    ),
    (NARROW, r"write_group_kernel", "It writes ten numbers."),
    (NARROW, r"target_sums_kernel", "It reads labels, int64, one a thread: no logits."),
    (
        NARROW,
        r"optimizer_step_kernel<\d, (b?float16, float|float, bfloat16)>",
        "As many elements of 16 bits as fill 16 bytes in the array of 32 bits beside them.",
    ),
    (
        NARROW,
        r"^cuda/mixup mixup_(pairs|walk)_kernel",
        "Partners and places in the permutation, int64; the elements themselves are moved 16 bytes "
        "at a time, but in a row's odd ends.",
    ),
    (
        NARROW,
        r"^triton/mixup ",
        "Partners, int64, one or two a program; the elements are moved 16 bytes at a time.",
    ),
    (
        NARROW,
        r"^triton/(cross_entropy|distillation) \w+_kernel<\w+> planes",
        "A tile's positions are few beside its classes, so that a thread holds four of a plane; "
        "labels, int64, besides.",
    ),
    (
        NARROW,
        r"^triton/(cross_entropy|distillation) loss\w*_kernel",
        "Labels, int64, one a row; and of a tile of 1,024 classes a thread of 256 holds four, "
        "which are 8 bytes of 2-byte logits.",
    ),
    (
        NARROW,
        r"^triton/batch_norm ",
        "Sums and parameters, one a channel; the elements are moved 16 bytes at a time.",
    ),
    (
        OCCUPANCY,
        r"^cuda/cross_entropy short_rows_kernel<true",
        "A thread holds a whole row in registers, so that it is read once; not measured against "
        "reading it twice.",
    ),
    (
        OCCUPANCY,
        r"^triton/\w+ label_totals_kernel",
        "Open: it reads labels and their weights alone, a small part of a loss's bytes.",
    ),
    (
        WIDEST,
        r"^triton/batch_norm (backward_kernel<\w+> (inference|of ranks)|(merge|ranks)_kernel)",
        "It merges what is of channels; the elements have been moved by another kernel.",
    ),
    (
        WIDEST,
        r"^triton/distillation loss\w*_kernel<b?float16>",
        "Of a tile of 1,024 classes a thread of 256 holds four, 8 bytes of 2-byte logits.",
    ),
    (
        OCCUPANCY,
        r"^triton/(cross_entropy|distillation) \w+<\w+> \w+\[4x21x65x67 ",
        OF_21_CLASSES,
    ),
    (
        OCCUPANCY,
        r"^triton/batch_norm \w+<\w+> batch_norm(_sums|_backward)?\[",
        "Open: a program keeps a tile of the whole chain in registers, with an activation's slope "
        "and dropout's draws; not measured against smaller tiles.",
    ),
    (SPILLS, r"^triton/cross_entropy \w+<\w+> \w+\[4x21x65x67 ", OF_21_CLASSES),
    (
        SPILLS,
        r"^triton/cross_entropy loss_kernel<float(64|32)> \w+\[(\dx50257|5x8193) ",
        "Open: up to 16 bytes of rows that are kept whole in float64, and of probabilities.",
    ),
    (SPILLS, r"^triton/distillation loss_kernel<float16> \w+\[3x50257 ", "Open: 8 bytes."),
    (
        OCCUPANCY,
        r"^triton/adversarial_step ball_kernel<float64>",
        "Open: a tile of three tensors in float64, with the numbers of its channels; not measured "
        "against smaller tiles.",
    ),
    *(
        (
            what,
            r"^triton/augment ",
            "A pixel is read a channel at a time from where its crop or matrix puts it, by taps of "
            "8 bytes; the others are a program's numbers and statistics.",
        )
        for what in (NARROW, WIDEST)
    ),
    (
        SPILLS,
        r"^triton/augment segments_kernel",
        "Open: up to 24 bytes, of addresses that rare instructions need.",
    ),
    (SPILLS, r"^triton/adversarial_step (ball|linf)_kernel<float32>", "Open: 8 bytes."),
    (SPILLS, r"^triton/batch_norm \w+_kernel", "Open: 8 bytes."),
    (SPILLS, r"^triton/optimizer_step optimizer_step_kernel<bfloat16>", "Open: 8 bytes."),
]


def findings(row: dict[str, Any]) -> Iterator[Finding]:
    """The findings about one kernel instance on one architecture."""
    kernel, architecture = f"{row['source']} {row['kernel']}", row["architecture"]

    def found(what: str, detail: str) -> Finding:
        return Finding(kernel, architecture, what, detail)

    if row["stack"]:
        yield found(SPILLS, f"{row['stack']} B of stack a thread")
    if row["limit"] == "registers" and row["occupancy"] < LEAST_OCCUPANCY:
        yield found(OCCUPANCY, f"{row['occupancy']} % by {row['registers']} registers")
    loads = row.get("widths", {}).get("load", {})
    if row["source"].startswith("triton/") and loads and max(map(int, loads)) < VECTOR:
        yield found(WIDEST, f"loads of {max(map(int, loads))} B at most")
    for hot in row["hot"]:
        for kind in ("loads", "stores"):
            widths = [int(width) for width in hot[kind]]
            if widths and min(widths) < VECTOR:
                yield found(NARROW, f"{kind} of {min(widths)} B")
        for gpu, (share, pipe) in hot["bounds"].items():
            if share < 1:
                yield found(INSTRUCTIONS, f"{gpu}: {share:.2f} of the bandwidth ({pipe})")
