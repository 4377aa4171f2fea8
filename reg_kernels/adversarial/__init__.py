"""Adversarial training: attacks that leave no trace in the model, and losses that train by them."""

from .attacks import FGSM, PGD
from .free import FreeAdversarial
from .trades import trades_loss

__all__ = ["FGSM", "PGD", "FreeAdversarial", "trades_loss"]
