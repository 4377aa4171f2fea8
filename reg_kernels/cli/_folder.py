"""Image files, one by one or in folders of classes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import _console, augment
from ._errors import UsageError, printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
# What a file is, its first bytes tell, not its name. Of the other formats that Pillow opens, one
# starts an interpreter of PostScript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_BATCH = 64


def read_image(path: Path) -> Tensor:
    """(H, W, 3), uint8. Raises OSError, whatever is wrong with the file."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError("must be a file, got a device, a pipe or a socket")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_FORMATS) as image:
            pixels = np.array(image if image.mode.startswith("I;16") else image.convert("RGB"))
    except Exception as error:  # decoders raise many types on a damaged file
        if isinstance(error, OSError) and error.strerror:
            raise OSError(error.strerror) from None
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(f"no whole image: {reason}") from None
    if pixels.dtype == np.uint16:  # gray of 16 bits, which Pillow would cut, not scale
        pixels = np.rint(pixels / 257).astype(np.uint8)[:, :, None].repeat(3, 2)
    return torch.from_numpy(pixels)


def class_folders(root: Path, where: str) -> tuple[list[str], list[tuple[Path, int]]]:
    """The names of the folders in `root`, in alphabetical order, each a class, and the image files
    below them with the number of their class."""
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _shown(entry))
        files = [
            (path, number)
            for number, name in enumerate(names)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file() and _shown(path)
        ]
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror or error}") from None
    if len(names) < 2:
        got = f"{len(names)} ({printable(names[0])})" if names else "none"
        raise UsageError(f"{where}: must have a folder for each of at least 2 classes, got {got}")
    for number, name in enumerate(names):
        if all(of != number for _, of in files):
            raise UsageError(
                f"{where}: must have an image in each class, got none in {printable(name)}; "
                f"images end in {', '.join(SUFFIXES)}"
            )
    return names, files


def load_folder(files: list[tuple[Path, int]], side: int, where: str) -> np.ndarray:
    """The images [N, C, side, side], uint8, in the order of `files`: the shorter side is resized
    and the middle cut out. C is 1 where all of them are gray, else 3. Workers decode."""
    workers = min(len(os.sched_getaffinity(0)), len(files) // _BATCH)
    loader: DataLoader[tuple[Tensor | None, str]] = DataLoader(
        _Files([path for path, _ in files], side), _BATCH, num_workers=workers, collate_fn=list
    )
    parts, broken = [], []
    with _console.progress() as progress:
        bar = progress.add_task("reading images", total=len(files))
        for batch in loader:
            broken += [said for image, said in batch if image is None]
            images = [image for image, _ in batch if image is not None]
            if images and not broken:
                parts += images
            progress.advance(bar, len(batch))
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UsageError(f"{where}: must hold whole images, got {broken[0]}{more}")
    pixels = torch.cat(parts)
    is_gray = bool((pixels == pixels[:, :1]).all())
    return (pixels[:, :1] if is_gray else pixels).numpy()


class _Files(Dataset[tuple[Tensor | None, str]]):
    """Images (1, C, side, side) by number; one that cannot be read is None, with what is wrong."""

    def __init__(self, paths: list[Path], side: int) -> None:
        self._paths = paths
        # Each by itself: a small file may hold an image that takes half a gigabyte.
        self._shrink = augment.Pipeline(
            augment.Resize(side), augment.CenterCrop(side), dtype=torch.uint8, layout="NHWC"
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Tensor | None, str]:
        path = self._paths[number]
        try:
            return self._shrink([read_image(path)]), ""
        except (OSError, ValueError, RuntimeError) as error:  # a side may be too long for it
            return None, f"{printable(path)}: {error}"


def _shown(path: Path) -> bool:
    return not path.name.startswith(".")
