"""Draws what a pipeline of augmentation does to images, with the parameters under each.

A row for each image: the image itself, then samples of what the pipeline makes of it. Look at it
before training: whether what a label says is still to be seen. The pipeline is a line of
transforms, as "RandomResizedCrop(224), RandomHorizontalFlip(), RandAugment(2, 9)", in which timm's
strings may stand, as rand-m9-mstd0.5-inc1. A file that is no whole image is named, and the others
are drawn all the same; the exit code is 1 then. Images are drawn as they are stored, as a loader
reads them: neither turned by what a camera noted nor shown through.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import augment, backends
from ._errors import UsageError, printable
from ._files import output_file, write_output
from ._folder import read_image

DEFAULT = "RandomResizedCrop(224), RandomHorizontalFlip(), RandAugment(2, 9), RandomErasing(0.25)"
_CELL = 2.4  # inches, of an image and the words under it
_WORDS = 40  # characters of a line under an image
_MOST_PIXELS = 1024  # a side, of what is drawn: of a larger image rows and columns are left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files of images")
    parser.add_argument(
        "--pipeline",
        default=DEFAULT,
        metavar="STRING",
        help="the transforms, a comma between them (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("augmented.png"),
        metavar="FILE",
        help="the picture: .png, .pdf, .svg or .jpg (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=5, metavar="N", help="of each image (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of all draws (default: %(default)s)"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="round as torchvision does: to whole numbers after each transform",
    )
    parser.add_argument(
        "--backend",
        choices=backends.NAMES,
        help="the implementation (default: the first that runs)",
    )


def run(args: argparse.Namespace) -> int:
    if args.samples < 1:
        raise UsageError(f"--samples: must be at least 1, got {args.samples}")
    formats = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
    if args.out.suffix.lower() not in formats:
        raise UsageError(f"--out: must end in one of {', '.join(formats)}, got {args.out}")
    pipeline = _pipeline(args)
    out = output_file("--out", args.out)
    rows, failed = [], 0
    for number, path in enumerate(args.images):
        try:
            image = read_image(path)
        except OSError as error:
            failed += 1
            print(f"reg-kernels augment: {printable(path)}: {error}", file=sys.stderr)
            continue
        rows.append(
            (printable(path.name), image, *_augmented(pipeline, image, number, args.samples, path))
        )
    if not rows:
        print("reg-kernels augment: no image could be read: nothing was drawn", file=sys.stderr)
        return 1
    figure = _draw(rows, args.samples)
    write_output("--out", out, lambda file: figure.savefig(file, dpi=100, bbox_inches="tight"))
    return 1 if failed else 0


def _pipeline(args: argparse.Namespace) -> augment.Pipeline:
    options = {"seed": args.seed, "layout": "NHWC", "exact": "torchvision" if args.exact else None}
    try:
        pipeline = augment.from_text(args.pipeline, **options, backend=args.backend)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--pipeline: {error}") from None
    if any(isinstance(transform, augment.Mixup) for transform in pipeline.transforms):
        raise UsageError("--pipeline: must mix no images with others, got a Mixup")
    return pipeline


def _augmented(
    pipeline: augment.Pipeline, image: Tensor, number: int, samples: int, path: Path
) -> tuple[Tensor, list[str]]:
    """The samples (N, H, W, 3) in [0, 1], and what is said under each."""
    indices = range(number * samples, (number + 1) * samples)
    try:
        result, params = pipeline([image] * samples, indices=[*indices], return_params=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path}: {error}") from None
    return _shown(result), [describe(params, sample) for sample in range(samples)]


def _shown(result: Tensor) -> Tensor:
    """What can be seen: floats that have left [0, 1] are brought back, each image by itself."""
    pixels = result.double().permute(0, 2, 3, 1)
    if result.dtype == torch.uint8:
        pixels = pixels / 255
    low, high = (f(pixels, (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    outside = (low < -1e-6) | (high > 1 + 1e-6)
    pixels = torch.where(outside, (pixels - low) / (high - low).clamp(min=1e-12), pixels)
    return pixels.expand(*pixels.shape[:3], 3)


def describe(params: augment.Params, sample: int) -> str:
    """What was drawn for a sample: a line for each transform that applies."""
    found: dict[str, dict[str, float]] = {}
    for column, value in zip(params.columns, params.table[sample].tolist(), strict=True):
        name, _, field = column.rpartition(".")
        if name:  # not what the draws are keyed by
            found.setdefault(name, {})[field] = value
    lines = []
    for name, fields in found.items():
        if not fields.pop("applied", True):
            continue
        for field in [field for field in fields if re.fullmatch(r"op\d+", field)]:
            number = field.removeprefix("op")
            op, strength = int(fields.pop(field)), fields.pop(f"strength{number}", 0.0)
            fields[f"{number}. {augment.POLICY_OPS[op]}"] = strength
        words = ", ".join(
            field if field.endswith(". Identity") else f"{field} {value:.3g}"
            for field, value in fields.items()
        )
        lines.append(f"{name}: {words}" if words else name)
    return "\n".join(lines)


def _draw(rows: list[tuple[str, Tensor, Tensor, list[str]]], samples: int) -> Figure:
    lines = [
        [
            "\n".join(line for text in words.split("\n") for line in textwrap.wrap(text, _WORDS))
            for words in (name, *said)
        ]
        for name, _, _, said in rows
    ]
    below = max(text.count("\n") + 1 for row in lines for text in row) * 0.11 + 0.1
    size = ((samples + 1) * _CELL, len(rows) * (_CELL + below))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), samples + 1, squeeze=False)
    for axes, (_, image, result, _), words in zip(grid, rows, lines, strict=True):
        cells: list[Any] = [image, *result]
        for each, cell, text in zip(axes, cells, words, strict=True):
            every = max(1, max(cell.shape[:2]) // _MOST_PIXELS)
            each.imshow(cell[::every, ::every].numpy(), interpolation="nearest")
            each.set_xticks([])
            each.set_yticks([])
            each.set_xlabel(text, fontsize=6, loc="left", parse_math=False)
    return figure
