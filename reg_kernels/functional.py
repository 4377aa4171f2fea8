"""The ops as functions, in the manner of torch.nn.functional."""

from .ops.dropout import dropout, dropout1d, dropout2d, dropout3d

__all__ = ["dropout", "dropout1d", "dropout2d", "dropout3d"]
