"""Ranks that differ, or get NaN: found out on all ranks at once, with an error that names them."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn

from .._dtensor import is_dtensor
from .._rank_error import RankError, named
from ._guard import raise_known_faults
from ._ranks import Group, StoreLost, digest, gather

_PLAIN = (str, bytes, int, float, type(None), torch.dtype, torch.device)
_NOTHING = "nothing"
_MARGIN = 5.0  # seconds past its timeout, in which a check hears of who came
_LISTED = 3  # facts or values, before a message counts the others

# A fact as the ranks compare it: the text of a value, or of each value of a sequence.
Text = str | list[str]


def check_alike(
    *,
    process_group: dist.ProcessGroup | None = None,
    timeout: float | None = None,
    **facts: Any,
) -> None:
    """Raises an error on each rank unless all ranks give the same facts.

    ``check_alike(batches=len(loader), parameters=parameters_of(model), seed=seed)`` before an
    epoch ends with an error what would hang in a collective, or train ranks apart: ``check_alike:
    batches must be the same on all ranks, got 12 on ranks 0 and 2, 11 on rank 1``. Of a sequence
    the first element that differs is named.

    The ranks compare through the group's store, on any backend, without a collective and without
    a device. It takes a few milliseconds, which is for once an epoch and not for each step. All
    ranks call it equally often. It does nothing without a process group, or in a group of one.

    Args:
        process_group: The group that compares; None is the default group.
        timeout: Seconds in which each rank has to come; None is the group's timeout.
        facts: Names and values: a number, a string, None, a dtype, a device, or a sequence of
            such. Two values are alike if their ``repr`` is the same, so NaN is like NaN.

    Raises:
        RankError: On every rank. Its ``ranks`` are those whose facts are not the most frequent
            ones (in a tie, not the lowest rank's), or that did not come.
        TypeError: If a fact is neither plain nor a sequence of plain values.
        ValueError: If ``timeout`` is not positive.
    """
    texts = {name: _text(name, value) for name, value in facts.items()}
    if timeout is not None and not timeout > 0:
        raise ValueError(f"check_alike: timeout must be positive, got {timeout}")
    group = Group.of(process_group, "check_alike")
    if group is not None:
        seconds = timeout or group.timeout
        try:
            group.ask(seconds + _MARGIN, lambda: _compare(group, texts, seconds))
        except StoreLost as error:
            raise group.lost(error) from error


def parameters_of(module: nn.Module) -> list[str]:
    """Name, shape and dtype of each parameter of ``module``, as a fact for :func:`check_alike`.

    The shape of a DTensor is that of the whole tensor: shards of one model are alike.

    Args:
        module: A model, wrapped or not.

    Returns:
        A list of str, one a parameter, in the model's order.
    """
    return [
        f"{name} {tuple(parameter.shape)} {parameter.dtype}"
        for name, parameter in module.named_parameters()
    ]


class FiniteCheck:
    """Ends training on all ranks when the loss of one is NaN or infinite, and names it.

    Call it with each step's loss. It keeps a copy of the value on its device, and after ``every``
    calls reads them all: one host synchronisation and one all_gather of two numbers. So the error
    comes up to ``every`` steps late, yet names the first step that went wrong, on all ranks at the
    same call. All ranks call it equally often. Without a process group it checks this process.

    Args:
        every: Calls between two readings; 1 waits for each step's loss.
        process_group: The group that trains; None is the default group.
        name: What the value is, for the message.

    Raises:
        ValueError: If ``every`` is less than 1.

    Example:
        >>> finite = FiniteCheck(every=50)
        >>> for step in range(100):
        ...     finite(torch.tensor(0.5), step)
        >>> finite.read()
    """

    def __init__(
        self,
        *,
        every: int = 50,
        process_group: dist.ProcessGroup | None = None,
        name: str = "loss",
    ) -> None:
        if every < 1:
            raise ValueError(f"FiniteCheck: every must be at least 1, got {every}")
        self._every = every
        self._process_group = process_group
        self._name = name
        self._pending: list[tuple[int, torch.Tensor]] = []

    def __call__(self, value: torch.Tensor | float, step: int) -> None:
        """Takes the value of ``step``, of one element, and reads when it is time.

        Raises:
            RankError: As :meth:`read` does.
            ValueError: If ``value`` has not one element.
        """
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(float(value), dtype=torch.float64)
        if is_dtensor(value):  # as of torch's loss_parallel
            value = cast(torch.Tensor, cast(Any, value.detach()).full_tensor())
        if value.numel() != 1:
            raise ValueError(
                f"FiniteCheck: value must have one element, got shape {tuple(value.shape)}"
            )
        # A copy: the next replay of a CUDA graph writes its loss to the same place.
        self._pending.append((step, value.detach().reshape(()).clone()))
        if len(self._pending) >= self._every:
            self.read()

    def read(self) -> None:
        """Looks at the values since the last reading, at the end of an epoch for example.

        Raises:
            RankError: On every rank, if a value of any rank was NaN or infinite. Its ``ranks``
                are those whose value was so in the first such step.
        """
        steps = [step for step, _ in self._pending]
        values = _read([value for _, value in self._pending])
        self._pending.clear()
        bad = [(s, v) for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]
        faults = self._of_all_ranks(bad[0] if bad else (-1, 0.0))
        if faults:
            first = min(step for _, step, _ in faults)
            wrong = [(rank, value) for rank, step, value in faults if step == first]
            raise RankError(
                f"FiniteCheck: {self._name} must be finite, got {_listed(wrong)} at step {first}",
                [rank for rank, _ in wrong],
            )

    def _of_all_ranks(self, mine: tuple[int, float]) -> list[tuple[int, int, float]]:
        """Rank, step and value of each rank that had one that was not finite."""
        group = Group.of(self._process_group, "FiniteCheck")
        if group is None:
            found = [(0, *mine)]
        else:
            # float64 holds every step up to 2^53.
            row = torch.tensor(mine, dtype=torch.float64, device=group.device)
            rows = [torch.empty_like(row) for _ in range(group.size)]
            dist.all_gather(rows, row, group=self._process_group)
            read = zip(group.global_ranks, torch.stack(rows).tolist(), strict=True)
            found = [(rank, int(step), value) for rank, (step, value) in read]
        return [fault for fault in found if fault[1] >= 0]


def _text(name: str, value: Any) -> Text:
    """A fact as ranks compare it."""
    if isinstance(value, (tuple, list)):
        return [_text_of_one(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return _text_of_one(name, value)


def _text_of_one(name: str, value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text_of_one(name, item) for item in value)})"
    if not isinstance(value, _PLAIN):
        raise TypeError(
            f"check_alike: {name} must be a number, a string, None, a dtype, a device or a "
            f"sequence of them, got {type(value).__name__}"
        )
    return value if isinstance(value, str) else repr(value)


def _compare(group: Group, facts: dict[str, Text], timeout: float) -> None:
    """Raises RankError where facts differ. Digests first: they are short, and mostly alike."""
    deadline = time.monotonic() + timeout
    # A rank counts its calls in the store, so that a new group on the same store goes on counting.
    call = group.store.add(f"alike/calls/{group.rank}", 1)
    short = digest(json.dumps(facts, sort_keys=True))
    if len(set(_of_all(group, f"alike/{call}/digest", short, deadline, timeout))) == 1:
        return
    texts = _of_all(group, f"alike/{call}/facts", json.dumps(facts), deadline, timeout)
    every = [json.loads(text) for text in texts]
    names = dict.fromkeys(name for one in every for name in one)
    differences = [d for name in names for d in _difference(name, [o.get(name) for o in every])]
    odd = {group.global_ranks[rank] for _, values in differences for rank in unusual(values)}
    said = [
        f"{name} must be the same on all ranks, "
        f"got {_listed(list(zip(group.global_ranks, values, strict=True)))}"
        for name, values in differences[:_LISTED]
    ]
    if len(differences) > _LISTED:
        said.append(f"{len(differences) - _LISTED} other facts differ")
    raise RankError(f"check_alike: {'; '.join(said)}", odd)


def _of_all(group: Group, key: str, value: str, deadline: float, timeout: float) -> list[str]:
    """What each rank says under a key."""
    gathered = gather(group, key, value, deadline, lambda: raise_known_faults(group))
    if gathered.absent:
        raise RankError(
            f"check_alike: {named(gathered.absent)} did not come within {timeout:g} s",
            gathered.absent,
        )
    return gathered.values


def _difference(name: str, values: list[Text | None]) -> Iterator[tuple[str, list[str]]]:
    """The name and the ranks' values of a fact that differs: of a sequence its first element that
    does."""
    if all(value == values[0] for value in values):
        return
    if not any(isinstance(value, list) for value in values):
        yield name, [_NOTHING if value is None else str(value) for value in values]
        return
    lists = [
        value if isinstance(value, list) else [] if value is None else [value] for value in values
    ]
    for index in range(max(map(len, lists))):
        row = [one[index] if index < len(one) else _NOTHING for one in lists]
        if len(set(row)) > 1:
            yield f"{name}[{index}]", row
            return


def unusual(values: list[str]) -> list[int]:
    """The places of what is not the most frequent value; of several such, the first one counts."""
    usual, _ = Counter(values).most_common(1)[0]
    return [place for place, value in enumerate(values) if value != usual]


def _listed(values: list[tuple[int, Any]]) -> str:
    """`12 on ranks 0 and 2, 11 on rank 1`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values:
        ranks.setdefault(str(value), []).append(rank)
    words = [f"{value} on {named(where)}" for value, where in ranks.items()]
    if len(words) > _LISTED:
        others = [rank for where in list(ranks.values())[_LISTED:] for rank in where]
        words[_LISTED:] = [f"others on {named(sorted(others))}"]
    return ", ".join(words)


def _read(values: list[torch.Tensor]) -> list[float]:
    """Their values, those of a device and dtype by one wait."""
    if len({(value.device, value.dtype) for value in values}) == 1:
        return torch.stack(values).tolist()
    return [float(value) for value in values]
