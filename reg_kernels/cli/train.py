"""Trains one small conv net twice, plain and regularised, and shows what regularisation does.

Both nets start from the same weights and see the same batches; the regularised one has dropout,
mixup, label smoothing and weight decay and, where asked for, stochastic depth, noise on the images
and steps of an attack on them. With --augment a third net is regularised alike and sees augmented
images. Prints accuracies and seconds per epoch and writes curves.png, metrics.json and model.pt
(the state_dict of the net that was trained last) to the --out directory.
Ctrl-C leaves checkpoint.pt there, which --resume continues: on the CPU, to the same result bit for
bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.progress import Progress
from torch import Tensor

from .. import __version__, _console, augment, backends, convert, nn, optim
from ..adversarial import PGD
from ..nn import CrossEntropyLoss
from ._data import DIGITS, Images, Split, load_images, split
from ._errors import UsageError
from ._files import remove_abandoned, write_whole
from ._trainer import (
    ATTACK_STEPS,
    ATTACKED,
    DEGREES,
    ERASED,
    ERASED_AREA,
    ERASED_RATIO,
    MODELS,
    REGULARISED,
    SCALE,
    SHIFT,
    Attack,
    Augment,
    DropPathByTorch,
    Kernels,
    Loss,
    NoiseByTorch,
    Training,
    attack_by_torch,
    augment_by_torch,
    background,
    load_checkpoint,
    loss_by_torch,
    mix_by_torch,
    save,
    save_checkpoint,
)

CHECKPOINT = "checkpoint.pt"
CURVES, METRICS, MODEL = "curves.png", "metrics.json", "model.pt"
CHECKPOINT_EVERY = 10.0  # seconds: what a kill may lose
INTERRUPTED = 130  # the shell's exit code for a program that Ctrl-C ended
_HERE = ""  # --resume without a path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=DIGITS,
        metavar="digits|FILE.npz",
        help="scikit-learn's 1,797 handwritten digits, or a file with x, uint8 or floating point "
        "of shape [N, H, W] or [N, C, H, W], and y, integers 0..C-1 of shape [N] "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--kernels",
        choices=("eager", "fused"),
        default="fused",
        help="train with PyTorch's layers, mixup, loss and optimizer or with their fused twins "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=backends.NAMES,
        help="the implementation that the fused kernels must use (default: the first that runs)",
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)"
    )
    parser.add_argument(
        "--train-size",
        type=int,
        default=300,
        metavar="N",
        help="images to train on, the rest is for testing (default: %(default)s, few enough to "
        "overfit)",
    )
    parser.add_argument(
        "--epochs", type=int, default=60, metavar="N", help="epochs of each net (default: 60)"
    )
    parser.add_argument(
        "--time-epochs",
        type=int,
        default=5,
        metavar="N",
        help="epochs to time with PyTorch's and with the fused kernels, after the training and "
        "apart from it; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="for the split, the weights, the order and all that is drawn in training "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="two convolutions and a wide head, or residual blocks (default: conv, or residual "
        "with --drop-path)",
    )
    parser.add_argument(
        "--drop-path",
        type=float,
        default=0.0,
        metavar="P",
        help="the regularised net's stochastic depth: the last block's probability of dropping, "
        "linear in depth (default: 0, none)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="the deviation of noise that is added to the regularised net's images, which have "
        "a deviation of 1, and then held to the range of the data's pixels (default: 0, none)",
    )
    parser.add_argument(
        "--adversarial",
        type=float,
        default=0.0,
        metavar="EPS",
        help=f"the regularised net trains on images that {ATTACK_STEPS} steps of an attack moved, "
        "each pixel by at most EPS, where digits and bytes have pixels from 0 to 1; both nets are "
        "attacked on the test set (default: 0, none)",
    )
    parser.add_argument(
        "--augment",
        action="store_true",
        help="train a third net, regularised as the second, whose images are turned, shifted and "
        "scaled by up to 10 degrees, a tenth of their sides and a tenth, and partly erased",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train each net for N seeds, from --seed on, and show the means; the split stays the "
        "first one's (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the files go; those of an earlier run are replaced (default: runs/digits, or "
        "runs/ and the name of FILE)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=_HERE,
        metavar="PATH",
        help="continue an interrupted run, given the same options (default PATH: checkpoint.pt in "
        "the --out directory)",
    )


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("\ninterrupted before training began", file=sys.stderr)
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    # Everything that can be wrong with the input is found here, before anything is written.
    _check_numbers(args)
    device = _device(args.device)
    implementation = _implementation(args, device)
    images = load_images(args.data)
    data = split(images, args.train_size, args.seed)
    out = args.out or Path("runs") / (DIGITS if args.data == DIGITS else Path(args.data).stem)

    kinds = {
        "eager": Kernels(
            convert=lambda model: model,
            optimizer=torch.optim.AdamW,
            mix=mix_by_torch,
            loss=loss_by_torch,
            drop_path=DropPathByTorch,
            noise=NoiseByTorch,
            attack=attack_by_torch,
            augment=augment_by_torch,
        ),
        "fused": Kernels(
            convert=lambda model: convert(model, inplace=True, fuse=True, backend=args.backend),
            optimizer=functools.partial(optim.AdamW, backend=args.backend),
            mix=lambda alpha: augment.Mixup(
                alpha, label_smoothing=0.0, num_classes=images.classes, backend=args.backend
            ),
            loss=lambda smoothing: CrossEntropyLoss(
                label_smoothing=smoothing, backend=args.backend
            ),
            drop_path=lambda p: nn.DropPath(p, backend=args.backend),
            noise=lambda std: nn.GaussianNoise(std, backend=args.backend),
            attack=lambda eps, data: _fused_attack(eps, data, args.backend),
            augment=lambda data, seed: _pipeline(data, seed, args.backend),
        ),
    }
    options = _result_options(args, device, implementation, images)
    training = Training(
        data,
        classes=images.classes,
        epochs=args.epochs,
        seed=args.seed,
        device=device,
        kernels=kinds[args.kernels],
        regularised=dataclasses.replace(
            REGULARISED,
            drop_path=args.drop_path,
            noise=args.noise,
            adversarial=args.adversarial,
        ),
        model=args.model,
        augment=args.augment,
        seeds=args.seeds,
    )
    start = Path(args.resume) if args.resume else out / CHECKPOINT
    if args.resume is not None:
        _resume(training, start, options)
    _make_writable(out)

    resumed = args.resume is not None and start == out / CHECKPOINT
    checkpoint = _Checkpoint(out / CHECKPOINT, options, training, on_disk=resumed)
    try:
        sizes = f"{len(data.train_y)} images to train on, {len(data.test_y)} to test on"
        print(f"{sizes}, {images.classes} classes; {args.kernels} kernels on {device}", flush=True)
        with _console.progress() as progress:
            _train(training, progress, checkpoint)
            seconds = _time(training, args.time_epochs, kinds, progress)
        metrics = _metrics(args, options, data, images, training, seconds, implementation)
        _write_results(out, metrics, training)
    except (KeyboardInterrupt, UsageError) as stop:
        with _no_interrupt():
            failure = checkpoint.keep()
        remedy = [f"add --resume to continue from {checkpoint.path}"] if checkpoint.on_disk else []
        failure = stop if isinstance(stop, UsageError) else failure
        if failure is not None:
            raise UsageError("; ".join([str(failure), *remedy])) from None
        print(f"\ninterrupted: {remedy[0]}", file=sys.stderr)
        return INTERRUPTED
    checkpoint.path.unlink(missing_ok=True)
    _print_table(metrics)
    print(f"wrote {CURVES}, {METRICS} and {MODEL} to {out}")
    return 0


# Checks of the arguments


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (("train_size", 1), ("epochs", 1), ("time_epochs", 0), ("seeds", 1)):
        if (value := getattr(args, name)) < least:
            raise UsageError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
    # --seed seeds several generators; scikit-learn's takes the narrowest range.
    if not 0 <= args.seed <= 2**32 - args.seeds:
        raise UsageError(f"--seed: must be in 0..{2**32 - args.seeds}, got {args.seed}")
    if not 0 <= args.drop_path <= 1:
        raise UsageError(f"--drop-path: must be in 0..1, got {args.drop_path:g}")
    for name in ("noise", "adversarial"):
        if not 0 <= (value := getattr(args, name)) < math.inf:
            raise UsageError(f"--{name}: must be finite and at least 0, got {value:g}")
    if args.model is None:
        args.model = "residual" if args.drop_path > 0 else "conv"
    if args.drop_path > 0 and args.model != "residual":
        raise UsageError(f"--drop-path: goes with --model residual, got {args.model}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UsageError(f"--device: must be there, got {name} where torch finds {found} GPUs")
    return device


def _implementation(args: argparse.Namespace, device: torch.device) -> str:
    """The implementation that the fused kernels run: in training, or at least in the timing."""
    if args.kernels == "eager" and args.backend is not None:
        raise UsageError(f"--backend: goes with --kernels fused, got {args.backend} with eager")
    try:
        return backends.choose("dropout", device.type, torch.float32, args.backend)
    except backends.BackendUnavailable as error:
        source = "--backend" if args.backend is not None else "REG_KERNELS_BACKEND"
        raise UsageError(f"{source}: {error}") from None


def _make_writable(out: Path) -> None:
    """Creates `out` and makes sure, before minutes of work, that the results can be put there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise _unwritable(out, error) from None
    for name in (CURVES, METRICS, MODEL, CHECKPOINT):
        if (out / name).is_dir():
            raise UsageError(f"--out: {out / name} must be a file or free, got a directory")
    for name in (CURVES, METRICS, MODEL, CHECKPOINT):
        remove_abandoned(out / name)


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(
        f"--out: must be a directory that can be written to, got {out}: {error.strerror or error}"
    )


