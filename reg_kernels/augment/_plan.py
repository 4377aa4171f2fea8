"""Where each transform of a pipeline has its draws and its columns of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._numbers import refuse
from . import _draws
from ._transform import Transform

KEYS = ("index", "epoch", "height", "width")  # of the parameters, before the transforms'


class Step(NamedTuple):
    """A transform in its place in the parameters and the draws."""

    transform: Transform
    name: str
    word: int  # the first of its words
    has_flag: bool  # whether its first column says where it applies


class Plan(NamedTuple):
    steps: tuple[Step, ...]
    columns: tuple[str, ...]
    groups: Tensor  # slot << 8 | number, (G,)
    described: str


def plan_of(transforms: Sequence[Transform], last: Sequence[str] = ()) -> Plan:
    """Slots go by a transform's kind and its number among its kind, so that no other transform's
    draws shift where one is put in or left out. `last` are columns after the transforms'."""
    counts: dict[str, int] = {}
    taken: set[int] = set()
    steps: list[Step] = []
    columns, groups = list(KEYS), list[int]()
    for transform in transforms:
        kind = type(transform).__name__
        counts[kind] = counts.get(kind, 0) + 1
        name = kind if counts[kind] == 1 else f"{kind}{counts[kind]}"
        slot = _draws.slot_of(name)
        while slot in taken:
            slot = (slot + 1) % _draws.SLOTS
        taken.add(slot)
        has_flag = transform.p < 1
        own = (*(("applied",) if has_flag else ()), *transform.columns)
        own = tuple(f"{name}.{column}" for column in own)
        needed = transform.needed_words
        # The first word is for p, whether there is one or not: p may change, and nothing shifts.
        count = -(-(1 + needed) // 4) if has_flag or needed else 0
        if count > _draws.MOST_GROUPS:
            refuse(name, "draws", f"{4 * _draws.MOST_GROUPS} numbers at most", needed, ValueError)
        steps.append(Step(transform, name, 4 * len(groups), has_flag))
        columns += own
        groups += [slot << 8 | number for number in range(count)]
    table = torch.tensor(groups, dtype=torch.int64, device="cpu")
    return Plan(tuple(steps), (*columns, *last), table, repr([*transforms]))
