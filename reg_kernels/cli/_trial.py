"""One training of `compare` and `tune`: a recipe, a seed and a fold, and what came of it.

All that share a seed and a fold have the same images to train on, to validate on and to test on,
start from the same weights and see the same batches: their differences are those of their recipes.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial

from .. import __version__
from ..bench._memory import follow_memory
from ..training import Recipe
from ._data import Images, Split, load_images, split
from ._device import device_from
from ._errors import UsageError
from ._files import without_nan
from ._setting import add_setting_arguments, implementation_from
from ._study_checks import RESULT, check_history, check_measures
from ._trainer.by_torch import BY_TORCH
from ._trainer.fused import fused_kernels
from ._trainer.training import Training

STUDY = "study.db"  # what keeps the trials in the --out directory
WATCH = ("train", "validation")  # the test set is looked at once, at the end
Epoch = Callable[[int, list[float]], None]  # (epochs done, the validation losses so far)


def add_trial_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """What `setting_from`, `out_from` and `workers_of` read, and `--storage`."""
    add_setting_arguments(parser)
    parser.add_argument(
        "--validation-size",
        type=int,
        metavar="N",
        help="images of the rest to validate on, which is what early stopping and tuning go by; "
        "all others are for testing (default: as many as --train-size)",
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="cross-validation: cut the images to train on into K parts, and validate on each in "
        "turn what was trained on the others (default: none)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that train at once, each with its share of the cores (default: one a "
        "core; 1 on a GPU)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the files go; those of an earlier run are replaced (default: "
        f"runs/{command}-NAME by the name of the data)",
    )
    parser.add_argument(
        "--storage",
        metavar="FILE|URL",
        help="what keeps the trials: an SQLite file (.db), a journal (.log) or a URL of Optuna's "
        f"(default: {STUDY} in the --out directory)",
    )


@dataclass(frozen=True)
class Setting:
    """What all trials of a study share."""

    images: Images
    train_size: int
    validation_size: int
    folds: int  # 0 for none
    device: torch.device
    kernels: str
    backend: str | None
    implementation: str
    attacked_by: float = 0.0  # how far the attack goes that the test set is put under, if at all
    test_seed: int | None = None  # whose test set all seeds have; None for each its own

    def about(self) -> dict[str, Any]:
        """What the results depend on."""
        return {
            "data sha256": self.images.sha256[:16],  # not the name: a file may be moved
            "train-size": self.train_size,
            "validation-size": self.validation_size,
            "folds": self.folds,
            "kernels": self.kernels,
            "implementation": self.implementation,
            "device": self.device.type,
            "attacked by": self.attacked_by,
            "torch": torch.__version__,
            "reg_kernels": __version__,
        }

    def split(self, seed: int, fold: int = 0) -> Split:
        """The images of a seed and, with folds, of one of them."""
        of = (fold, self.folds) if self.folds else None
        return split(self.images, self.train_size, seed, self.validation_size, of, self.test_seed)

    def train(
        self,
        recipe: Recipe,
        seed: int,
        fold: int = 0,
        after_epoch: Epoch = lambda *_: None,
        tested: bool = True,
    ) -> dict[str, Any]:
        """Trains a net by a recipe.

        `after_epoch` is called at the end of each epoch, not of a teacher's; it may raise what
        ends the training. Where it is not `tested` nobody looks at the test set, and its measures,
        the gap and the memory are left out.

        Returns:
            What JSON can hold, None for what is not finite: "measures", the losses, accuracies and
            calibration errors by `PART_MEASURE`, the "gap" of the accuracies of training and test
            set, "seconds_per_epoch" (the median), "peak_bytes" (of a step, beyond the net and its
            optimizer's state), "epochs", "best_epoch", "zeros" and "weights"; "history", a list for
            each measure of the training and the validation set; and "teacher", the epochs and
            seconds that a teacher took before.
        """
        data = self.split(seed, fold)
        training = Training(
            data if tested else data.without_test(),
            classes=self.images.classes,
            recipes={"": recipe},
            seeds=range(seed, seed + 1),
            device=self.device,
            kernels=BY_TORCH if self.kernels == "eager" else fused_kernels(self.backend),
            watch=WATCH,
            attacked_by=self.attacked_by,
        )

        def look() -> None:
            if not training.training.teaches:
                rows = training.history[training.training.name]
                after_epoch(training.epoch, [row["validation_loss"] for row in rows])

        training.run(look)
        *teachers, run = training.runs
        measures = dict(training.results[run.name])
        measures["seconds_per_epoch"] = statistics.median(training.seconds[run.name])
        if tested:
            measures["gap"] = measures["train_accuracy"] - measures["test_accuracy"]
            measures["peak_bytes"] = float(training.step_bytes(follow_memory))
        rows = training.history[run.name]
        result: dict[str, Any] = {
            "measures": measures,
            "history": {name: [row[name] for row in rows] for name in rows[0]},
        }
        for teacher in teachers:
            seconds = training.seconds[teacher.name]
            result["teacher"] = {"epochs": len(seconds), "seconds": sum(seconds)}
        found: dict[str, Any] = without_nan(result)
        return found


def check_done(trial: FrozenTrial) -> None:
    """Raises ValueError, unless a trial that is done keeps what `Setting.train` returned."""
    result = trial.user_attrs.get(RESULT)
    check_measures(trial, result)
    check_history(trial, result)


def loss_of(result: Mapping[str, Any]) -> float:
    """The validation loss of what `Setting.train` returned; infinity where it ran away."""
    loss = result["measures"]["validation_loss"]
    return math.inf if loss is None else float(loss)


def setting_from(args: argparse.Namespace, attacked_by: float) -> Setting:
    """The setting of the options of `add_trial_arguments`. Raises UsageError, one line that names
    the option."""
    if args.validation_size is not None and args.folds is not None:
        raise UsageError("--validation-size: goes without --folds, whose parts are validated on")
    for name, least in (
        ("train_size", 1),
        ("validation_size", 1),
        ("folds", 2),
        ("image_size", 1),
        ("workers", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
    device = device_from(args.device)
    implementation = implementation_from(args, device)
    setting = Setting(
        images=load_images(args.data, args.image_size),
        train_size=args.train_size,
        validation_size=0 if args.folds else args.validation_size or args.train_size,
        folds=args.folds or 0,
        device=device,
        kernels=args.kernels,
        backend=args.backend,
        implementation=implementation if args.kernels == "fused" else "PyTorch",
        attacked_by=attacked_by,
    )
    setting.split(0)  # refused here what cannot be split
    return setting


def out_from(args: argparse.Namespace, command: str) -> Path:
    """The folder of a command's results."""
    out: Path | None = args.out
    return out or Path("runs") / f"{command}-{Path(args.data).stem}"


def workers_of(args: argparse.Namespace, device: torch.device) -> int:
    """How many processes are to train, of which each may take `cores() // workers` threads.

    Nets as small as these leave most of a core's neighbours idle, so that by default each core has
    a process of its own.
    """
    default = 1 if device.type == "cuda" else cores()
    return default if args.workers is None else int(args.workers)


def take_share(processes: int) -> None:
    """Leaves each process its share of the cores."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // processes)))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))
