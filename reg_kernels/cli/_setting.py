"""What nets are trained on, as `train`, `compare` and `tune` are told: data, kernels and device."""

from __future__ import annotations

import argparse

import torch

from .. import backends
from ._data import DIGITS
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


def device_from(name: str | None) -> torch.device:
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


def implementation_from(args: argparse.Namespace, device: torch.device) -> str:
    """The implementation that the fused kernels run: in training, or at least in the timing."""
    if args.kernels == "eager" and args.backend is not None:
        raise UsageError(f"--backend: goes with --kernels fused, got {args.backend} with eager")
    name = backends.forced_by() if args.backend is None else args.backend
    if name is None:
        return backends.choose("dropout", device.type, torch.float32)
    if (reason := backends.why_not(name, device.type, torch.float32)) is not None:
        source = "--backend " if args.backend is not None else "REG_KERNELS_BACKEND="
        raise UsageError(f"{source}{name} cannot run on {device.type}: {reason}")
    return name


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
