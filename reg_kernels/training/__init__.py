"""Training loops: when to stop."""

from .early_stopping import EarlyStopping, StopReason

__all__ = ["EarlyStopping", "StopReason"]
