"""What a net is trained with, in one place for PyTorch's own and for the fused twins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._mixed_target import MixedTarget
from ...training import Recipe
from .._data import Split

ATTACK_STEPS = 7  # of the attacks that are trained with, and on the test set

# (images, labels) -> mixed images and their target
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Any]]
# (scores, target) -> the mean over the images
Loss = Callable[[Tensor, Tensor | MixedTarget], Tensor]
# (scores, the teacher's scores, target) -> likewise
Distill = Callable[[Tensor, Tensor, Tensor | MixedTarget], Tensor]
# (images, their numbers in the training set, epoch) -> images that were changed
Augment = Callable[[Tensor, Tensor, int], Tensor]
# (model, images, target, loss) -> images that are harder
Attack = Callable[[nn.Module, Tensor, Any, Loss], Tensor]


@dataclass(frozen=True)
class Kernels:
    """What a net is trained with."""

    convert: Callable[[nn.Module], nn.Module]  # swaps in the layers
    # AdamW of a model by a recipe's learning rate, decay and L1
    optimizer: Callable[[nn.Module, Recipe], torch.optim.Optimizer]
    # By a recipe's alphas; draws from torch's generator, which a state keeps
    mix: Callable[[Recipe, int], Mix]
    loss: Callable[[float], Loss]  # cross-entropy; takes a label smoothing
    distill: Callable[[Recipe], Distill]
    l2: Callable[[Sequence[Tensor]], Tensor]  # the sum of squares
    drop_path: Callable[[float], nn.Module]  # takes a probability
    noise: Callable[[float], nn.Module]  # takes a deviation
    attack: Callable[[float, Split], Attack]  # takes a radius
    augment: Callable[[float, Split, int], Augment]  # takes a magnitude and a seed


@dataclass(frozen=True)
class Ranges:
    """What augmentation does to images at a magnitude. Digits are no others when they are turned,
    moved and scaled a little, and partly erased; mirrored they would be."""

    degrees: float
    shift: float  # in shares of an image's sides
    scale: tuple[float, float]
    erased: float  # the share of the images that are erased in part
    erased_area: tuple[float, float] = (0.02, 0.06)
    erased_ratio: tuple[float, float] = (0.5, 2.0)

    @classmethod
    def of(cls, magnitude: float) -> Ranges:
        wide = 0.1 * magnitude
        return cls(10 * magnitude, wide, (1 - wide, 1 + wide), min(1.0, 0.25 * magnitude))


def background(data: Split) -> float:
    """What lies around an image, standardised: the least pixel, the mean of all channels'."""
    return float(((data.lower - data.mean) / data.std).mean())
