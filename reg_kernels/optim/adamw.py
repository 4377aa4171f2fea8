"""AdamW and Adam."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._algorithm import OWN_STATE, STATE, Algorithm, Group
from ._base import DOCUMENTATION, FusedOptimizer
from ._checks import check_nonnegative


def _moments(group: Group) -> tuple[str, ...]:
    moments = ("exp_avg", "exp_avg_sq")
    return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments


def _rates(group: Group) -> tuple[float, float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2), group["eps"]


class AdamW(FusedOptimizer):
    r"""AdamW with the whole step in one launch: a drop-in for `torch.optim.AdamW`.

    .. math::
        g \leftarrow \mathrm{clip}(\pm g / s), \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta \leftarrow \mathrm{prox}_{\gamma l_1}\left(\theta - \gamma \lambda \theta
        - \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}\right)

    Here s is the scale of a loss that `torch.amp.GradScaler` scaled.

    Args:
        params: tensors, (name, tensor) pairs or groups of them, as in torch; float64, float32,
            float16 or bfloat16, on one device or several, mixed at will.
        lr: :math:`\gamma`, at least 0: a float, or a tensor of one element. On CUDA the tensor is
            read on the device, so a captured graph follows it.
        betas: :math:`\beta_1` and :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.
        amsgrad: True divides by the largest v so far.
        maximize: True ascends instead of descending.
        foreach: accepted as in torch; the step is one launch in any case.
        capturable: accepted as in torch; a CUDA graph can capture the step in any case.
        differentiable: must be False.
        fused: True lets the step itself unscale what `torch.amp.GradScaler` scaled.
    """

    __doc__ = str(__doc__).rstrip() + DOCUMENTATION
    _algorithm = Algorithm(
        kind="adam",
        decay="decoupled",
        counts=True,
        required=("step", "exp_avg", "exp_avg_sq"),
        moments=_moments,
        rates=_rates,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
        decay = decay or self._algorithm.decay
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decay != "l2",
            "decay": decay,
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
        check_nonnegative(name, "eps", group["eps"])
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"{name}: betas must be two numbers, got {betas}")
        decay = self._algorithm.decay_of(group)
        if group["decoupled_weight_decay"] != (decay != "l2"):
            raise ValueError(
                f"{name}: decoupled_weight_decay must go with decay, got "
                f"{group['decoupled_weight_decay']} with {decay!r}: set both"
            )
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: betas[{i}] must be in [0, 1), got {beta}")

    def _exported(self, made: dict[str, Any]) -> dict[Any, dict[str, Any]]:
        """With a start for parameters that were only averaged: torch's take state whole."""
        moments = {k: self._algorithm.moments(g) for g in made["param_groups"] for k in g["params"]}

        def whole(key: Any, state: dict[str, Any]) -> dict[str, Any]:
            if "ema" not in state or state.keys() - set(OWN_STATE):
                return state
            start = {name: torch.zeros_like(state["ema"]) for name in moments[key]}
            return {"step": torch.zeros((), dtype=torch.float32, device="cpu")} | start | state

        return {key: whole(key, state) for key, state in made["state"].items()}

    def _imported(self, state: dict[str, Any]) -> dict[str, Any]:
        """Without such a start, which a frozen parameter need not carry along."""
        if "ema" not in state or float(state.get("step", 1)) != 0:
            return state
        start = [name for name in STATE if name in state and name not in OWN_STATE]
        if any(bool(state[name].any()) for name in start):
            return state
        return {k: v for k, v in state.items() if k not in ("step", *start)}


class Adam(AdamW):
    r"""Adam, a drop-in for `torch.optim.Adam`: `AdamW` with `decay="l2"` and no decay by default.

    Args:
        params: as in `AdamW`.
        lr: as in `AdamW`.
        betas: as in `AdamW`.
        eps: as in `AdamW`.
        weight_decay: :math:`\lambda`, at least 0.
        amsgrad: as in `AdamW`.
        decoupled_weight_decay: True sets `decay="decoupled"`, as in torch.
        options: the other options of `AdamW`, by name.

    Errors are those of `AdamW`.

    Source: D. Kingma, J. Ba, "Adam: a method for stochastic optimization", ICLR 2015; `AdamW` has
    the formula.
    """

    _algorithm = replace(AdamW._algorithm, decay="l2")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        if decoupled_weight_decay and options.setdefault("decay", "decoupled") == "l2":
            raise ValueError("Adam: decoupled_weight_decay must go with another decay than 'l2'")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