# Checkpoints


def _result_options(
    args: argparse.Namespace, device: torch.device, implementation: str, images: Images
) -> dict[str, str | int]:
    """All that determines the result; a checkpoint continues only a run with the same values."""
    return {
        "data sha256": images.sha256[:16],  # not the name: a file may be moved
        "kernels": args.kernels,
        "implementation": implementation if args.kernels == "fused" else "PyTorch",
        "device": device.type,
        "train-size": args.train_size,
        "epochs": args.epochs,
        "seed": args.seed,
        "model": args.model,
        "drop-path": args.drop_path,
        "noise": args.noise,
        "adversarial": args.adversarial,
        "augment": args.augment,
        "seeds": args.seeds,
    }


def _pipeline(data: Split, seed: int, backend: str | None) -> Augment:
    """The augmentation in one kernel; an image's draws depend on its number and the epoch alone."""
    fill = background(data)
    pipeline = augment.Pipeline(
        augment.RandomAffine(
            DEGREES,
            translate=(SHIFT, SHIFT),
            scale=SCALE,
            interpolation="bilinear",
            fill=fill,
        ),
        augment.RandomErasing(ERASED, scale=ERASED_AREA, ratio=ERASED_RATIO, value=fill),
        seed=seed,
        backend=backend,
    )

    def run(images: Tensor, numbers: Tensor, epoch: int) -> Tensor:
        pipeline.set_epoch(epoch)
        augmented: Tensor = pipeline(images, indices=numbers)
        return augmented

    return run


