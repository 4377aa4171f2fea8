"""The images and labels that `train` learns from, checked before anything else happens.

Shapes: N images of C channels, H rows and W columns; K classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._errors import UsageError

DIGITS = "digits"


@dataclass(frozen=True)
class Images:
    """A labelled set of images whose every label is one of 0..classes-1."""

    source: str  # as given to --data
    x: np.ndarray  # [N, C, H, W] float32, finite
    y: np.ndarray  # [N] int64
    classes: int
    sha256: str  # of shapes and values: two files of the same content are the same data


@dataclass(frozen=True)
class Split:
    """A training and a test set, standardised by the training set's own statistics."""

    train_x: torch.Tensor  # [N_train, C, H, W] float32
    train_y: torch.Tensor  # [N_train] int64
    test_x: torch.Tensor  # [N_test, C, H, W] float32
    test_y: torch.Tensor  # [N_test] int64


def load_images(source: str) -> Images:
    """Reads scikit-learn's handwritten digits, or an `.npz` file with arrays `x` and `y`.

    Digits are divided by 16 and uint8 pixels by 255; floating-point pixels are taken as they are.
    Raises UsageError, one line that names `--data`, for anything that cannot be trained on.
    """
    if source == DIGITS:
        # Imported here: an .npz file needs nothing of scikit-learn's data sets.
        from sklearn.datasets import load_digits

        digits = load_digits()
        return _images(DIGITS, (digits.images / 16).astype(np.float32), digits.target)
    where = f"--data {source}"
    x, y = _read_npz(Path(source), where)
    _check_labels(y, where)
    return _images(source, _checked_pixels(x, len(y), where), y)


def split(images: Images, train_size: int, seed: int) -> Split:
    """Draws a stratified training set of `train_size` images; the rest is the test set."""
    from sklearn.model_selection import train_test_split

    total = len(images.y)
    counts = np.bincount(images.y, minlength=images.classes)
    if counts.min() < 2:
        raise UsageError(
            f"--data {images.source}: each class needs at least 2 images, one to train on and one "
            f"to test on; class {counts.argmin()} has {counts.min()}"
        )
    # Stratifying needs room for one image of each class on either side.
    if not images.classes <= train_size <= total - images.classes:
        raise UsageError(
            f"--train-size: must be in {images.classes}..{total - images.classes} for {total} "
            f"images of {images.classes} classes, got {train_size}"
        )
    train, test = train_test_split(
        np.arange(total), train_size=train_size, stratify=images.y, random_state=seed
    )
    # Per channel and in double precision: float32 pixels may be large enough to overflow a sum of
    # squares. A constant channel is centred and otherwise left alone.
    channels = images.x[train].astype(np.float64)
    mean = channels.mean(axis=(0, 2, 3), keepdims=True)
    std = channels.std(axis=(0, 2, 3), keepdims=True)
    std[std == 0] = 1

    def standardised(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((images.x[rows] - mean) / std).astype(np.float32))

    return Split(
        train_x=standardised(train),
        train_y=torch.from_numpy(images.y[train]),
        test_x=standardised(test),
        test_y=torch.from_numpy(images.y[test]),
    )


def _read_npz(path: Path, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise _unreadable(where, error) from None
    if isinstance(file, np.ndarray):
        raise UsageError(f"{where}: must be an .npz file with arrays x and y, got a single array")
    arrays: dict[str, np.ndarray] = {}
    with file:
        if not {"x", "y"} <= set(file.files):
            raise UsageError(
                f"{where}: must hold arrays x and y, got {', '.join(file.files) or 'none'}"
            )
        for name in ("x", "y"):
            try:
                arrays[name] = file[name]
            except Exception as error:
                raise _unreadable(where, error, name) from None
    return arrays["x"], arrays["y"]


def _unreadable(where: str, error: Exception, array: str | None = None) -> UsageError:
    # The zip reader, the decompressor and the array header's parser each raise types of their
    # own on a damaged file, too many to list; numpy words its refusal of pickles as ValueError.
    if isinstance(error, ValueError) and "allow_pickle" in str(error):
        # For a file that is neither .npz nor .npy numpy guesses "pickle"; only inside an archive
        # does it know.
        if array is not None:
            return UsageError(
                f"{where}: {array} must be a plain array, got pickled objects, never loaded"
            )
        return UsageError(f"{where}: must be an .npz file with arrays x and y, got something else")
    what = f"{array} is" if array is not None else "the file is"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UsageError(f"{where}: must be a whole .npz file, but {what} damaged: {reason}")


def _check_labels(y: np.ndarray, where: str) -> None:
    if y.ndim != 1:
        raise UsageError(f"{where}: y must be of shape [N], got {list(y.shape)}")
    if y.dtype.kind not in "iu":
        raise UsageError(f"{where}: y must hold integers, got {y.dtype}")
    if len(y) == 0:
        raise UsageError(f"{where}: y must hold at least one label, got none")
    labels = np.unique(y)
    last = len(labels) - 1
    if labels[0] < 0 or labels[-1] != last:
        got = labels[0] if labels[0] < 0 else labels[-1]
        raise UsageError(
            f"{where}: y must hold labels 0..C-1, each at least once, "
            f"got {got} among {len(labels)} distinct labels"
        )
    if last == 0:
        raise UsageError(f"{where}: y must hold at least 2 classes, got 1")


def _checked_pixels(x: np.ndarray, labels: int, where: str) -> np.ndarray:
    """Returns `x` as float32 [N, C, H, W] with every pixel finite."""
    if x.ndim not in (3, 4) or 0 in x.shape[1:]:
        raise UsageError(
            f"{where}: x must be of shape [N, H, W] or [N, C, H, W], got {list(x.shape)}"
        )
    if len(x) != labels:
        raise UsageError(
            f"{where}: x and y must be of one length, got {len(x)} images and {labels} labels"
        )
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    if x.dtype.kind != "f":
        raise UsageError(f"{where}: x must be uint8 or floating point, got {x.dtype}")
    with np.errstate(over="ignore"):  # a double too large for float32 is reported just below
        pixels = x.astype(np.float32)
    bad = np.argwhere(~np.isfinite(pixels))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        raise UsageError(f"{where}: x must hold finite float32 pixels, got {x[at]} at {list(at)}")
    return pixels


def _images(source: str, x: np.ndarray, y: Any) -> Images:
    x = np.ascontiguousarray(x[:, None] if x.ndim == 3 else x)
    y = np.ascontiguousarray(y, dtype=np.int64)
    digest = hashlib.sha256(repr(x.shape).encode())
    digest.update(x.tobytes())
    digest.update(y.tobytes())
    return Images(source, x, y, int(y.max()) + 1, digest.hexdigest())
