"""The ops: schema, fake, gradient, choice of implementation. Importing this registers them all."""

from . import dropout

__all__ = ["dropout"]
