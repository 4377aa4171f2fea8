"""Fused regularisation kernels for PyTorch, in CUDA C++, Triton and native CPU code.

`functional`, `nn` and `optim` are drop-in for torch's; `augment` transforms images and mixes the
samples of a batch, and `adversarial` attacks them; `training` stops in time.
`convert` swaps the layers of a model and fuses chains of them, and `revert` undoes it;
`fold_batch_norm` prepares a model for inference, `export` an exported program. `backend` forces an
implementation.
"""

from . import adversarial, augment, distributed, export, functional, nn, optim, training
from .backends import BackendUnavailable, backend
from .convert import convert, revert
from .convert._fold import fold_batch_norm

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "adversarial",
    "augment",
    "backend",
    "convert",
    "distributed",
    "export",
    "fold_batch_norm",
    "functional",
    "nn",
    "optim",
    "revert",
    "training",
]
