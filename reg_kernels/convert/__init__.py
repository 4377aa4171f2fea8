"""Models as a whole: swapping layers, fusing chains of them, folding BatchNorm away.

`_layers` swaps one layer at a time; `_trace` reads a module's forward, `_fuse` and `_fold` look for
chains in what it read, and `_chain` runs them.
"""

from .._twins import twin_of
from ._layers import convert, revert
from ._report import Conversion

__all__ = ["Conversion", "convert", "revert", "twin_of"]