def _fused_attack(eps: float, data: Split, backend: str | None) -> Attack:
    """The attack by the fused step. BatchNorm's statistics do not follow its batches."""

    def attack(model: torch.nn.Module, images: Tensor, target: Any, loss: Loss) -> Tensor:
        pgd = PGD(
            *(model, eps, 2.5 * eps / ATTACK_STEPS, ATTACK_STEPS),
            loss=loss,
            lower=data.lower,
            upper=data.upper,
            mean=data.mean.to(images.device),
            std=data.std.to(images.device),
            backend=backend,
        )
        return pgd(images, target)

    return attack


class _Checkpoint:
    """The state at the end of the last epoch: kept in memory, written now and then."""

    def __init__(
        self, path: Path, options: dict[str, Any], training: Training, on_disk: bool
    ) -> None:
        self.path = path
        self.on_disk = on_disk  # whether the file is of this run, perhaps of an earlier epoch
        self._options = options
        self._training = training
        self._state = training.state()
        self._written = time.monotonic()

    def take(self) -> None:
        """Notes the end of an epoch; an interruption from here on goes back no further."""
        # One assignment: Ctrl-C while the state is copied leaves the previous one whole.
        self._state = self._training.state()
        if time.monotonic() - self._written >= CHECKPOINT_EVERY:
            self.write()

    def write(self) -> None:
        _write(self.path, lambda path: save_checkpoint(path, self._options, self._state))
        self._written = time.monotonic()
        self.on_disk = True

    def keep(self) -> UsageError | None:
        """Writes it as the last thing. Returns a failure, which leaves the file as it was."""
        try:
            self.write()
        except UsageError as error:
            return error
        return None


