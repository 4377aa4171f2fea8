"""What goes around a training loop: recipes of regularisation, what in them is at odds, and when to
stop and with which weights."""

from .conflicts import Conflict, conflicts
from .early_stopping import EarlyStopping, StopReason
from .recipe import METHODS, MODELS, Method, Recipe

__all__ = [
    "METHODS",
    "MODELS",
    "Conflict",
    "EarlyStopping",
    "Method",
    "Recipe",
    "StopReason",
    "conflicts",
]
