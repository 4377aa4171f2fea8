"""The images and labels that `train` learns from, checked before anything else happens.

Shapes: N images of C channels, H rows and W columns; K classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.lib.format as npy
import torch

from ._errors import UsageError, one_line
from ._folder import class_folders, load_folder

DIGITS = "digits"

HEADER_BYTES = 10_000  # at most, of an array in a file; a plain array's takes some hundred
_PREFIX_BYTES = 12  # magic, version and length, which come before it
# By version: the bytes of the length, and what reads the header. Version 3 differs from 2 in the
# encoding of fields' names alone, and an array with fields is refused.
_HEADERS = {
    (1, 0): (2, npy.read_array_header_1_0),
    (2, 0): (4, npy.read_array_header_2_0),
    (3, 0): (4, npy.read_array_header_2_0),
}


@dataclass(frozen=True)
class Images:
    """A labelled set of images whose every label is one of 0..classes-1."""

    source: str  # as given to --data
    x: np.ndarray  # [N, C, H, W] float32, finite
    y: np.ndarray  # [N] int64
    classes: int
    sha256: str  # of shapes and values, not of the file's bytes
    names: tuple[str, ...] = ()  # of the classes, where they have some


@dataclass(frozen=True)
class Split:
    """A training, a test and perhaps a validation set, standardised by the training set's own
    statistics."""

    train_x: torch.Tensor  # [N_train, C, H, W] float32
    train_y: torch.Tensor  # [N_train] int64
    validation_x: torch.Tensor  # [N_validation, C, H, W] float32, N_validation 0 if there is none
    validation_y: torch.Tensor  # [N_validation] int64
    test_x: torch.Tensor  # [N_test, C, H, W] float32
    test_y: torch.Tensor  # [N_test] int64
    mean: torch.Tensor  # [C] float32, of pixels
    std: torch.Tensor  # likewise
    lower: float  # the least pixel of all images
    upper: float

    def parts(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Images and labels of each set that there is."""
        parts = {
            "train": (self.train_x, self.train_y),
            "validation": (self.validation_x, self.validation_y),
            "test": (self.test_x, self.test_y),
        }
        return {name: part for name, part in parts.items() if len(part[1])}

    def without_test(self) -> Split:
        return dataclasses.replace(self, test_x=self.test_x[:0], test_y=self.test_y[:0])


def load_images(source: str, image_size: int = 32) -> Images:
    """Reads scikit-learn's handwritten digits, an `.npz` file with arrays `x` and `y`, or a folder
    with a folder of image files for each class, which are brought to `image_size` a side.

    Digits are divided by 16 and uint8 pixels by 255; floating-point pixels are taken as they are.
    Raises UsageError, one line that names `--data`, for anything that cannot be trained on.
    """
    if source == DIGITS:
        # Imported here: an .npz file needs nothing of scikit-learn's data sets.
        from sklearn.datasets import load_digits

        digits = load_digits()
        return _images(DIGITS, (digits.images / 16).astype(np.float32), digits.target)
    where, path = f"--data {source}", Path(source)
    if not path.is_dir():
        return _images(source, *_read_npz(path, where))
    names, files = class_folders(path, where)
    _check_memory((len(files), 3, image_size, image_size), 1, f"{where}: images")
    x = _float_pixels(load_folder(files, image_size, where), where)
    return _images(source, x, [number for _, number in files], tuple(names))


