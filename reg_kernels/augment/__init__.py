"""Augmentation that mixes the samples of a batch, and the targets of such a batch."""

from .._mixed_target import MixedTarget
from .mixup import Mixup

__all__ = ["MixedTarget", "Mixup"]
