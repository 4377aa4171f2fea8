"""SGDW and SGD."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._algorithm import Algorithm, Group
from ._base import DOCUMENTATION, FusedOptimizer
from ._checks import check_nonnegative


def _moments(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _rates(group: Group) -> tuple[float, float, float]:
    return group["momentum"], group["dampening"], 0.0


class SGDW(FusedOptimizer):
    r"""SGD with momentum and decoupled weight decay, the whole step in one launch.

    .. math::
        g \leftarrow \mathrm{clip}(\pm g / s), \quad
        m \leftarrow \mu m + (1 - \tau) g \quad (m \leftarrow g \text{ at first}), \quad
        d = m \text{ or } g + \mu m \\
        \theta \leftarrow \mathrm{prox}_{\gamma l_1}(\theta - \gamma \lambda \theta - \gamma d)

    Here s is the scale of a loss that `torch.amp.GradScaler` scaled.

    Args:
        params: tensors, (name, tensor) pairs or groups of them, as in torch; float64, float32,
            float16 or bfloat16, on one device or several, mixed at will.
        lr: :math:`\gamma`, at least 0: a float, or a tensor of one element. On CUDA the tensor is
            read on the device, so a captured graph follows it.
        momentum: :math:`\mu`, at least 0.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`, at least 0.
        nesterov: True takes :math:`d = g + \mu m`. It needs a momentum and no dampening.
        maximize: True ascends instead of descending.
        foreach: accepted as in torch; the step is one launch in any case.
        differentiable: must be False.
        fused: True lets the step itself unscale what `torch.amp.GradScaler` scaled.
    """

    __doc__ = str(__doc__).rstrip() + DOCUMENTATION
    _algorithm = Algorithm(
        kind="sgd", decay="decoupled", counts=False, required=(), moments=_moments, rates=_rates
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decay: str | None = None,
        decay_lr: float | None = None,
        l1: float = 0.0,
        ema_decay: float | None = None,
        rounding: str = "nearest",
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decay": decay or self._algorithm.decay,
            "decay_lr": decay_lr,
            "l1": l1,
            "ema_decay": ema_decay,
            "rounding": rounding,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults, max_grad_norm, backend)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        name = type(self).__name__
        check_nonnegative(name, "momentum", group["momentum"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{name}: nesterov must go with a momentum and zero dampening, "
                f"got momentum {group['momentum']}, dampening {group['dampening']}"
            )

    def _exported(self, made: dict[str, Any]) -> dict[Any, dict[str, Any]]:
        """Without a momentum that has not begun, because GradScaler skipped its first step: of
        zeros, which torch's SGD would take for one that has."""
        skipped = {id(momentum) for momentum, c in self._counters.values() if float(c) == 0}
        return {
            key: {k: v for k, v in state.items() if id(v) not in skipped}
            for key, state in made["state"].items()
        }

    def _imported(self, state: dict[str, Any]) -> dict[str, Any]:
        # As they were saved when the steps were counted here.
        return {name: value for name, value in state.items() if name != "step"}

    def __getstate__(self) -> dict[str, Any]:
        made = super().__getstate__()
        return made | {"state": defaultdict(dict, self._exported(made))}


class SGD(SGDW):
    """SGD, a drop-in for `torch.optim.SGD`: `SGDW` with `decay="l2"`.

    Formula, arguments and errors are those of `SGDW`.

    Source: as for `torch.optim.SGD`.
    """

    _algorithm = replace(SGDW._algorithm, decay="l2")
