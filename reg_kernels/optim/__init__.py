"""Optimizers whose step is one launch for all parameters of a dtype, drop-in for `torch.optim`.

`AdamW` and `SGDW` decay the weights apart from the gradient; `Adam` and `SGD` are the same with
`decay="l2"`. `param_groups` keeps biases and norms out of the decay.
"""

from ._param_groups import param_groups
from .adamw import Adam, AdamW
from .sgdw import SGD, SGDW

__all__ = ["SGD", "SGDW", "Adam", "AdamW", "param_groups"]
