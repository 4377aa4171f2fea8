"""Stops training that no longer gets better, and puts the best weights back."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .._numbers import integer, number, refuse
from ._weights import copied, copy_all, difference, model_tensors, shapes_of

_NAME = "EarlyStopping"
_NUMBERS = ("checks", "wait", "best", "best_check", "patience_from")  # of the state, in its order


class StopReason(enum.StrEnum):
    """Why a run stopped."""

    PATIENCE = "patience"  #: no improvement at `patience` checks in a row
    THRESHOLD = "threshold"  #: the value reached `stopping_threshold`
    DIVERGED = "diverged"  #: the value was worse than `divergence_threshold`
    NOT_FINITE = "not_finite"  #: the value was NaN or infinite


class _Reader:
    """Brings values to the host."""

    def is_late(self, value: Tensor) -> bool:
        """Whether to look at it would be to wait for it."""
        return value.device.type != "cpu"

    def start(self, values: Tensor) -> Callable[[], list[float]]:
        """Sends them on their way; what it returns waits for them."""
        if values.device.type == "cpu":
            return values.tolist
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.Event(values.device)
        event.record(torch.accelerator.current_stream(values.device))

        def wait() -> list[float]:
            event.synchronize()
            return host.tolist()

        return wait


class EarlyStopping:
    """Says when to stop, keeps the best weights and buffers, and puts them back at the end.

    `if stop(value): break` is a check, of the weights that the model has at that moment. Within
    `with EarlyStopping(...) as stop:` the best weights are put back when the block is left: after a
    stop, when the epochs are over, by an exception or by Ctrl-C.

    Args:
        model: whose parameters and buffers are kept: those of its `state_dict()`. Wrapped in
            DistributedDataParallel or by `torch.compile` it has the same names as without.
        patience: after how many checks in a row without improvement to stop. They are checks, not
            epochs. 0 stops, as 1 does, at the first one.
        min_delta: at least 0. A value improves where it beats, by more than this, the one that
            patience began to count at. So many small gains add up to an improvement.
        min_delta_mode: "abs", or "rel" for a share of that value's magnitude.
        mode: "min" where smaller values are better, "max" where larger ones are.
        start_from: how many checks come before the first that counts. Of these values only NaN and
            infinity are looked at.
        stopping_threshold: stops where the value is as good as this, or better. None: never.
        divergence_threshold: stops where the value is worse than this. None: never.
        check_finite: True stops at NaN and infinity. False takes NaN for no improvement.
        restore_best: False keeps no weights, and puts none back.
        optimizer: one of `reg_kernels.optim` with `ema_decay`. The averages that it keeps are then
            what is kept and put back, in the place of the parameters that have one; evaluate inside
            of its `ema_weights()`. Buffers are the model's as they are at the check.
        sync: True waits at each check for a value that is on a GPU.
        process_group: of the ranks that decide together; None takes all.

    Attributes:
        checks: how many there were.

    Raises:
        ValueError: a number is out of range, a word unknown, or the optimizer keeps no averages.
        TypeError: an argument is of the wrong type.
        RuntimeError: in a check or in `restore()`: parameters or buffers have other names or shapes
            than at the first check, or one is no longer averaged that was. Nothing is changed then.

    **Values on a GPU** (or another accelerator) are not waited for. The number is on its way to
    the host when the call returns, and is looked at by the next call, which answers for it: a stop
    comes one check later than with `sync=True`, at the same best value and with the same weights.
    The weights of each check are copied before it is known whether they are the best, into a second
    buffer, and the two buffers change places if they are. `stopped`, `reason`, `best`,
    `best_check`, `wait`, `state_dict()` and `restore()` wait. Values on the host are looked at at
    once; then there is one buffer, and only improvements are copied.

    **Ranks agree.** Where torch.distributed is initialised, every rank has to make each check, with
    a value of its own. The values of all ranks are gathered, in one collective, and their mean (the
    value itself, where all are equal) is what all ranks decide by. NaN on one is NaN for all. Each
    rank keeps its own buffers. A group of the rank alone keeps a run to itself.

    After a stop a call returns True and changes nothing. A run that is resumed by
    `load_state_dict` stops at the same check, with the same weights to the bit.

    A copy is a multi-tensor launch for each device and dtype (of a net with BatchNorm two: its
    counters are integers).
    """

    _reader = _Reader()

    def __init__(
        self,
        model: nn.Module,
        patience: int,
        min_delta: float = 0.0,
        min_delta_mode: str = "abs",
        mode: str = "min",
        start_from: int = 0,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_finite: bool = True,
        restore_best: bool = True,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            refuse(_NAME, "model", "a torch.nn.Module", type(model).__name__, TypeError)
        for argument, word, known in (
            ("min_delta_mode", min_delta_mode, ("abs", "rel")),
            ("mode", mode, ("min", "max")),
        ):
            if word not in known:
                refuse(_NAME, argument, " or ".join(known), repr(word), ValueError)
        self.model = model
        self.patience = _not_negative("patience", integer(_NAME, "patience", patience))
        self.min_delta = _not_negative("min_delta", number(_NAME, "min_delta", min_delta))
        self.min_delta_mode = min_delta_mode
        self.mode = mode
        self.start_from = _not_negative("start_from", integer(_NAME, "start_from", start_from))
        self.stopping_threshold = _bound("stopping_threshold", stopping_threshold)
        self.divergence_threshold = _bound("divergence_threshold", divergence_threshold)
        self.check_finite = check_finite
        self.restore_best = restore_best
        if optimizer is not None and all(
            group.get("ema_decay") is None for group in optimizer.param_groups
        ):
            refuse(
                _NAME, "optimizer", "one that keeps averages", "one without ema_decay", ValueError
            )
        self.optimizer = optimizer
        self.sync = sync
        self.process_group = process_group
        self.checks = 0
        self._wait = 0
        self._best: float | None = None
        self._best_check: int | None = None
        self._patience_from: float | None = None  # what a value has to beat by min_delta
        self._reason: StopReason | None = None
        self._pending: tuple[Callable[[], list[float]], bool] | None = None
        self._shapes: dict[str, torch.Size] | None = None
        self._averaged: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        self._of_pending: dict[str, Tensor] = {}

    def __call__(self, value: float | Tensor, *, may_stop: bool = True) -> bool:
        """A check.

        Args:
            value: what is monitored, of the weights that the model has now: a number, or a tensor
                of no dimensions.
            may_stop: False counts the check but stops for no reason, as in the first epochs of a
                run that is to have some number of them.

        Returns:
            Whether to stop.
        """
        self._settle()
        if self._reason is not None:
            return True
        live = self._live()
        weights = self._averages(live)
        numbers = _as_tensor(value)
        late = self._reader.is_late(numbers) and not self.sync
        reading = self._reader.start(self._of_all_ranks(numbers, live))
        if late:
            if self.restore_best:
                self._of_pending = copied(weights, live, self._of_pending)
            self.checks += 1
            self._pending = reading, may_stop
        else:
            found = _mean(reading())
            self.checks += 1
            self._judge(found, may_stop, lambda: copied(weights, live, self._kept))
        return self._reason is not None

    # What it found

    @property
    def stopped(self) -> bool:
        """Whether it stopped."""
        return self.reason is not None

    @property
    def reason(self) -> StopReason | None:
        """Why it stopped; None where it has not."""
        self._settle()
        return self._reason

    @property
    def best(self) -> float | None:
        """The best value, by whatever margin; None where none has counted."""
        self._settle()
        return self._best

    @property
    def best_check(self) -> int | None:
        """Which check had the best value; the first is 1."""
        self._settle()
        return self._best_check

    @property
    def wait(self) -> int:
        """Checks since the last improvement."""
        self._settle()
        return self._wait

    # The best weights

    def restore(self) -> None:
        """Puts the best weights and buffers into the model, where there are some. The optimizer's
        state stays as it is.

        Raises:
            RuntimeError: `restore_best` is False, the optimizer's averages are swapped in, or as in
                a check.
        """
        if not self.restore_best:
            raise RuntimeError(f"{_NAME}: no weights were kept: restore_best must be True")
        if self.optimizer is not None and any(
            "swapped_out" in state for state in self.optimizer.state.values()
        ):
            raise RuntimeError(
                f"{_NAME}: the averaged weights are swapped in: restore() must come after "
                "swap_out_ema(), or outside of ema_weights()"
            )
        self._settle()
        if self._kept:
            copy_all(self._live(), self._kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.restore_best:
            self.restore()

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from: numbers, and the best weights, which are those that are kept and
        no copies. Options are not in it. `torch.load(..., weights_only=True)` takes it.
        """
        self._settle()
        numbers = {name: getattr(self, f"_{name}") for name in _NUMBERS[1:]}
        reason = None if self._reason is None else self._reason.value
        return {"checks": self.checks, **numbers, "reason": reason, "weights": dict(self._kept)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict()` returned. The options stay as they are.

        Args:
            state_dict: what is loaded; nothing is changed where it raises.

        Raises:
            KeyError: something is not in it.
            ValueError: it has no weights, or they have other names or shapes than the model's, and
                `restore_best` is True.
        """
        numbers = {name: state_dict[name] for name in _NUMBERS}
        reason = None if state_dict["reason"] is None else StopReason(state_dict["reason"])
        kept: dict[str, Tensor] = {}
        if self.restore_best and numbers["best"] is not None:
            weights, live = state_dict["weights"], model_tensors(_NAME, self.model)
            other = difference({name: x.shape for name, x in weights.items()}, shapes_of(live))
            if other:
                refuse(_NAME, "weights in the state_dict", "the model's", other, ValueError)
            kept = copied(weights, live, {})
        self._pending = None
        self._kept = kept
        self._reason = reason
        self.checks = numbers.pop("checks")
        for name, value in numbers.items():
            setattr(self, f"_{name}", value)

    # A check, bit by bit

    def _settle(self) -> None:
        """Looks at the value that was not waited for."""
        if self._pending is None:
            return
        reading, may_stop = self._pending
        value = _mean(reading())
        self._pending = None
        self._judge(value, may_stop, self._change_places)

    def _change_places(self) -> dict[str, Tensor]:
        kept, self._of_pending = self._of_pending, self._kept
        return kept

    def _judge(self, value: float, may_stop: bool, keep: Callable[[], dict[str, Tensor]]) -> None:
        """Counts a value. Of several ranks it is the same on all, and so is what comes of it."""
        reason = None
        if self.check_finite and not math.isfinite(value):
            reason, value = StopReason.NOT_FINITE, math.nan  # which beats nothing
        if self.checks > self.start_from:
            if self._beats(value, self._best):
                if self.restore_best:
                    self._kept = keep()
                self._best, self._best_check = value, self.checks
            if self._beats(value, self._patience_from, self.min_delta):
                self._patience_from, self._wait = value, 0
            else:
                self._wait += 1
            if self.stopping_threshold is not None and (
                value == self.stopping_threshold or self._beats(value, self.stopping_threshold)
            ):
                reason = StopReason.THRESHOLD
            elif self.divergence_threshold is not None and self._beats(
                self.divergence_threshold, value
            ):
                reason = StopReason.DIVERGED
            elif reason is None and self._wait >= max(self.patience, 1):
                reason = StopReason.PATIENCE
        if may_stop:
            self._reason = reason

    def _beats(self, value: float, other: float | None, by: float = 0.0) -> bool:
        """Whether `value` is better than `other`, by more than `by`. NaN neither beats nor is
        beaten; anything but NaN and the worst infinity beats None."""
        sign = 1.0 if self.mode == "min" else -1.0
        if other is None:
            return sign * value < math.inf
        margin = by * abs(other) if by and self.min_delta_mode == "rel" else by
        return sign * value < sign * other - margin

    def _of_all_ranks(self, value: Tensor, live: Mapping[str, Tensor]) -> Tensor:
        """The ranks' values (ranks,). What is gathered has the same bits on every rank, whatever
        the algorithm, which a sum that is made on the way need not have."""
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size(self.process_group)
        if ranks <= 1:
            return value.reshape(1)
        if value.device.type == "cpu" and "cpu:" not in dist.get_backend_config(self.process_group):
            value = value.to(next(iter(live.values())).device)
        values = [torch.empty_like(value) for _ in range(ranks)]
        dist.all_gather(values, value, group=self.process_group)
        return torch.stack(values)

    def _live(self) -> dict[str, Tensor]:
        """The model's tensors; raises unless they are those of the first check."""
        live = model_tensors(_NAME, self.model)
        if self._shapes is None:
            self._shapes = shapes_of(live)
        other = difference(shapes_of(live), self._shapes)
        if other:
            raise RuntimeError(
                f"{_NAME}: model must have the tensors that it had at the first check, got {other}"
            )
        return live

    def _averages(self, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is kept of each of the model's tensors."""
        if self.optimizer is None:
            return live
        state = self.optimizer.state
        # A parameter that has no average yet is where its average will start.
        averages = {name: state[x]["ema"] for name, x in live.items() if "ema" in state.get(x, {})}
        lost = sorted(self._averaged - averages.keys())
        if lost:
            raise RuntimeError(
                f"{_NAME}: model must have the parameters that the optimizer averages, got another "
                f"{lost[0]}"
            )
        self._averaged |= averages.keys()
        return {**live, **averages}


def _not_negative(argument: str, value: Any) -> Any:
    if not 0 <= value < math.inf:
        refuse(_NAME, argument, "at least 0", value, ValueError)
    return value


def _bound(argument: str, value: float | None) -> float | None:
    if value is None:
        return None
    value = number(_NAME, argument, value)
    if math.isnan(value):
        refuse(_NAME, argument, "a number or None", value, ValueError)
    return value


def _as_tensor(value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(number(_NAME, "value", value), dtype=torch.float64, device="cpu")
    if value.dim() or value.is_complex():
        number(_NAME, "value", value)  # which says what is wrong
    return value.detach()


def _mean(values: list[float]) -> float:
    """The mean, in the order of the ranks; that of equal ones is exact."""
    if len(set(values)) == 1:
        return float(values[0])
    return sum(values) / len(values)