def split(
    images: Images,
    train_size: int,
    seed: int,
    validation_size: int = 0,
    fold: tuple[int, int] | None = None,
    test_seed: int | None = None,
) -> Split:
    """Draws stratified sets: `train_size` images to train on, `validation_size` to validate on,
    and the rest to test on.

    With a `fold` (k, K) the validation set is the k-th of K parts of the training set, 0 <= k < K,
    and the other parts are trained on; the test set is the same for each. With a `test_seed` the
    test set is that seed's, and `seed` draws the other two of what it leaves.
    """
    from sklearn.model_selection import StratifiedKFold, train_test_split

    total = len(images.y)
    counts = np.bincount(images.y, minlength=images.classes)
    parts = 3 if validation_size else 2
    if counts.min() < parts:
        raise UsageError(
            f"--data {images.source}: each class needs at least {parts} images, one to train on"
            f"{', one to validate on' if validation_size else ''} and one to test on; class "
            f"{counts.argmin()} has {counts.min()}"
        )
    # Stratifying needs room for one image of each class in each set.
    most = total - images.classes
    for option, size, room in (
        ("--train-size", train_size, most - (images.classes if validation_size else 0)),
        ("--validation-size", validation_size, most - train_size),
    ):
        if (size or option == "--train-size") and not images.classes <= size <= room:
            raise UsageError(
                f"{option}: must be in {images.classes}..{room} for {total} images of "
                f"{images.classes} classes, got {size}"
            )

    test_seed = seed if test_seed is None else test_seed

    def drawn(rows: np.ndarray, size: int, by: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a number, and the others."""
        return train_test_split(rows, train_size=size, stratify=images.y[rows], random_state=by)

    train, test = drawn(np.arange(total), train_size, test_seed)
    validation = train[:0]
    if fold is not None:
        k, folds = fold
        if min(np.bincount(images.y[train])) < folds:
            raise UsageError(
                f"--folds: must be at most the images of each class to train on, got {folds} for "
                f"{min(np.bincount(images.y[train]))}"
            )
        cut = StratifiedKFold(folds, shuffle=True, random_state=seed)
        kept, left_out = list(cut.split(train, images.y[train]))[k]
        train, validation = train[kept], train[left_out]
    elif validation_size:
        validation, test = drawn(test, validation_size, test_seed)
        if seed != test_seed:
            train, validation = drawn(np.concatenate([train, validation]), train_size, seed)
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
        validation_x=standardised(validation),
        validation_y=torch.from_numpy(images.y[validation]),
        test_x=standardised(test),
        test_y=torch.from_numpy(images.y[test]),
        mean=torch.from_numpy(mean.reshape(-1).astype(np.float32)),
        std=torch.from_numpy(std.reshape(-1).astype(np.float32)),
        lower=float(images.x.min()),
        upper=float(images.x.max()),
    )


class _Array:
    """An array of an .npz file. The header is read at once, the values only when asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __init__(self, archive: zipfile.ZipFile, member: str, name: str, where: str) -> None:
        self._archive, self._member, self._name, self._where = archive, member, name, where
        try:
            with archive.open(member) as file:
                start = file.read(_PREFIX_BYTES + HEADER_BYTES)
            size = archive.getinfo(member).file_size
        except Exception as error:
            raise _unreadable(where, error, name) from None
        if not start.startswith(npy.MAGIC_PREFIX):
            raise self._refusal(f"must be an array as numpy.save writes it, got {one_line(start)}")
        version = tuple(start[6:8])
        if version not in _HEADERS:
            raise self._refusal(f"must be of version 1.0, 2.0 or 3.0 of its format, got {version}")
        length_bytes, read = _HEADERS[version]
        if (length := int.from_bytes(start[8:][:length_bytes], "little")) > HEADER_BYTES:
            raise self._refusal(f"must have a header of at most {HEADER_BYTES} bytes, got {length}")
        header = io.BytesIO(start)
        header.seek(8)
        try:
            self.shape, _, self.dtype = read(header, max_header_size=HEADER_BYTES)
        except Exception as error:
            raise _unreadable(where, error, name) from None
        if self.dtype.hasobject:
            raise self._refusal("must be a plain array, got pickled objects, never loaded")
        expected, got = math.prod(self.shape) * self.dtype.itemsize, size - header.tell()
        if min(self.shape, default=0) < 0 or expected != got:
            raise self._refusal(
                f"must be a whole array, got {got} bytes for {one_line(self.shape)} of {self.type}"
            )

    @property
    def type(self) -> str:
        return one_line(self.dtype)

    def values(self) -> np.ndarray:
        try:
            with self._archive.open(self._member) as file:
                array = npy.read_array(file, allow_pickle=False, max_header_size=HEADER_BYTES)
                file.read(1)  # reaches the member's end, where its checksum is compared
        except Exception as error:
            raise _unreadable(self._where, error, self._name) from None
        return array

    def _refusal(self, message: str) -> UsageError:
        return UsageError(f"{self._where}: {self._name} {message}")


def _read_npz(path: Path, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as float32 [N, C, H, W] or [N, H, W] and labels. All that headers tell is checked
    before any value is read."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{where}: must be a file, got a device, a pipe or a socket")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror or error}") from None
    with file:
        archive = _archive(file, where)
        # As numpy.load: the member x.npy is the array x.
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if not {"x", "y"} <= set(members):
            got = one_line(", ".join(members)) or "none"
            raise UsageError(f"{where}: must hold arrays x and y, got {got}")
        x, y = (_Array(archive, members[name], name, where) for name in ("x", "y"))
        _check_headers(x, y, where)
        labels = y.values()
        _check_labels(labels, where)
        return _float_pixels(x.values(), where), labels


