"""Augmentation: a `Pipeline` of transforms in one pass, each sample with draws of its own, and what
mixes the samples of a batch.

The transforms bear the names and take the arguments of `torchvision.transforms.v2`, and a `p`, but
for those that set the size of the images or the range of their values. Fills, thresholds and values
to erase with are in the values of the pixels, 0 to 255 of bytes and 0 to 1 of floats, until a
`ToDtype` or a `Normalize` says otherwise. A transform's columns are those of `Params`.
"""

from .._mixed_target import MixedTarget
from ._policy_ops import OPS
from .colour import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    RandomAdjustSharpness,
    RandomAutocontrast,
    RandomChannelPermutation,
    RandomEqualize,
    RandomGrayscale,
    RandomInvert,
    RandomPhotometricDistort,
    RandomPosterize,
    RandomSolarize,
)
from .crop import (
    CenterCrop,
    Pad,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    Resize,
)
from .geometry import RandomAffine, RandomPerspective, RandomRotation
from .mixup import CutMix, MixUp, Mixup, RandomChoice
from .noise import Cutout, GaussianNoise, Normalize, RandomErasing, SaltAndPepper, ToDtype
from .params import Params
from .pipeline import Pipeline
from .policies import AugMix, AutoAugment, RandAugment, ThreeAugment, TrivialAugmentWide
from .text import from_text
from .timm import from_timm

#: The operations of policies: columns `op1`, `op2`, ... of parameters hold places in it.
POLICY_OPS = OPS

__all__ = [
    "POLICY_OPS",
    "AugMix",
    "AutoAugment",
    "CenterCrop",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "MixUp",
    "MixedTarget",
    "Mixup",
    "Normalize",
    "Pad",
    "Params",
    "Pipeline",
    "RandAugment",
    "RandomAdjustSharpness",
    "RandomAffine",
    "RandomAutocontrast",
    "RandomChannelPermutation",
    "RandomChoice",
    "RandomCrop",
    "RandomEqualize",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomInvert",
    "RandomPerspective",
    "RandomPhotometricDistort",
    "RandomPosterize",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomSolarize",
    "RandomVerticalFlip",
    "Resize",
    "SaltAndPepper",
    "ThreeAugment",
    "ToDtype",
    "TrivialAugmentWide",
    "from_text",
    "from_timm",
]
