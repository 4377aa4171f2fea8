"""What goes around a training: recipes of regularisation, and when to stop."""

from .early_stopping import EarlyStopping
from .recipe import METHODS, MODELS, Method, Recipe

__all__ = ["METHODS", "MODELS", "EarlyStopping", "Method", "Recipe"]
