"""What the optimizers share: options, checks, state, state_dict, averaged weights, the step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from .._compiler import not_compiled
from .._dtensor import check_sharded, is_dtensor, placed_like
from .._dtypes import DTYPES
from ..ops.optimizer_step import DECAYS, ROUNDINGS
from ._algorithm import OPTIONS, STATE, Algorithm, option
from ._checks import check_nonnegative, check_size
from ._member import Counters
from ._plan import StepPlan

# What follows the arguments that an optimizer has of its own, in its docstring.
DOCUMENTATION = r"""
        decay: how weights decay. "decoupled": :math:`\theta - \gamma \lambda \theta`.
            "decoupled_lr": :math:`\theta - (\gamma / \gamma_0) \lambda \theta`, which depends on
            the schedule of the learning rate but not on the learning rate that was chosen. "l2":
            :math:`\lambda \theta` is added to the gradient.
        decay_lr: :math:`\gamma_0`; None takes `lr` as it is when the group is added.
        l1: the decoupled L1 penalty :math:`l_1`, at least 0. After the update a soft threshold of
            lr l1 (scaled as the decay is for "decoupled_lr") moves each weight towards zero, and
            makes a weight within the threshold exactly zero. With a `weight_decay` as well it is
            the elastic net.
        ema_decay: in [0, 1), keeps an exponential moving average of the weights in
            `state[p]["ema"]`, in float32 for 16-bit parameters. It starts from the weights before
            the first step. Each step updates the average of every parameter, also of one that has
            no gradient or requires none. `ema_weights()` swaps it in. None keeps no average.
        rounding: how bfloat16 and float16 parameters are stored. "nearest". "stochastic", for
            bfloat16 only: updates below half an ulp survive on average. "kahan": what rounding took
            off is kept in `state[p]["compensation"]`.
        state_dtype: the dtype of the moments, where the parameters' dtype allows it: torch.float32
            for 16-bit ones, torch.bfloat16 for float32 ones. None takes the parameters' own, as
            torch does.
        max_grad_norm: clips the gradients by their global norm, as
            `torch.nn.utils.clip_grad_norm_` does, in one launch more and with no synchronisation.
            `grad_norm` is the norm that was found. The gradients themselves stay as they are. None
            does not clip.
        backend: "native", "triton" or "reference"; None takes the first that can run.

    Raises:
        ValueError: an option is out of its range, or a parameter is given twice.
        TypeError: a parameter is no tensor.
        RuntimeError: parameters are complex, integer or sparse, or DTensors placed as `Partial` or
            on other ranks. In `step`: a gradient is sparse or placed otherwise than its parameter,
            or `backend` cannot run here (`BackendUnavailable`); nothing is changed then.

    All parameters of one device, dtype and kind of state take one launch, whatever their number (of
    up to 32 groups); those that are only averaged take another one. Nothing is allocated after the
    first step. Results do not depend on threads, nor on how parameters, in one order, are grouped:
    two runs give the same bits.

    `torch.amp.GradScaler` treats the optimizer as it treats torch's. By default it unscales the
    gradients itself, waits for its verdict, and leaves the step out where a gradient is infinite or
    NaN. With `fused=True` it hands scale and verdict to the step, with no synchronisation. The step
    then unscales on the fly (`p.grad` stays scaled), and where the verdict is bad it changes
    nothing, the step counter included. `torch.compile` takes `step` as an opaque call.

    Parameters may be DTensors, as `fully_shard` and `distribute_tensor` make them: in shards, even
    or not, or in replicas, on several meshes, beside plain tensors. Each rank steps its own shards,
    and the state is of DTensors as well. Elements get the same bits however they are sharded. A
    `max_grad_norm` takes one all_reduce, which counts each replica once; the norm is the same on
    every rank, and another number of ranks may change the last two bits of its float64. For
    stochastic rounding the first rank sends 16 bytes, which all then draw by. Nothing else is sent.
    Plain parameters, as under DistributedDataParallel, are rounded by each rank's own generator:
    seed all ranks alike, or the replicas part.
    Every rank has to call `step`, and a gradient has to be placed as its parameter is. Under
    ZeroRedundancyOptimizer `max_grad_norm` sees one rank's gradients alone: clip before the step.

    A group, a state and a `state_dict()` hold what torch's of the same name hold. Options and state
    of ours are there only where they are in use, so read them as `group.get("l1", 0.0)`. What
    torch's optimizer has saved is enough to load, also for torch.distributed.checkpoint. Options
    that are not in what is loaded stay as they are.

    Source: I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", ICLR 2019; for l1 N.
    Parikh, S. Boyd, "Proximal algorithms", 2014, section 6.5.2.
    """


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is one op on lists (ops/optimizer_step.py)."""

    _algorithm: ClassVar[Algorithm]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._algorithm = replace(cls._algorithm, optimizer=cls.__name__)

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
        self._forget()
        super().__init__(params, defaults)
        self._offer_amp_scaling()

    def _offer_amp_scaling(self) -> None:
        # Where it is set torch.amp.GradScaler hands over grad_scale and found_inf. Trainers take it
        # for a sign that gradients are not to be touched, and that a step is never left out.
        self._step_supports_amp_scaling = bool(self.defaults["fused"])

    def _forget(self) -> None:
        """Forgets what was found out about parameters and state: the next step looks again."""
        self._counters: Counters = {}
        # The parameters that averages were swapped in for, and their versions then, where known.
        # Changed in place: a wrapper that takes its attributes from here shares the list.
        self._swapped: list[tuple[Tensor, int | None]] = []
        self._plan: StepPlan | None = None
        self._norm: tuple[Tensor, Tensor | None] | None = None
        self._loaded: list[tuple[Tensor, dict[str, Any]]] | None = None

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = dict(param_group) if isinstance(param_group, dict) else {}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "decoupled_weight_decay" in self.defaults:
            # Torch's word and ours for one thing: what a group was given decides.
            if "decay" in given:
                group["decoupled_weight_decay"] = group["decay"] != "l2"
            elif "decoupled_weight_decay" in given:
                group["decay"] = "decoupled" if given["decoupled_weight_decay"] else "l2"
        try:
            self._check_group(group)
        except BaseException:
            self.param_groups.pop()
            raise
        self._leave_out_defaults(group)
        self._plan = None

    def _leave_out_defaults(self, group: dict[str, Any]) -> None:
        """Takes out of a group what only says that an option of ours is not in use."""
        for name, default in OPTIONS.items():
            if name == "decay":
                default = self._algorithm.decay_of({k: v for k, v in group.items() if k != "decay"})
            if name in group and group[name] == default:
                del group[name]

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
        check_nonnegative(name, "l1", option(group, "l1"))
        if len(set(map(id, group["params"]))) != len(group["params"]):
            raise ValueError(f"{name}: a parameter must come once in its group, got one twice")
        if group["fused"] and group["foreach"]:
            raise RuntimeError(f"{name}: fused and foreach cannot both be True: leave one out")
        if group["differentiable"]:
            raise RuntimeError(f"{name}: differentiable must be False: the step is one kernel")
        decay, rounding = self._algorithm.decay_of(group), option(group, "rounding")
        for word, value, choices in (("decay", decay, DECAYS), ("rounding", rounding, ROUNDINGS)):
            if value not in choices:
                known = ", ".join(choices)
                raise ValueError(f"{name}: {word} must be one of {known}, got {value!r}")
        if decay == "decoupled_lr":
            if option(group, "decay_lr") is None:
                group["decay_lr"] = float(group["lr"])
            if not group["decay_lr"] > 0:
                raise ValueError(
                    f"{name}: decay_lr must be above 0 for decay='decoupled_lr', "
                    f"got {group['decay_lr']}: name the lr that weight_decay is meant for"
                )
        ema_decay, state_dtype = option(group, "ema_decay"), option(group, "state_dtype")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"{name}: ema_decay must be in [0, 1) or None, got {ema_decay}")
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"{name}: state_dtype must be torch.float32, torch.bfloat16 or None, "
                f"got {state_dtype}"
            )
        for i, p in enumerate(group["params"]):
            if is_dtensor(p):
                check_sharded(name, f"number {i} of its group", p)
            elif is_traceable_wrapper_subclass(p):
                raise RuntimeError(
                    f"{name}: parameters must be plain tensors or DTensors, got "
                    f"{type(p).__name__} for number {i} of its group"
                )
            if p.dtype not in DTYPES or p.layout != torch.strided:
                what = p.dtype if p.layout == torch.strided else p.layout
                raise RuntimeError(
                    f"{name}: parameters must be dense float64, float32, float16 or bfloat16, "
                    f"got {str(what).removeprefix('torch.')} for number {i} of its group"
                )
            if rounding == "stochastic" and p.dtype == torch.float16:
                raise RuntimeError(
                    f"{name}: rounding='stochastic' must go with bfloat16 (or wider) parameters, "
                    f"got float16 for number {i} of its group: use rounding='kahan'"
                )

    # The step

    @not_compiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: a function that computes the loss and its gradients. It is called first, where
                given.

        Returns:
            What `closure` returned, or None.
        """
        self._check_swapped_out("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is None or not self._plan.is_current(self.param_groups, self.state):
            self._plan = None  # a plan that cannot be made leaves none
            self._plan = self._planned()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        launches = self._plan.launches
        try:
            squares = launches.run(self.max_grad_norm, self.backend, grad_scale, found_inf)
        finally:
            launches.let_go()
        self._norm = None if squares is None else (squares, grad_scale)
        return loss

    def _planned(self) -> StepPlan:
        name = type(self).__name__
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name}: a step must be taken before one is captured in a CUDA graph, and again "
                "when parameters, options or state have changed: state is made then"
            )
        for group in self.param_groups:
            self._check_options(group)  # again: somebody may have changed it
        return StepPlan(
            self._algorithm, self.param_groups, self.state, self._counters, self.backend
        )

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the gradients at the last step, unscaled and before clipping, as a tensor.
        It is None where `max_grad_norm` was not set.
        """
        if self._norm is None:
            return None
        squares, grad_scale = self._norm
        norm = squares.sum().sqrt()
        return norm if grad_scale is None else norm / grad_scale.to(norm.device)

    # Averaged weights

    @torch.no_grad()
    def swap_in_ema(self) -> None:
        """Puts the averaged weights in the place of the parameters, for evaluation.

        The parameters are kept in `state[p]["swapped_out"]`, and `swap_out_ema` puts them back.
        Until then a `state_dict()`, a copy and a pickle of the optimizer hold them too. An
        optimizer that loads such a `state_dict()` has averages swapped in as well: after loading,
        call `swap_out_ema()` before training goes on.

        Raises:
            RuntimeError: no average is kept yet, or it is swapped in already.
        """
        self._check_swapped_out("swap_in_ema")
        found = [
            (p, self.state[p])
            for group in self.param_groups
            if option(group, "ema_decay") is not None
            for p in group["params"]
            if p in self.state and "ema" in self.state[p]
        ]
        if not found:
            raise RuntimeError(
                f"{type(self).__name__}: no average of the weights is kept: set ema_decay, and "
                "take a step, before averaged weights are asked for"
            )
        kept = [p.detach().clone() for p, _ in found]
        self._swapped[:] = [(p, None) for p, _ in found]
        for (p, state), own in zip(found, kept, strict=True):
            state["swapped_out"] = own
            p.copy_(state["ema"])
        self._swapped[:] = [(p, p._version) for p, _ in found]

    @torch.no_grad()
    def swap_out_ema(self, *, changed: str | None = None) -> None:
        """Puts the parameters back.

        Args:
            changed: what becomes of parameters that were changed in place while averages were
                swapped in, as loading a model does. (A write through `p.data` leaves no trace and
                is not noticed.) "keep" leaves the changed ones as they are now; "restore" puts them
                back as well; None raises where there are any, and puts nothing back.

        Raises:
            RuntimeError: no averages are swapped in, or a parameter was changed and `changed` is
                None.
            ValueError: `changed` is something else.
        """
        name = type(self).__name__
        if changed not in (None, "keep", "restore"):
            raise ValueError(f"{name}: changed must be keep, restore or None, got {changed!r}")
        if not self._swapped:
            raise RuntimeError(
                f"{name}: no averaged weights are swapped in: call swap_in_ema() before"
            )
        others = [p for p, version in self._swapped if version not in (None, p._version)]
        if others and changed is None:
            raise RuntimeError(
                f"{name}: {len(others)} of {len(self._swapped)} parameters were changed while "
                "averaged weights were swapped in, so nothing was put back: call "
                "swap_out_ema(changed='keep') if they are to stay as they are now, as after "
                "loading a model, or swap_out_ema(changed='restore')"
            )
        keep = set(map(id, others)) if changed == "keep" else set()
        for p, _ in self._swapped:
            own = self.state[p].pop("swapped_out", None)
            if own is not None and id(p) not in keep:
                p.copy_(own)
        self._swapped.clear()

    @contextlib.contextmanager
    def ema_weights(self, *, changed: str | None = None) -> Iterator[None]:
        """Swaps the averaged weights in for a block: `with optimizer.ema_weights():
        evaluate(model)`.

        A model's `state_dict` that is made inside is that of the averaged model. The optimizer's
        holds the weights that training goes on from.

        BatchNorm's running statistics are those of the trained weights, not of the averages.
        `torch.optim.swa_utils.update_bn(loader, model)` inside the block makes statistics of the
        averages and leaves them in the model: keep a copy of the buffers if training is to go on
        with its own.

        Args:
            changed: what becomes of parameters that were changed inside, as in `swap_out_ema`.

        Raises:
            RuntimeError: as in `swap_in_ema` and `swap_out_ema`; inside, loading the optimizer's
                `state_dict` raises it.
        """
        self.swap_in_ema()
        try:
            yield
        finally:
            if self._swapped:
                self.swap_out_ema(changed=changed)

    def _check_swapped_out(self, method: str) -> None:
        if self._swapped:
            already = " already" if method == "swap_in_ema" else ""
            raise RuntimeError(
                f"{type(self).__name__}: the averaged weights are swapped in{already}: call "
                f"swap_out_ema() before {method}()"
            )

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Returns what torch's `state_dict()` holds, and those options and state of ours that are
        in use.
        """
        # First of all such hooks: the others may wrap the result in something else.
        handle = self.register_state_dict_post_hook(
            lambda _, made: made.update(state=self._exported(made)), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _exported(self, made: dict[str, Any]) -> dict[Any, dict[str, Any]]:
        """The state in what torch made, as torch's optimizers take it."""
        return made["state"]

    def _imported(self, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state that is loaded, as it is kept here."""
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` returned: this optimizer's, or torch's of the same algorithm.

        Options that are not in it stay as they are. Nothing is changed where it raises.

        Args:
            state_dict: what is loaded.

        Raises:
            ValueError: groups, shapes or values do not match.
            KeyError: a parameter's state lacks what the algorithm needs.
            RuntimeError: averaged weights are swapped in.
        """
        self._check_swapped_out("load_state_dict")
        # Last of all such hooks, so that it sees what is going to be loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: self._completed(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loaded = None

    def _completed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict`, its state checked, with the options that its groups lack."""
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return state_dict  # torch says what is wrong
        completed, loaded = [], []
        for group, own in zip(groups, self.param_groups, strict=True):
            merged = {k: own[k] for k in self.defaults if k in own} | group
            if "decoupled_weight_decay" in own:
                if "decay" not in group and self._algorithm.decay == "l2":
                    # Torch's Adam, which may be AdamW.
                    decoupled = merged["decoupled_weight_decay"]
                    if (option(merged, "decay") == "l2") == decoupled:
                        merged.pop("decay", None)
                merged["decoupled_weight_decay"] = self._algorithm.decay_of(merged) != "l2"
            self._check_group(merged | {"params": own["params"]})
            for key, p in zip(group["params"], own["params"], strict=True):
                state = state_dict["state"].get(key, {})
                self._check_state(key, p, state, merged)
                loaded.append((p, self._imported(state)))
            completed.append(merged)
        self._loaded = loaded
        return state_dict | {"param_groups": completed}

    def _check_state(
        self, key: Any, p: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        name, where = type(self).__name__, f"parameter {key} in the state_dict"
        step = state.get("step")
        number = step.numel() == 1 if isinstance(step, Tensor) else hasattr(step, "__float__")
        if step is not None and not number:
            raise ValueError(f"{name}: step of {where} must be one number, got {step!r}")
        for moment in STATE:
            value = state.get(moment)
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{name}: {moment} of {where} must be a floating-point tensor, "
                    f"got {str(kind).removeprefix('torch.')}"
                )
            check_size(name, f"{moment} of {where}", p, value)
        # amsgrad can be turned on between steps, and begins then; what is saved with it has it.
        self._algorithm.check_complete(
            where, state, *(set(self._algorithm.moments(group)) & {"max_exp_avg_sq"})
        )

    def __getstate__(self) -> dict[str, Any]:
        options = {"max_grad_norm": self.max_grad_norm, "backend": self.backend}
        return super().__getstate__() | options

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        loaded = getattr(self, "_loaded", None) or ()
        self._forget()
        self._offer_amp_scaling()
        # torch casts all state to the parameter's dtype, shares what needs no cast with where it
        # came from, and takes a string to pieces; here state stays as it was, a copy of its own.
        for p, saved in loaded:
            if saved:
                self.state[p] = {
                    key: _copied(f"{type(self).__name__}: {key}", p, key, value)
                    for key, value in saved.items()
                }
        for group in self.param_groups:
            self._leave_out_defaults(group)
            for p in group["params"]:
                if p in self.state and "swapped_out" in self.state[p]:
                    self._swapped.append((p, None))


def _copied(what: str, param: Tensor, name: str, value: Any) -> Any:
    """A copy of a parameter's state, where the parameter is and in the same shards."""
    if isinstance(value, Tensor):
        if name != "step":
            value = placed_like(value, param, what)
        return value.to(param.device, copy=True)
    if name == "step":
        return torch.tensor(float(value), dtype=torch.float32, device=param.device)
    return copy.deepcopy(value)
