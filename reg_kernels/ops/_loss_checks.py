"""What a loss of logits has to be given: torch's error types first, then what its ops' entries ask
for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import DTYPES, computed_in, named
from .._layout import with_strides
from .._mixed_target import MixedTarget
from .._numbers import integer, number, traced_numbers, varies
from ._checks import (
    Entry,
    check_device,
    check_dtype,
    check_reduction,
    check_shares,
    check_tensor,
    checked_shares,
    described,
    has_layout_of,
    probability,
    refuse,
)
from ._modes import COMPILE, watcher
from ._route import in_order

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # torch's numbers
NONE = _REDUCTIONS["none"]


class Target(NamedTuple):
    """A target as the ops take it: TARGET's first four."""

    labels: Tensor | None  # None: no loss of labels
    partner: Tensor | None
    lam: Tensor | None
    one_lam: float


class Options(NamedTuple):
    """What else the ops are told of a loss: TARGET's others."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: int
    traced_smoothing: Tensor | None


class CheckedLoss(NamedTuple):
    """What a loss was called with, checked, as the ops take it."""

    input: Tensor  # (N, C, ...)
    target: Target
    options: Options
    result: torch.dtype
    batched: bool
    looks: str | None  # a watcher

    @property
    def arguments(self) -> tuple[Any, ...]:
        """TARGET's values."""
        return (*self.target, *self.options)


def checked_call(
    name: str,
    input: Tensor,
    target: Any,  # a Tensor, a MixedTarget or None
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    *,
    needs_target: bool = True,
) -> CheckedLoss:
    """The call as the ops take it; raises what torch raises for the same mistake.

    What the values of labels and shares are is looked at when the op runs: `run`.
    """
    check_logits(name, "input", input)
    check_reduction(name, reduction)
    if type(ignore_index) is not int:
        ignore_index = integer(name, "ignore_index", ignore_index)
    mixed = isinstance(target, MixedTarget)
    if mixed:
        both = (target.label_smoothing, label_smoothing)
        label_smoothing = _one_smoothing(name, *(number(name, "label_smoothing", x) for x in both))
    if type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0:
        label_smoothing = probability(name, "label_smoothing", label_smoothing, RuntimeError)
    batched = input.dim() > 1
    if not batched:
        input = input.unsqueeze(0)
    looks = watcher()
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    device = input.device.type
    autocasts = device != "meta" and torch.is_autocast_enabled(device)
    result = compute if autocasts else input.dtype
    if target is None and not needs_target:
        checked, weight, label_smoothing = Target(None, None, None, 1.0), None, 0.0
    elif mixed:
        checked = _checked_mixed(name, input, target, batched)
    elif isinstance(target, Tensor):
        if target.is_floating_point() and target.dim() == input.dim() - (not batched):
            target = target if batched else target.unsqueeze(0)
            checked = Target(_checked_probabilities(name, input, target), None, None, 1.0)
            result = torch.promote_types(result, target.dtype)
            if ignore_index >= 0:
                raise RuntimeError(
                    f"{name}: ignore_index is for class indices, got {ignore_index} with class "
                    "probabilities: leave it out"
                )
            if target.dtype == torch.float64:
                input, compute = input.double(), torch.float64
        else:
            labels = _checked_labels(name, "target", input, target, batched)
            checked = Target(labels, None, None, 1.0)
    else:
        check_tensor(name, "target", target, "a Tensor or a MixedTarget")
    if weight is not None:
        check_tensor(name, "weight", weight)
        if weight.shape != input.shape[1:2]:
            raise RuntimeError(
                f"{name}: weight must have one number for each of the {input.shape[1]} classes, "
                f"got shape {tuple(weight.shape)}"
            )
        check_device(name, "weight", weight, input)
        weight = weight.to(compute).contiguous()
    traced = None
    if looks is COMPILE and varies(label_smoothing):
        traced, label_smoothing = traced_numbers(input.device, label_smoothing), 0.0
    options = Options(weight, ignore_index, label_smoothing, _REDUCTIONS[reduction], traced)
    input = in_order(input, looks)
    if checked.labels is not None and checked.labels.is_floating_point():
        # The kernels walk both in one order.
        checked = checked._replace(labels=with_strides(checked.labels, input.stride()))
    return CheckedLoss(input, checked, options, result, batched, looks)


def check_logits(name: str, argument: str, x: Any) -> None:
    check_tensor(name, argument, x)
    if x.dtype not in DTYPES:
        check_dtype(name, argument, x.dtype, NotImplementedError)
    if x.dim() == 0:
        raise RuntimeError(f"{name}: {argument} must be (N, C, ...) or (C,), got no dimensions")


def _one_smoothing(name: str, targets: float, own: float) -> float:
    if targets and own and targets != own:
        raise ValueError(
            f"{name}: label_smoothing must be given once, by the loss or by the target: "
            f"got {own} and {targets}"
        )
    return targets or own


