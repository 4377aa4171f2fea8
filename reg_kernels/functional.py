"""The ops as functions, with the arguments of `torch.nn.functional` and a few of their own."""

from .ops.adversarial_step import adversarial_step_
from .ops.batch_norm import batch_norm, batch_norm_act
from .ops.cross_entropy import cross_entropy
from .ops.distillation import distillation_loss
from .ops.drop_path import drop_path
from .ops.dropout import dropout, dropout1d, dropout2d, dropout3d
from .ops.gaussian_noise import gaussian_noise
from .ops.mixup import cutmix, mixup
from .ops.penalty import l1_penalty, l2_penalty
from .ops.salt_and_pepper import salt_and_pepper
from .ops.uniform_noise import uniform_noise

__all__ = [
    "adversarial_step_",
    "batch_norm",
    "batch_norm_act",
    "cross_entropy",
    "cutmix",
    "distillation_loss",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "gaussian_noise",
    "l1_penalty",
    "l2_penalty",
    "mixup",
    "salt_and_pepper",
    "uniform_noise",
]
