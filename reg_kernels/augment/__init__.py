"""Augmentation that mixes the samples of a batch, and the targets that come of it."""

from .._mixed_target import MixedTarget
from .mixup import Mixup

__all__ = ["MixedTarget", "Mixup"]