def _resume(training: Training, path: Path, options: dict[str, Any]) -> None:
    """Brings `training` to the state of the checkpoint at `path`, which must be of this run."""
    try:
        saved, state = load_checkpoint(path)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--resume: must name a checkpoint, got {path}: {reason}") from None
    except ValueError:
        raise _damaged(path) from None
    for name, here in options.items():
        there = saved.get(name)
        # Only values that print on one line are shown; all of ours do.
        if type(there) is not type(here) or not str(there)[:100].isprintable():
            raise _damaged(path)
        if there != here:
            where = f"{str(there)[:100]} there, {here} here"
            raise UsageError(f"--resume: {path} is of another run: {name} {where}")
    try:
        training.restore(state)
    except Exception:  # a wrong state may raise anything
        raise _damaged(path) from None


def _damaged(path: Path) -> UsageError:
    return UsageError(
        f"--resume: must name a whole checkpoint of `train`, got a damaged or other file: {path}"
    )


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keeps an impatient second Ctrl-C from stopping what saves the work of the first."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# The work


def _train(training: Training, progress: Progress, checkpoint: _Checkpoint) -> None:
    bars: dict[str, Any] = {}

    def show() -> None:
        name = training.training.name
        if name not in bars:
            bars[name] = progress.add_task(name, total=training.epochs)
        rows = training.history[name]
        note = f", test accuracy {rows[-1]['test_accuracy']:.1%}" if rows else ""
        progress.update(bars[name], completed=training.epoch, description=f"{name}{note}")

    def after_epoch() -> None:
        checkpoint.take()
        show()

    show()
    training.run(after_epoch)


def _time(
    training: Training, rounds: int, kinds: dict[str, Kernels], progress: Progress
) -> dict[str, dict[str, float]] | None:
    if rounds == 0:
        return None
    bar = progress.add_task("timing PyTorch and the fused kernels", total=rounds + 1)
    return training.time_epochs(rounds, kinds, lambda: progress.advance(bar))


# The results


def _metrics(
    args: argparse.Namespace,
    options: dict[str, Any],
    data: Split,
    images: Images,
    training: Training,
    seconds: dict[str, dict[str, float]] | None,
    implementation: str,
) -> dict[str, Any]:
    runs = {}
    for run in training.runs:
        recipe, history = run.recipe, training.history[run.name]
        final = dict(history[-1])
        final["gap"] = final["train_accuracy"] - final["test_accuracy"]
        runs[run.name] = {
            "recipe": recipe.name,
            "seed": run.seed,
            "dropout": recipe.dropout,
            "mixup": recipe.mixup,
            "label_smoothing": recipe.label_smoothing,
            "weight_decay": recipe.weight_decay,
            "drop_path": recipe.drop_path,
            "noise": recipe.noise,
            "adversarial": recipe.adversarial,
            "augment": recipe.augment,
            "final": final,
            "history": [{"epoch": i, **row} for i, row in enumerate(history, start=1)],
        }
    return {
        "options": {"data": args.data, **options},
        "versions": {"torch": torch.__version__, "reg_kernels": __version__},
        "device": options["device"],
        "threads": torch.get_num_threads(),
        "images": {
            "shape": list(images.x.shape[1:]),
            "classes": images.classes,
            "train": len(data.train_y),
            "test": len(data.test_y),
        },
        "runs": runs,
        "seconds_per_epoch": seconds
        and {"median_of": args.time_epochs, "fused_implementation": implementation, **seconds},
    }


