"""What training on several ranks of `torch.distributed` needs beside the layers and optimizers."""

__all__: list[str] = []

from ._faults import FiniteCheck, check_alike, parameters_of
from ._guard import guard
from ._ranks import RankError

__all__ = ["FiniteCheck", "RankError", "check_alike", "guard", "parameters_of"]
