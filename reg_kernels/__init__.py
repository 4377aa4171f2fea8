"""Fused regularisation kernels for PyTorch: CUDA C++, Triton and native CPU code.

`functional`, `nn` and `optim` are drop-in for torch's, `augment` mixes batches; `convert` swaps the
layers of a model and fuses chains of them; `fold_batch_norm` prepares one for evaluation; `backend`
picks the implementation.
"""

from . import augment, functional, nn, optim
from .backends import BackendUnavailable, backend
from .convert import convert, revert
from .convert._fold import fold_batch_norm

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "augment",
    "backend",
    "convert",
    "fold_batch_norm",
    "functional",
    "nn",
    "optim",
    "revert",
]
