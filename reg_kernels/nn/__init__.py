"""The ops as layers, drop-in for those of `torch.nn`."""

from . import batch_norm, dropout, losses, noise, stochastic_depth, sync_batch_norm
from .batch_norm import *  # noqa: F403 (a file says by its __all__ which layers it has)
from .dropout import *  # noqa: F403
from .losses import *  # noqa: F403
from .noise import *  # noqa: F403
from .stochastic_depth import *  # noqa: F403
from .sync_batch_norm import *  # noqa: F403

__all__ = [*batch_norm.__all__, *dropout.__all__, *losses.__all__, *noise.__all__]
__all__ += [*stochastic_depth.__all__, *sync_batch_norm.__all__]