def _write_results(out: Path, metrics: dict[str, Any], training: Training) -> None:
    model = {name: value.cpu() for name, value in training.model.state_dict().items()}
    text = json.dumps(_without_nan(metrics), indent=2, allow_nan=False) + "\n"
    _write(out / CURVES, lambda path: _draw(path, metrics))
    _write(out / MODEL, lambda path: save(model, path))
    _write(out / METRICS, lambda path: path.write_text(text))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write_whole(path, write)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def _without_nan(value: Any) -> Any:
    """`value` with null for a loss that ran away: JSON has neither NaN nor Infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(path: Path, metrics: dict[str, Any]) -> None:
    # A Figure of its own, without pyplot: no display is looked for and no global state is touched.
    colours = {"plain": "#d95f02", "regularised": "#1b6ca8", "augmented": "#3a7d44"}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    settled = []
    for axes, measure in zip(panels, ("accuracy", "loss"), strict=True):
        for name, runs in _by_recipe(metrics).items():
            history = _means([run["history"] for run in runs])
            epochs = [row["epoch"] for row in history]
            for part, style in (("train", "--"), ("test", "-")):
                values = [row[f"{part}_{measure}"] for row in history]
                label = f"{name}, {part}"
                if measure == "accuracy":
                    label += f" ({values[-1]:.1%})"
                    settled += values[len(values) // 10 :]
                axes.plot(
                    epochs,
                    values,
                    style,
                    color=colours[name],
                    linewidth=1.8 if part == "test" else 1.2,
                    marker="o" if len(epochs) == 1 else None,
                    label=label,
                )
            if measure == "accuracy" and ATTACKED in runs[0]["final"]:
                values = [row[ATTACKED] for row in history]
                settled += values[len(values) // 10 :]
                label = f"{name}, test attacked ({values[-1]:.1%})"
                axes.plot(epochs, values, ":", color=colours[name], linewidth=1.8, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(measure)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    # The climb of the first epochs would squeeze the gap, which the chart is about.
    panels[0].set_ylim(max(0.0, min(settled) - 0.02), 1.005)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].set_yscale("log")
    panels[1].set_ylabel("cross-entropy (log scale)")
    gaps = ", ".join(f"{name} {100 * final['gap']:.1f}" for name, final in _finals(metrics).items())
    sizes, seeds = metrics["images"], metrics["options"]["seeds"]
    figure.suptitle(
        f"{sizes['train']} training images, {sizes['test']} test images"
        f"{f', means of {seeds} seeds' if seeds > 1 else ''}\n"
        f"train minus test accuracy, in points: {gaps}"
    )
    figure.savefig(path, dpi=130)


def _by_recipe(metrics: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each recipe, one for each seed."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in metrics["runs"].values():
        runs.setdefault(run["recipe"], []).append(run)
    return runs


def _means(histories: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Row by row, the mean over the seeds of each measure."""
    return [
        {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        for rows in zip(*histories, strict=True)
    ]


def _finals(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By recipe, the means over the seeds of what training ended with."""
    return {
        name: _means([[run["final"]] for run in runs])[0]
        for name, runs in _by_recipe(metrics).items()
    }


def _print_table(metrics: dict[str, Any]) -> None:
    seconds, seeds = metrics["seconds_per_epoch"], metrics["options"]["seeds"]
    finals, runs = _finals(metrics), _by_recipe(metrics)
    attacked = any(ATTACKED in final for final in finals.values())
    columns = ["net", "train", "test", "gap", *(["test attacked"] if attacked else [])]
    if seconds:
        columns += ["s/epoch PyTorch", f"s/epoch fused ({seconds['fused_implementation']})"]
    rows = []
    for name, final in finals.items():
        cells = [
            name,
            f"{final['train_accuracy']:.2%}",
            f"{final['test_accuracy']:.2%}",
            f"{100 * final['gap']:.2f} points",
        ]
        cells += [f"{final[ATTACKED]:.2%}"] if attacked else []
        if seconds:
            cells += [f"{seconds[name][kind]:.4f}" for kind in ("eager", "fused")]
        rows.append(tuple(cells))
    _console.print_table(f"means of {seeds} seeds" if seeds > 1 else "", columns, rows, words=1)
    if seeds == 1:
        return
    for before, after in itertools.pairwise(runs):
        gains = [
            100 * (run["final"]["test_accuracy"] - other["final"]["test_accuracy"])
            for run, other in zip(runs[after], runs[before], strict=True)
        ]
        print(
            f"{after} against {before}, on the test set: {statistics.fmean(gains):+.2f} points "
            f"({min(gains):+.2f} to {max(gains):+.2f}), better for {sum(g > 0 for g in gains)} of "
            f"{seeds} seeds"
        )
