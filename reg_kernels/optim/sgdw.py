"""SGDW and SGD."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import OPTIONS, FusedOptimizer, check_nonnegative


class SGDW(FusedOptimizer):
    r"""SGD with momentum and decoupled weight decay, the whole step in one kernel.

    .. math::
        g \leftarrow \mathrm{clip}(\pm g / s), \quad
        m \leftarrow \mu m + (1 - \tau) g \quad (m \leftarrow g \text{ at first}), \quad
        d = m \text{ or } g + \mu m \\
        \theta \leftarrow \mathrm{prox}_{\gamma l_1}(\theta - \gamma \lambda \theta - \gamma d)

    Args:
        params: tensors, (name, tensor) pairs or groups of them, as torch has it; float64, float32,
            float16 or bfloat16, on one device or several, mixed at will.
        lr: :math:`\gamma`, at least 0; a float or a tensor of one element. On CUDA a tensor is read
            on the device, so a captured graph follows it.
        momentum: :math:`\mu`, at least 0.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`, at least 0.
        nesterov: look ahead: :math:`d = g + \mu m`; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        foreach, fused: taken for torch's sake; this is always one fused launch.
        differentiable: not supported.
    """

    __doc__ = __doc__.rstrip() + OPTIONS
    _algorithm = "sgd"
    _decay: ClassVar[str] = "decoupled"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 1e-3,
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
            "decay": decay or self._decay,
            "decay_lr": decay_lr,
            "l1": l1,
            "ema_decay": ema_decay,
            "rounding": rounding,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults, max_grad_norm, backend)
        self._export_steps_taken()

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        name = type(self).__name__
        check_nonnegative(name, "momentum", group["momentum"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{name}: nesterov must go with a momentum and zero dampening, "
                f"got momentum {group['momentum']}, dampening {group['dampening']}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._export_steps_taken()

    def _export_steps_taken(self) -> None:
        """A first step that GradScaler skipped leaves zeros, which torch's SGD would take for a
        momentum: such state is left out of a state_dict."""

        def leave_out(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            for key, state in state_dict["state"].items():
                if "step" in state and float(state["step"]) == 0:
                    state_dict["state"][key] = {
                        k: v for k, v in state.items() if k not in ("step", "momentum_buffer")
                    } | {"momentum_buffer": None}

        if not self._optimizer_state_dict_post_hooks:
            self.register_state_dict_post_hook(leave_out, prepend=True)

    @staticmethod
    def _moments(group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    @staticmethod
    def _rates(group: dict[str, Any]) -> tuple[float, float, float]:
        return group["momentum"], group["dampening"], 0.0


class SGD(SGDW):
    """SGD: `SGDW` with decay="l2" and no decay by default, a drop-in for torch.optim.SGD."""

    _decay = "l2"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **options)
