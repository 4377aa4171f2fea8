"""The ops as functions, in the manner of torch.nn.functional."""

from .ops.batch_norm import batch_norm, batch_norm_act
from .ops.dropout import dropout, dropout1d, dropout2d, dropout3d

__all__ = [
    "batch_norm",
    "batch_norm_act",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
]
