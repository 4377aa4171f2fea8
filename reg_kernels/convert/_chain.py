"""The layers that a fused chain is made of, under the names that they had before.

Each is a class that stands in for torch's on the same object, as with every swap: parameters,
buffers and attributes stay, and giving the class back undoes it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .._activation import NUMBERS
from ..nn.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..reference.batch_norm import activate
from ._layers import Fused

SHAPED_BY_FUSING = ("activation", "negative_slope", "_dropout", "_adds_in_place")


class _Chain(Fused):
    """A BatchNorm that does what followed it, too: see `_fuse`.

    `layer(input, residual=None, p=0.0, dropping=False)` is
    dropout(activation(batch_norm(input) + residual), p, dropping), in one pass where the tensors
    and the flags let it be one, else one after the other, as the layers would.
    """

    # What held the dropout, unless a function of the forward did: its p and its flag rule, so that
    # freezing the statistics (bn.eval()) does not stop the dropout. In a tuple, which hides it from
    # nn.Module: it has its own place in the model.
    _dropout: tuple[nn.Module, ...] = ()
    _adds_in_place = False  # the residual was added by +=, which keeps shape and dtype

    @property
    def drop(self) -> float:
        return self._dropout[0].p if self._dropout else 0.0

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        p: float = 0.0,
        dropping: bool = False,
    ) -> Tensor:
        self._check_input_dim(input)
        if self._dropout:
            p, dropping = self._dropout[0].p, self._dropout[0].training
        p = p if dropping else 0.0
        if residual is None or _fits(residual, input):
            together = p if self.training else 0.0
            output = self._normalize(input, residual, self.activation, together)
            return output if together == p else F.dropout(output, p, backend=self.backend)
        output = self._normalize(input, None, None, 0.0)
        if self._adds_in_place:
            output += residual
        else:
            output = output + residual
        output = activate(output, NUMBERS[self.activation], self.negative_slope)
        return F.dropout(output, p, dropping, backend=self.backend)

    def _normalize(
        self, input: Tensor, residual: Tensor | None, activation: str | None, drop: float
    ) -> Tensor:
        running_mean, running_var, training, momentum, counter = self._statistics()
        return F.batch_norm_act(
            *(input, running_mean, running_var, self.weight, self.bias, residual),
            *(training, momentum, self.eps),
            activation=activation,
            negative_slope=self.negative_slope,
            drop=drop,
            num_batches_tracked=counter,
            backend=self.backend,
        )

    def take_apart(self) -> None:
        for name in SHAPED_BY_FUSING:
            vars(self).pop(name, None)
        self.__class__ = next(cls for cls, chain in CHAINS.items() if chain is type(self))


def _fits(residual: Any, input: Tensor) -> bool:
    """Whether a residual can be added in the same pass; torch would broadcast or promote others."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


class BatchNormChain1d(_Chain, BatchNormAct1d):
    pass


class BatchNormChain2d(_Chain, BatchNormAct2d):
    pass


class BatchNormChain3d(_Chain, BatchNormAct3d):
    pass


CHAINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNormChain1d,
    nn.BatchNorm2d: BatchNormChain2d,
    nn.BatchNorm3d: BatchNormChain3d,
}


class _Absorbed(Fused):
    """A layer whose work a BatchNorm before it does: passes its input on."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def take_apart(self) -> None:
        self.__class__ = next(cls for cls, absorbed in ABSORBED.items() if absorbed is type(self))


class AbsorbedReLU(_Absorbed, nn.ReLU):
    pass


class AbsorbedLeakyReLU(_Absorbed, nn.LeakyReLU):
    pass


class AbsorbedSiLU(_Absorbed, nn.SiLU):
    pass


class AbsorbedGELU(_Absorbed, nn.GELU):
    pass


class AbsorbedDropout(_Absorbed, nn.Dropout):
    """Its `p` and `training` still rule: the BatchNorm looks here."""


ABSORBED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: AbsorbedReLU,
    nn.LeakyReLU: AbsorbedLeakyReLU,
    nn.SiLU: AbsorbedSiLU,
    nn.GELU: AbsorbedGELU,
    nn.Dropout: AbsorbedDropout,
}
