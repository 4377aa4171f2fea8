"""BatchNorm layers: torch's, with the fused ops inside, and the chain behind them as one layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from .. import backends
from .. import functional as F
from .._twins import twin_of
from ..ops._batch_norm_checks import activation_number
from ..ops._checks import probability
from ..ops.batch_norm import SLOPE
from ._leaf import are_overridden, buffer, call_in_graph, parameter

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
]


ARGUMENTS = """

    Args:
        num_features: C, the number of channels.
        eps: a number that is added to the variance.
        momentum: the batch's share in the new running statistics; None weighs all batches alike.
        affine: True gives each channel a weight and a bias.
        track_running_stats: True keeps running statistics, which evaluation uses.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        bias: False leaves out the bias.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.
"""

ARGUMENTS_ACT = (
    ARGUMENTS
    + """        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        drop: the probability of dropping an element of the result in training, in [0, 1].
        negative_slope: the slope of leaky_relu below zero.

    Call it as `layer(input, residual=None)`: the result is
    `dropout(activation(batch_norm(input) + residual))`, by `functional.batch_norm_act`. Its
    `state_dict` is that of a BatchNorm.
"""
)

_RAISES = """
    Raises:
        ValueError: at a call, the input has another number of dimensions.

    A call raises what `reg_kernels.functional.batch_norm` raises.
    """

_RAISES_ACT = """
    Raises:
        ValueError: `activation` or `backend` is unknown, or `drop` is outside [0, 1]; at a call,
            the input has another number of dimensions.

    A call raises what `reg_kernels.functional.batch_norm_act` raises.

    Source: as for `reg_kernels.functional.batch_norm_act`.
    """


class _FusedBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the layers share: torch's constructor and state, and a choice of implementation."""

    backend: str | None = None
    _ranks: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # which not every torch's constructor takes
            self.register_parameter("bias", None)
        if backend is not None:
            self.backend = backends.check_name(backend, "backend")

    def forward(self, input: Tensor) -> Tensor:
        if has_torch_function_unary(input) and (call := call_in_graph(self, input)) is not None:
            return call
        self._check_input_dim(input)
        running_mean, running_var, training, momentum, counter = self._statistics()
        return F.batch_norm(
            *(input, running_mean, running_var, parameter(self, "weight"), parameter(self, "bias")),
            *(training, momentum, self.eps),
            num_batches_tracked=counter,
            process_group=self.across(input),
            backend=self.backend,
        )

    def across(self, input: Tensor) -> Any:
        """The group whose batches a call normalises together; None: this rank's alone."""
        return None

    def _check_input_dim(self, input: Tensor) -> None:
        # A tracer's proxy has no rank to check; what is no tensor is refused by the function.
        if not isinstance(input, Tensor):
            return
        if has_torch_function_unary(input) and are_overridden(input):
            return
        if input.dim() not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"{type(self).__name__}: input must be {expected}, got {input.dim()}D")

    def _statistics(
        self,
    ) -> tuple[Tensor | None, Tensor | None, bool, float | None, Tensor | None]:
        """(running_mean, running_var, training, momentum, num_batches_tracked) of a call.

        As torch's layers decide them: the batch's statistics in training or without any others.
        """
        mean, var = buffer(self, "running_mean"), buffer(self, "running_var")
        if not self.training:
            return mean, var, mean is None and var is None, 0.0, None
        if not self.track_running_stats:
            return None, None, True, 0.0, None
        counter = buffer(self, "num_batches_tracked")
        momentum = 0.0 if self.momentum is None and counter is None else self.momentum
        return mean, var, True, momentum, counter


@twin_of(torch.nn.BatchNorm1d)
class BatchNorm1d(_FusedBatchNorm, torch.nn.BatchNorm1d):
    """Normalises (N, C) or (N, C, L) over the batch, as `torch.nn.BatchNorm1d` does."""

    __doc__ = f"{__doc__}{ARGUMENTS}{_RAISES}"

    _ranks = (2, 3)


@twin_of(torch.nn.BatchNorm2d)
class BatchNorm2d(_FusedBatchNorm, torch.nn.BatchNorm2d):
    """Normalises (N, C, H, W) over the batch, as `torch.nn.BatchNorm2d` does."""

    __doc__ = f"{__doc__}{ARGUMENTS}{_RAISES}"

    _ranks = (4,)


@twin_of(torch.nn.BatchNorm3d)
class BatchNorm3d(_FusedBatchNorm, torch.nn.BatchNorm3d):
    """Normalises (N, C, D, H, W) over the batch, as `torch.nn.BatchNorm3d` does."""

    __doc__ = f"{__doc__}{ARGUMENTS}{_RAISES}"

    _ranks = (5,)


class _FusedBatchNormAct(_FusedBatchNorm):
    """What the layers with an activation share."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = "relu",
        drop: float = 0.0,
        negative_slope: float = SLOPE,
        backend: str | None = None,
    ) -> None:
        activation_number(type(self).__name__, activation)
        probability(type(self).__name__, "drop", drop)
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            backend=backend,
        )
        self.activation = activation
        self.drop = drop
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if has_torch_function_variadic(input, residual):
            call = call_in_graph(self, *((input,) if residual is None else (input, residual)))
            if call is not None:
                return call
        self._check_input_dim(input)
        running_mean, running_var, training, momentum, counter = self._statistics()
        return F.batch_norm_act(
            *(input, running_mean, running_var),
            *(parameter(self, "weight"), parameter(self, "bias"), residual),
            *(training, momentum, self.eps),
            activation=self.activation,
            negative_slope=self.negative_slope,
            drop=self.drop if self.training else 0.0,
            num_batches_tracked=counter,
            process_group=self.across(input),
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation!r}, drop={self.drop}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text


class BatchNormAct1d(_FusedBatchNormAct, torch.nn.BatchNorm1d):
    """BatchNorm1d → (+ residual) → activation → dropout of (N, C) or (N, C, L), in one pass."""

    __doc__ = f"{__doc__}{ARGUMENTS_ACT}{_RAISES_ACT}"

    _ranks = (2, 3)


class BatchNormAct2d(_FusedBatchNormAct, torch.nn.BatchNorm2d):
    """BatchNorm2d → (+ residual) → activation → dropout of (N, C, H, W), in one pass."""

    __doc__ = f"{__doc__}{ARGUMENTS_ACT}{_RAISES_ACT}"

    _ranks = (4,)


class BatchNormAct3d(_FusedBatchNormAct, torch.nn.BatchNorm3d):
    """BatchNorm3d → (+ residual) → activation → dropout of (N, C, D, H, W), in one pass."""

    __doc__ = f"{__doc__}{ARGUMENTS_ACT}{_RAISES_ACT}"

    _ranks = (5,)
