"""The ops as layers, drop-in for torch.nn's."""

from .batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)
from .dropout import Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath
from .losses import CrossEntropyLoss, DistillationLoss

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "CrossEntropyLoss",
    "DistillationLoss",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
]
