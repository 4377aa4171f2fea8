"""Dropout layers: torch's, with the fused ops inside."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from .. import backends
from .. import functional as F
from .._twins import twin_of
from ..ops._checks import probability
from ._leaf import call_in_graph

__all__ = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]


ARGUMENTS = """

    Args:
        p: the probability of dropping, in [0, 1].
        inplace: True writes over the input.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Raises:
        ValueError: `p` is outside [0, 1], or `backend` is unknown.
        TypeError: `p` is no number.

    A call raises what the function of `reg_kernels.functional` raises.
    """


class _FusedDropout(torch.nn.modules.dropout._DropoutNd):
    """What the four layers share: torch's constructor and state, and a choice of implementation."""

    backend: str | None = None
    _function: ClassVar[Any]

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, backend: str | None = None
    ) -> None:
        probability(type(self).__name__, "p", p)
        super().__init__(p, inplace)
        if backend is not None:
            self.backend = backends.check_name(backend, "backend")

    def forward(self, input: Tensor) -> Tensor:
        if has_torch_function_unary(input) and (call := call_in_graph(self, input)) is not None:
            return call
        return self._function(input, self.p, self.training, self.inplace, backend=self.backend)


@twin_of(torch.nn.Dropout)
class Dropout(_FusedDropout, torch.nn.Dropout):
    """Drops elements as `torch.nn.Dropout` does, by `functional.dropout`: any shape."""

    __doc__ = f"{__doc__}{ARGUMENTS}"

    _function = staticmethod(F.dropout)


@twin_of(torch.nn.Dropout1d)
class Dropout1d(_FusedDropout, torch.nn.Dropout1d):
    """Drops channels of (N, C, L) or (C, L), as `torch.nn.Dropout1d` does."""

    __doc__ = f"{__doc__}{ARGUMENTS}"

    _function = staticmethod(F.dropout1d)


@twin_of(torch.nn.Dropout2d)
class Dropout2d(_FusedDropout, torch.nn.Dropout2d):
    """Drops channels of (N, C, H, W), as `torch.nn.Dropout2d` does."""

    __doc__ = f"{__doc__}{ARGUMENTS}"

    _function = staticmethod(F.dropout2d)


@twin_of(torch.nn.Dropout3d)
class Dropout3d(_FusedDropout, torch.nn.Dropout3d):
    """Drops channels of (N, C, D, H, W), as `torch.nn.Dropout3d` does."""

    __doc__ = f"{__doc__}{ARGUMENTS}"

    _function = staticmethod(F.dropout3d)
