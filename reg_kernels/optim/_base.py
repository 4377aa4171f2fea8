"""What the optimizers share: options, checks, state, state_dict, averaged weights, the step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..ops.optimizer_step import DECAYS, ROUNDINGS
from ._plan import STATE, Plan

OPTIONS = r"""
        decay: "decoupled": :math:`\theta - \gamma \lambda \theta`; "decoupled_lr": :math:`\theta -
            (\gamma / \gamma_0) \lambda \theta`, independent of the learning rate that was chosen
            though not of its schedule; "l2": :math:`\lambda \theta` is added to the gradient.
        decay_lr: :math:`\gamma_0`, by default `lr` as it is when the group is added.
        l1: decoupled L1 penalty, at least 0: after the update a soft threshold of lr l1 (scaled as
            the decay is for "decoupled_lr") moves each weight towards zero and makes those within
            it exactly zero. With a weight_decay as well it is the elastic net.
        ema_decay: in [0, 1): keeps an exponential moving average of the weights, float32 for 16-bit
            parameters, in `state[p]["ema"]`. `ema_weights()` swaps it in. None keeps none.
        rounding: how bfloat16 and float16 parameters are stored: "nearest"; "stochastic", bfloat16
            only, which keeps updates below half an ulp alive on average; "kahan", which keeps what
            rounding took off in `state[p]["compensation"]`.
        state_dtype: of the moments where the parameters' allow it: torch.float32 for 16-bit ones,
            torch.bfloat16 for float32 ones; None: the parameters' own, as torch has it.
        max_grad_norm: clips the gradients by their global norm, as torch.nn.utils.clip_grad_norm_
            would, in one launch more and with no synchronisation; `grad_norm` is the norm found.
            The gradients themselves stay as they are. None does not clip.
        backend: "native", "triton" or "reference"; by default the first that can run.

    Raises:
        ValueError: an option out of its range, a parameter given twice.
        TypeError: something that is no tensor.
        RuntimeError: complex, integer or sparse parameters; in `step`, a sparse gradient, or a
            `backend` that cannot run here (`BackendUnavailable`). Nothing is changed then.

    All parameters of one device, dtype and kind of state take one launch, whatever their number (of
    up to 32 groups); nothing is allocated after the first step. `torch.amp.GradScaler` hands its
    scale and its verdict to the step, which unscales on the fly (`p.grad` stays scaled) and, where
    a gradient is infinite or NaN, changes nothing, the step counter included. `torch.compile` takes
    `step` as an opaque call.
    Results do not depend on threads, nor on how parameters, in one order, are grouped: two runs
    give the same bits.

    Source: I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", ICLR 2019; for l1 N.
    Parikh, S. Boyd, "Proximal algorithms", 2014, section 6.5.2.
    """


def check_nonnegative(name: str, option: str, value: Any) -> None:
    """Raises unless value >= 0; NaN is not."""
    if not value >= 0:
        raise ValueError(f"{name}: {option} must be at least 0, got {value}")


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is one op on lists (ops/optimizer_step.py)."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler: sets grad_scale and found_inf
    _algorithm: ClassVar[str]
    _decay: ClassVar[str]  # by default

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        max_grad_norm: float | None,
        backend: str | None,
    ) -> None:
        if max_grad_norm is not None:
            check_nonnegative(type(self).__name__, "max_grad_norm", max_grad_norm)
        if backend is not None:
            backends.check_name(backend, "backend")
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self._put_aside: list[tuple[Tensor, Tensor]] = []  # while averaged weights are swapped in
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """What is known of parameters and state, and need not be known."""
        self._plan: Plan | None = None
        self._norm: tuple[Tensor, Tensor | None] | None = None
        self._loaded: list[tuple[Tensor, dict[str, Any]]] | None = None

    # What an algorithm tells of itself

    @staticmethod
    def _moments(group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the state that goes into the moments' rows, in their order."""
        raise NotImplementedError

    @staticmethod
    def _rates(group: dict[str, Any]) -> tuple[float, float, float]:
        """beta1, beta2, eps as the kernels take them."""
        raise NotImplementedError

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = dict(param_group) if isinstance(param_group, dict) else {}
        super().add_param_group(param_group)
        if "decoupled_weight_decay" in self.defaults:
            # Torch's word and ours for one thing: what a group was given decides.
            group = self.param_groups[-1]
            if "decay" in given:
                group["decoupled_weight_decay"] = group["decay"] != "l2"
            elif "decoupled_weight_decay" in given:
                group["decay"] = "decoupled" if given["decoupled_weight_decay"] else "l2"
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise
        self._plan = None

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{name}: lr must be a tensor of one element, got {lr.numel()}")
        check_nonnegative(name, "lr", lr)
        self._check_options(group)

    def _check_options(self, group: dict[str, Any]) -> None:
        """All but the learning rate: to look at one on a device would wait for it."""
        name = type(self).__name__
        check_nonnegative(name, "weight_decay", group["weight_decay"])
        check_nonnegative(name, "l1", group["l1"])
        if len(set(map(id, group["params"]))) != len(group["params"]):
            raise ValueError(f"{name}: a parameter must come once in its group, got one twice")
        if group["fused"] and group["foreach"]:
            raise RuntimeError(f"{name}: fused and foreach cannot both be True")
        if group["differentiable"]:
            raise RuntimeError(f"{name}: differentiable must be False: the step is one kernel")
        for option, choices in (("decay", DECAYS), ("rounding", ROUNDINGS)):
            if group[option] not in choices:
                known = ", ".join(choices)
                raise ValueError(f"{name}: {option} must be one of {known}, got {group[option]!r}")
        if group["decay"] == "decoupled_lr":
            if group["decay_lr"] is None:
                group["decay_lr"] = float(group["lr"])
            if not group["decay_lr"] > 0:
                raise ValueError(
                    f"{name}: decay_lr must be above 0 for decay='decoupled_lr', "
                    f"got {group['decay_lr']}: name the lr that weight_decay is meant for"
                )
        ema_decay = group["ema_decay"]
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"{name}: ema_decay must be in [0, 1) or None, got {ema_decay}")
        if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"{name}: state_dtype must be torch.float32, torch.bfloat16 or None, "
                f"got {group['state_dtype']}"
            )
        for i, p in enumerate(group["params"]):
            if is_traceable_wrapper_subclass(p):
                raise RuntimeError(
                    f"{name}: parameters must be plain tensors, got {type(p).__name__} for number "
                    f"{i} of its group"
                )
            if p.dtype not in backends.DTYPES or p.layout != torch.strided:
                what = p.dtype if p.layout == torch.strided else p.layout
                raise RuntimeError(
                    f"{name}: parameters must be dense float64, float32, float16 or bfloat16, "
                    f"got {str(what).removeprefix('torch.')} for number {i} of its group"
                )
            if group["rounding"] == "stochastic" and p.dtype == torch.float16:
                raise RuntimeError(
                    f"{name}: rounding='stochastic' must go with bfloat16 (or wider) parameters, "
                    f"got float16 for number {i} of its group: use rounding='kahan'"
                )

    # The step

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; `closure`, where given, is called first and its loss returned."""
        if self._put_aside:
            raise RuntimeError(
                f"{type(self).__name__}: the averaged weights are swapped in: call swap_out_ema() "
                "before step()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is None or not self._plan.is_current():
            self._plan = None  # a plan that cannot be made leaves none
            self._plan = Plan(self)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        squares = self._plan.run(self.max_grad_norm, self.backend, grad_scale, found_inf)
        self._norm = None if squares is None else (squares, grad_scale)
        return loss

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradients' norm at the last step, unscaled and before clipping, as a tensor; None
        where `max_grad_norm` was not set."""
        if self._norm is None:
            return None
        squares, grad_scale = self._norm
        norm = squares.sum().sqrt()
        return norm if grad_scale is None else norm / grad_scale.to(norm.device)

    # Averaged weights

    @torch.no_grad()
    def swap_in_ema(self) -> None:
        """Puts the averaged weights in the place of the parameters, for evaluation.

        The parameters are kept aside, and `swap_out_ema` puts them back. Raises RuntimeError where
        no average is kept yet, or where it is swapped in already.
        """
        name = type(self).__name__
        if self._put_aside:
            raise RuntimeError(f"{name}: the averaged weights are swapped in already")
        found = [
            (p, self.state[p]["ema"])
            for group in self.param_groups
            if group["ema_decay"] is not None
            for p in group["params"]
            if p in self.state and "ema" in self.state[p]
        ]
        if not found:
            reason = "set ema_decay, and take a step, before averaged weights are asked for"
            raise RuntimeError(f"{name}: no average of the weights is kept: {reason}")
        self._put_aside = [(p, p.detach().clone()) for p, _ in found]
        for p, ema in found:
            p.copy_(ema)

    @torch.no_grad()
    def swap_out_ema(self) -> None:
        """Puts the parameters back. Raises RuntimeError where no averages are swapped in."""
        if not self._put_aside:
            raise RuntimeError(f"{type(self).__name__}: no averaged weights are swapped in")
        for p, own in self._put_aside:
            p.copy_(own)
        self._put_aside = []

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The averaged weights in a block: `with optimizer.ema_weights(): evaluate(model)`."""
        self.swap_in_ema()
        try:
            yield
        finally:
            if self._put_aside:
                self.swap_out_ema()

    # Saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave: this optimizer's, or torch's of the same algorithm.

        Options that torch's does not have stay as they are. Raises ValueError where groups or
        shapes do not match, and changes nothing then.
        """
        # Last of all such hooks, so that it sees what is going to be loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: self._completed(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loaded = None

    def _completed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict`, its shapes checked, with the options that its groups lack."""
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return state_dict  # torch says what is wrong
        completed, loaded = [], []
        for group, own in zip(groups, self.param_groups, strict=True):
            for key, p in zip(group["params"], own["params"], strict=True):
                state = state_dict["state"].get(key, {})
                self._check_state(key, p, state)
                loaded.append((p, state))
            merged = {k: own[k] for k in self.defaults if k in own} | group
            if "decoupled_weight_decay" in own:
                if "decay" not in group and self._decay == "l2":  # torch's Adam, which may be AdamW
                    merged["decay"] = "decoupled" if group["decoupled_weight_decay"] else "l2"
                merged["decoupled_weight_decay"] = merged["decay"] != "l2"
            self._check_group(merged | {"params": own["params"]})
            completed.append(merged)
        self._loaded = loaded
        return state_dict | {"param_groups": completed}

    def _check_state(self, key: Any, p: Tensor, state: dict[str, Any]) -> None:
        step = state.get("step", 0.0)
        if not (step.numel() == 1 if isinstance(step, Tensor) else isinstance(step, int | float)):
            raise ValueError(
                f"{type(self).__name__}: step of parameter {key} in the state_dict must be one "
                f"number, got {step!r}"
            )
        for name in STATE:
            value = state.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{type(self).__name__}: {name} of parameter {key} in the state_dict must be a "
                    f"floating-point tensor, got {str(kind).removeprefix('torch.')}"
                )
            if value.shape != p.shape:
                raise ValueError(
                    f"{type(self).__name__}: {name} of parameter {key} in the state_dict must have "
                    f"shape {tuple(p.shape)}, got {tuple(value.shape)}"
                )

    def __getstate__(self) -> dict[str, Any]:
        options = {"max_grad_norm": self.max_grad_norm, "backend": self.backend}
        return super().__getstate__() | options

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        loaded = getattr(self, "_loaded", None) or ()
        self._put_aside = getattr(self, "_put_aside", [])
        self._forget()
        # torch casts all state to the parameter's dtype, shares what needs no cast with where it
        # came from, and takes a string to pieces; here state stays as it was, a copy of its own.
        for p, saved in loaded:
            for name, value in saved.items():
                own = value.to(p.device, copy=True) if isinstance(value, Tensor) else None
                self.state[p][name] = copy.deepcopy(value) if own is None else own
