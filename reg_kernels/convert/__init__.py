"""Models as a whole: swapping layers, fusing chains of them, folding BatchNorm away.

`_layers` swaps one layer at a time; `_trace` reads a module's forward, `_fuse` and `_fold` look for
chains in what it read.
"""

from ._layers import Conversion, convert, revert, twin_of

__all__ = ["Conversion", "convert", "revert", "twin_of"]
