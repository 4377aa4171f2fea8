"""What training on several ranks of `torch.distributed` needs beside the layers and optimizers."""

from .._rank_error import RankError
from ._checkpoint import load_checkpoint, save_checkpoint
from ._faults import FiniteCheck, check_alike, parameters_of
from ._guard import guard
from ._shard import batch, part, shard, unshard, whole

__all__ = [
    "FiniteCheck",
    "RankError",
    "batch",
    "check_alike",
    "guard",
    "load_checkpoint",
    "parameters_of",
    "part",
    "save_checkpoint",
    "shard",
    "unshard",
    "whole",
]
