"""The ops: schema, fake, gradient, choice of implementation. Importing this registers them all."""

from .. import backends
from . import batch_norm, dropout, optimizer_step, penalty

# The kernels register themselves when their libraries are loaded, so that torch.ops.reg_kernels is
# complete from here on.
backends.load_libraries()

__all__ = ["batch_norm", "dropout", "optimizer_step", "penalty"]
