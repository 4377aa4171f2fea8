"""What nets are trained on, as `train`, `compare` and `tune` are told: data, kernels and device."""

from __future__ import annotations

import argparse

import torch

from .. import backends
from ._data import DIGITS
from ._device import forced_implementations
from ._errors import UsageError


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=DIGITS,
        metavar="digits|FILE.npz|DIR",
        help="scikit-learn's 1,797 handwritten digits; or a file with x, uint8 or floating point "
        "of shape [N, H, W] or [N, C, H, W], and y, integers 0..C-1 of shape [N]; or a folder with "
        "a folder of image files for each class (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=32,
        metavar="N",
        help="the side that the images of a folder are brought to: the shorter side is resized and "
        "the middle cut out (default: %(default)s)",
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
        help="images to train on (default: %(default)s, few enough to overfit)",
    )


def implementation_from(args: argparse.Namespace, device: torch.device) -> str:
    """The implementation that the fused kernels run: in training, or at least in the timing."""
    if args.kernels == "eager" and args.backend is not None:
        raise UsageError(f"--backend: goes with --kernels fused, got {args.backend} with eager")
    forced = forced_implementations([args.backend], device)
    return forced[0] if forced else backends.choose("dropout", device.type, torch.float32)


def check_seeds(first: int, count: int) -> range:
    """The seeds from `--seed` on."""
    if count < 1:
        raise UsageError(f"--seeds: must be at least 1, got {count}")
    # Several generators are seeded; scikit-learn's takes the narrowest range.
    if count > 2**32:
        raise UsageError(f"--seeds: must be at most {2**32}, got {count}")
    if not 0 <= first <= 2**32 - count:
        raise UsageError(f"--seed: must be in 0..{2**32 - count}, got {first}")
    return range(first, first + count)
