"""What goes around a training: recipes of regularisation, what in them is at odds, and when to
stop."""

from .conflicts import Conflict, conflicts
from .early_stopping import EarlyStopping
from .recipe import METHODS, MODELS, Method, Recipe

__all__ = ["METHODS", "MODELS", "Conflict", "EarlyStopping", "Method", "Recipe", "conflicts"]
