"""Dropout layers: torch's, with the fused ops inside, and stochastic depth."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import has_torch_function, has_torch_function_unary

from .. import backends
from .. import functional as F
from .._twins import twin_of
from ..ops._checks import probability
from ._leaf import call_in_graph

__all__ = ["DropPath", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]


class _FusedDropout(torch.nn.modules.dropout._DropoutNd):
    """What the four layers share: torch's constructor and state, and a choice of implementation.

    Args:
        p: the probability of dropping, in [0, 1].
        inplace: write over the input.
        backend: "native", "triton" or "reference"; by default the first that can run at a call.
    """

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
    """`torch.nn.Dropout` by `reg_kernels.functional.dropout`: any shape, each element by itself."""

    _function = staticmethod(F.dropout)


@twin_of(torch.nn.Dropout1d)
class Dropout1d(_FusedDropout, torch.nn.Dropout1d):
    """`torch.nn.Dropout1d` by `reg_kernels.functional.dropout1d`: (N, C, L) or (C, L)."""

    _function = staticmethod(F.dropout1d)


@twin_of(torch.nn.Dropout2d)
class Dropout2d(_FusedDropout, torch.nn.Dropout2d):
    """`torch.nn.Dropout2d` by `reg_kernels.functional.dropout2d`: channels of (N, C, H, W)."""

    _function = staticmethod(F.dropout2d)


@twin_of(torch.nn.Dropout3d)
class Dropout3d(_FusedDropout, torch.nn.Dropout3d):
    """`torch.nn.Dropout3d` by `reg_kernels.functional.dropout3d`: channels of (N, C, D, H, W)."""

    _function = staticmethod(F.dropout3d)


class DropPath(torch.nn.Module):
    """Stochastic depth by `reg_kernels.functional.drop_path`: `layer(input, residual=None)`.

    Args:
        p: the probability of dropping a sample, in [0, 1].
        scale_by_keep: whether what is kept is scaled up by the inverse of the one of keeping.
        backend: "native", "triton" or "reference"; by default the first that can run at a call.
    """

    def __init__(self, p: float, scale_by_keep: bool = True, *, backend: str | None = None) -> None:
        super().__init__()
        self.p = probability(type(self).__name__, "p", p)
        self.scale_by_keep = scale_by_keep
        self.backend = None if backend is None else backends.check_name(backend, "backend")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        given = (input,) if residual is None else (input, residual)
        if has_torch_function(given) and (call := call_in_graph(self, *given)) is not None:
            return call
        return F.drop_path(
            *(input, self.p, self.training),
            residual=residual,
            scale_by_keep=self.scale_by_keep,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, scale_by_keep={self.scale_by_keep}"