def _archive(file: BinaryIO, where: str) -> zipfile.ZipFile:
    try:
        start = file.read(4)
        # What an archive starts with: its first member or, where it has none, its end.
        if start in (b"", b"PK\x03\x04", b"PK\x05\x06"):
            return zipfile.ZipFile(file)
    except Exception as error:
        raise _unreadable(where, error) from None
    got = "a single array" if start == npy.MAGIC_PREFIX[:4] else "something else"
    raise UsageError(f"{where}: must be an .npz file with arrays x and y, got {got}")


def _unreadable(where: str, error: Exception, array: str = "the file") -> UsageError:
    # The zip reader, the decompressor and the array header's parser each raise types of their
    # own on a damaged file, too many to list.
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UsageError(
        f"{where}: must be a whole .npz file, but {array} cannot be read: {one_line(reason)}"
    )


def _check_headers(x: _Array, y: _Array, where: str) -> None:
    if len(y.shape) != 1:
        raise UsageError(f"{where}: y must be of shape [N], got {one_line(y.shape)}")
    if y.dtype.kind not in "iu":
        raise UsageError(f"{where}: y must hold integers, got {y.type}")
    if y.shape == (0,):
        raise UsageError(f"{where}: y must hold at least one label, got none")
    if len(x.shape) not in (3, 4) or 0 in x.shape[1:]:
        raise UsageError(
            f"{where}: x must be of shape [N, H, W] or [N, C, H, W], got {one_line(x.shape)}"
        )
    if x.shape[0] != y.shape[0]:
        raise UsageError(
            f"{where}: x and y must be of one length, "
            f"got {x.shape[0]} images and {y.shape[0]} labels"
        )
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise UsageError(f"{where}: x must be uint8 or floating point, got {x.type}")
    _check_memory(x.shape, x.dtype.itemsize, f"{where}: x", x.type)
    # As stored, sorted and as int64; there may be more of them than of pixels.
    _check_memory(y.shape, 2 * y.dtype.itemsize + 4, f"{where}: y", y.type)


def _check_memory(shape: tuple[int, ...], itemsize: int, what: str, kind: str = "uint8") -> None:
    # It is in memory twice: as stored, and as float32. A small file may unpack to any size.
    needed = math.prod(shape) * (itemsize + 4)
    if needed > (here := _memory()):
        raise UsageError(
            f"{what} must fit into memory, got {one_line(shape)} of {kind}, which takes "
            f"{needed / 2**30:.1f} GiB of {here / 2**30:.1f}"
        )


def _memory() -> int:
    """The bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_labels(y: np.ndarray, where: str) -> None:
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


def _float_pixels(x: np.ndarray, where: str) -> np.ndarray:
    """Returns `x` as float32 with every pixel finite."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    with np.errstate(over="ignore"):  # a double too large for float32 is reported just below
        pixels = x.astype(np.float32)
    bad = np.argwhere(~np.isfinite(pixels))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        raise UsageError(f"{where}: x must hold finite float32 pixels, got {x[at]} at {list(at)}")
    return pixels


def _images(source: str, x: np.ndarray, y: Any, names: tuple[str, ...] = ()) -> Images:
    x = np.ascontiguousarray(x[:, None] if x.ndim == 3 else x)
    y = np.ascontiguousarray(y, dtype=np.int64)
    digest = hashlib.sha256(repr(x.shape).encode())
    digest.update(x.data)  # no copy
    digest.update(y.data)
    return Images(source, x, y, int(y.max()) + 1, digest.hexdigest(), names)
