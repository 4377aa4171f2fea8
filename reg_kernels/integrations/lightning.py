"""Callbacks for Lightning; the package is `lightning`, or `pytorch_lightning`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor, nn

from .. import training


def _lightning() -> Any:
    """The package that the program uses, or else one that is installed."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
                raise  # it is installed, and lacks something
    raise ImportError(
        f"{__name__} needs lightning or pytorch_lightning, not installed here: "
        "pip install lightning"
    )


_pl = _lightning()

__all__ = ["EarlyStopping"]


class EarlyStopping(_pl.Callback):  # type: ignore[misc, name-defined]
    """Lightning's EarlyStopping, on `reg_kernels.training.EarlyStopping`: the best weights and
    buffers are in the model when `fit` is left, also by an exception.

    Checks come when Lightning's come. Callbacks that save at an exception still save the weights
    that training was at. Checkpoints hold the best weights beside the model's; a resumed run stops
    at the same check, with the same weights, and one that had stopped trains no further. A stop
    before the trainer's `min_epochs` or `min_steps` is none: checks go on counting, and what they
    find from then on decides. Each `fit` starts anew where it does not resume. Ranks decide by
    the mean of their values. `fast_dev_run` and the sanity check are left out.

    Args:
        monitor: the name that the value is logged by.
        min_delta: as in `reg_kernels.training.EarlyStopping`, and so for all that is not here.
        patience: as there.
        verbose: True prints the reason on rank 0.
        mode: as there.
        strict: True raises where nothing is logged by that name; False leaves the check out.
        check_finite: as there.
        stopping_threshold: as there.
        divergence_threshold: as there.
        check_on_train_epoch_end: True checks after a training epoch, False after validation, None
            as Lightning has it.
        min_delta_mode: as there.
        start_from: as there.
        restore_best: as there.

    Attributes:
        stop: the `reg_kernels.training.EarlyStopping` of the last `fit`, with `reason`, `best` and
            `best_check`.

    Raises:
        RuntimeError: at a check: nothing is logged by the name `monitor`.
    """

    stop: training.EarlyStopping

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        *,
        min_delta_mode: str = "abs",
        start_from: int = 0,
        restore_best: bool = True,
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self.mode = mode
        self.verbose = verbose
        self.strict = strict
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self._options: dict[str, Any] = {
            "patience": patience,
            "min_delta": min_delta,
            "min_delta_mode": min_delta_mode,
            "mode": mode,
            "start_from": start_from,
            "stopping_threshold": stopping_threshold,
            "divergence_threshold": divergence_threshold,
            "check_finite": check_finite,
            "restore_best": restore_best,
        }
        training.EarlyStopping(nn.Identity(), **self._options)  # says now what is wrong

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self.stop = training.EarlyStopping(pl_module, **self._options, sync=True)
        trainer.callbacks = [*trainer.callbacks, _Restorer(self)]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.should_stop or self.stop.stopped

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._after_training(trainer):
            self._check(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._after_training(trainer):
            self._check(trainer)

    def _after_training(self, trainer: Any) -> bool:
        if self.check_on_train_epoch_end is not None:
            return self.check_on_train_epoch_end
        return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def _check(self, trainer: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        logged: dict[str, Tensor] = trainer.callback_metrics
        if self.monitor not in logged:
            if self.strict:
                known = ", ".join(sorted(logged)) or "none"
                raise RuntimeError(
                    f"EarlyStopping: monitor must be what is logged ({known}), got {self.monitor}"
                )
            return
        enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0) and trainer.global_step >= (
            trainer.min_steps or 0
        )
        if self.stop(logged[self.monitor].squeeze(), may_stop=enough):
            trainer.should_stop = True
            if self.verbose and trainer.is_global_zero:
                print(
                    f"EarlyStopping: {self.stop.reason} at check {self.stop.checks}, best "
                    f"{self.monitor} {self.stop.best} at check {self.stop.best_check}"
                )

    def state_dict(self) -> dict[str, Any]:
        return self.stop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stop.load_state_dict(state_dict)


class _Restorer(_pl.Callback):  # type: ignore[misc, name-defined]
    """Comes after all callbacks, also after those that save at the end or at an exception."""

    def __init__(self, of: EarlyStopping) -> None:
        self._of = of

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.callbacks = [each for each in trainer.callbacks if each is not self]
        if self._of.stop.restore_best:
            self._of.stop.restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self.on_fit_end(trainer, pl_module)