def _checked_labels(name: str, argument: str, input: Tensor, labels: Any, batched: bool) -> Tensor:
    """Class indices (N, ...) as int64."""
    check_tensor(name, argument, labels)
    check_device(name, argument, labels, input)
    if labels.dtype not in (torch.int64, torch.uint8):
        must = "int64 class indices, or probabilities of the input's shape"
        refuse(name, argument, must, f"{named(labels.dtype)} of shape {tuple(labels.shape)}")
    given = labels.shape
    if not batched and given != (1,):
        labels = labels.unsqueeze(0)
    sizes = input.shape
    expected = (sizes[0], *sizes[2:])
    if labels.shape != expected:
        given = tuple(given)
        other_batch = given[:1] != expected[:1] and (batched or len(given) == 1)
        kind = ValueError if other_batch else RuntimeError
        raise kind(f"{name}: {argument} must have shape {expected if batched else ()}, got {given}")
    if labels.dtype != torch.int64:
        labels = labels.long()
    return labels.contiguous()


def _checked_probabilities(name: str, input: Tensor, target: Tensor) -> Tensor:
    check_device(name, "target", target, input)
    if target.shape != input.shape:
        kind = ValueError if len(target) != len(input) else RuntimeError
        raise kind(
            f"{name}: target must have the input's shape, {tuple(input.shape)}, for class "
            f"probabilities, got {tuple(target.shape)}"
        )
    compute = computed_in(input.dtype)
    if target.dtype not in (input.dtype, compute, torch.float64):
        target = target.to(compute)
    return target


def _checked_mixed(name: str, input: Tensor, target: MixedTarget, batched: bool) -> Target:
    labels = _checked_labels(name, "labels", input, target.labels, batched)
    partner = _checked_labels(name, "partner_labels", input, target.partner_labels, batched)
    lam = target.lam
    if not isinstance(lam, Tensor):
        lam = probability(name, "lam", lam)
        if torch.compiler.is_compiling():
            return Target(labels, partner, traced_numbers(input.device, lam), 1.0)
        return Target(labels, partner, None, lam)
    return Target(labels, partner, checked_shares(name, lam, input), 1.0)


def check_values(name: str, call: CheckedLoss) -> None:
    """Raises what torch raises where a label or a share is out of range."""
    classes = call.input.shape[1]
    labels, partner, lam, _ = call.target
    ignore_index = call.options.ignore_index
    for each in (labels, partner):
        if each is None or each.is_floating_point():
            continue
        wrong = each[((each < 0) | (each >= classes)) & (each != ignore_index)]
        if wrong.numel():
            must = f"in [0, {classes}), or ignore_index {ignore_index}"
            refuse(name, "labels", must, int(wrong[0]), IndexError)
    if lam is not None:
        check_shares(name, lam)


# Entries


def check_entry(op: str, a: Any, stats: int, of_backward: bool) -> Entry:
    """What a loss op, or its backward, takes of the logits and their target; `stats` are the
    numbers that it keeps for each position."""
    x = a.input
    entry = Entry(op, x)
    entry.check_floats(x, "input")
    entry.check_channels(x)
    entry.check_memory(x, "input")
    if a.reduction not in (0, 1, 2):
        entry.refuse("reduction", "0, 1 or 2", a.reduction)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = x.shape[0] * math.prod(x.shape[2:])
    if a.weight is not None:
        entry.check_vector(a.weight, compute, x.shape[1], "weight")
    if a.lam is not None and a.partner is None:
        entry.refuse("lam", "None without a partner", a.lam)
    if a.traced_smoothing is not None:
        entry.check_vector(a.traced_smoothing, torch.float64, 1, "traced_smoothing")
    _check_target(entry, a, compute, positions)
    if of_backward:
        of_loss = 1 if a.reduction else positions
        entry.check_vector(a.grad_output, compute, of_loss, "grad_output")
        entry.check_vector(a.stats, compute, stats * positions, "stats")
    return entry


def _check_target(entry: Entry, a: Any, compute: torch.dtype, positions: int) -> None:
    target, partner = a.target, a.partner
    if target is None:
        if partner is not None:
            entry.refuse("partner", "None without a target", partner)
        return
    if target.dtype != torch.int64:
        if target.dtype not in (a.input.dtype, compute) or not has_layout_of(a.input, target):
            must = f"int64 labels, or probabilities like the input, {described(a.input)}"
            entry.refuse("target", must, target)
        if partner is not None:
            entry.refuse("partner", "None with probabilities", partner)
        entry.check_memory(target, "target")
        return
    entry.check_vector(target, torch.int64, positions, "target")
    if partner is not None:
        entry.check_vector(partner, torch.int64, positions, "partner")
    if a.lam is not None:
        entry.check_shares(a.lam, a.input.shape[0])
