"""The ops: schema, fake, gradient, choice of implementation. Importing this registers them all."""

from .. import backends
from . import batch_norm, cross_entropy, distillation, dropout, mixup, optimizer_step, penalty

# The kernels register themselves when their libraries are loaded, so that torch.ops.reg_kernels is
# complete from here on.
backends.load_libraries()

__all__ = [
    "batch_norm",
    "cross_entropy",
    "distillation",
    "dropout",
    "mixup",
    "optimizer_step",
    "penalty",
]
