"""Benchmarks of the optimizers' step, beside those of torch.optim and of torch-optimi.

Transfers an element: AdamW and Adam read the parameter, the gradient and two moments, and write all
but the gradient: 7. SGDW and SGD with a momentum have one moment less: 5. Clipping reads the
gradient once more: 1. An average of the weights is read and written, in float32 for 16-bit
parameters: 2. The l1 penalty moves nothing.

Between two steps of a training lie a forward and a backward, which leave nothing of many small
tensors in the caches: on the CPU these are measured with cold ones.

On the CPU a step in place has its lines in the cache when it writes them, while `Tensor.copy_`
reads what it overwrites: three transfers for two that are counted. The floor is then 2/3 of its
time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import optim
from ._measure import COMPILE, EAGER, STEP, Benchmark, Contender, Goal, Scope, Skipped, WrongValues
from ._peers import OPTIMI, peer
from ._values import compare, parts
from ._ways import our_ways

FUSED, FOREACH = "fused", "foreach"
PEERS = (FUSED, FOREACH, OPTIMI)

BETAS, EPS, MOMENTUM, DECAY = (0.9, 0.999), 1e-8, 0.9, 1e-2
L1, EMA_DECAY = 1e-3, 0.999
CLIP = 0.75  # of the gradient's norm

# The check compares values after three steps, so that moments and bias corrections matter. The
# timed steps after them are so small that a hundred thousand of them change little.
FACTORS = (1.0, -2.0, 0.5)  # of the gradient
LR_CHECKED, LR_TIMED = 0.25, 1e-6

_COMPILED_UP_TO = 16  # tensors: compiling a step takes up to a second for each


class Kind(NamedTuple):
    """An algorithm, named by its class in reg_kernels.optim, and the option that is on."""

    algorithm: str
    option: str = ""

    @property
    def name(self) -> str:
        return f"{self.algorithm}+{self.option}" if self.option else self.algorithm

    @property
    def adam(self) -> bool:
        return self.algorithm in ("AdamW", "Adam")

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes an element that have to move."""
        transfers = (7 if self.adam else 5) + (self.option == "clip")
        return transfers * dtype.itemsize + 2 * max(4, dtype.itemsize) * (self.option == "ema")


OPTIONS = ("l1", "clip", "ema")
_KINDS = (Kind("AdamW"), Kind("SGDW"))
_COUPLED = (Kind("Adam"), Kind("SGD"))  # their decay is a part of the gradient

Shapes = tuple[tuple[int, ...], ...]


def resnet50() -> Shapes:
    """The shapes of a ResNet-50's 161 parameters, in their order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            if block == 0:
                convolutions.append((out, channels, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            channels = out
    return (*shapes, (1000, channels), (1000,))


_LARGE = ((2**20,),) * 16
_LARGE_GPU = ((6_250_000,),) * 16
_TYPICAL = ((2**16,),) * 16  # a CPU's caches hold them with their gradients and states
_FEW = ((64,),) * 400
_MANY = ((64,),) * 10_000


def cases(scope: Scope) -> list[Benchmark]:
    """Large parameters, with and without options, then many small ones, then a typical list."""
    result = []
    for dtype in scope.brief:
        case = functools.partial(_case, scope.device, dtype, scope=scope)
        if scope.device.type == "cuda":
            memory = torch.cuda.get_device_properties(scope.device).total_memory
            # Every contender's parameters and states are there at the same time.
            if 48 * _numel(_LARGE_GPU) * dtype.itemsize <= memory:
                result += [case(kind, _LARGE_GPU) for kind in (*_KINDS, *_COUPLED)]
                result += [case(Kind("AdamW", option), _LARGE_GPU) for option in OPTIONS]
            result += [case(kind, resnet50()) for kind in _KINDS]
        else:
            result += [case(kind, _LARGE) for kind in (*_KINDS, *_COUPLED)]
            result += [
                case(Kind(k.algorithm, option), _LARGE) for k in _KINDS for option in OPTIONS
            ]
        result += [case(kind, _FEW) for kind in (*_KINDS, *_COUPLED)]
        result += [case(kind, _MANY) for kind in _KINDS]
    for dtype in scope.dtypes:
        case = functools.partial(_case, scope.device, dtype, scope=scope)
        result += [case(kind, _TYPICAL) for kind in (*_KINDS, *_COUPLED)]
    return result


def sized(scope: Scope, elements: int) -> list[Benchmark]:
    """Points of growth curves: AdamW of one tensor, which does not count as a list of tensors."""
    case = _case(scope.device, torch.float32, Kind("AdamW"), ((elements,),))
    return [dataclasses.replace(case, tensors=0)]


def numbered(scope: Scope, tensors: int) -> list[Benchmark]:
    """Points of growth curves: either algorithm, tensors of 64 elements."""
    return [_case(scope.device, torch.float32, kind, ((64,),) * tensors) for kind in _KINDS]


def _numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _faster(limit: float, than: str) -> Goal:
    text = f"at least {limit:g} times the speed of {than}=True"
    return Goal("native", text, f"speedup_over_{than}", limit, True)


_LEVEL = Goal("native", "at least level with fused=True", "speedup_over_fused", 1, True)
_FLOOR_CPU = Goal("native", "within 1.2 of the floor, 0.8 of copy_'s time", "time_over_copy", 0.8)
_FLOOR_GPU = Goal("native", "within 1.2 of the floor", "time_over_copy", 1.2)
_COPY = Goal("native", "at least 0.9 of copy bandwidth", "share_of_copy", 0.9, True)
_PEAK = Goal("native", "peak no higher than that of fused=True", "peak_above_fused_bytes", 0)


def _goals(device: torch.device, kind: Kind, shapes: Shapes) -> tuple[Goal, ...]:
    if kind.algorithm not in ("AdamW", "SGDW") or shapes is _TYPICAL:
        return ()
    if device.type == "cuda":
        if shapes is _FEW:
            return ()
        if shapes is not _LARGE_GPU:
            return (_faster(2, FUSED), _faster(3, FOREACH), _PEAK)
        return (_FLOOR_GPU,) if kind.option else (_COPY, _LEVEL, _PEAK)
    if shapes is _LARGE:
        return (_FLOOR_CPU,) if kind.option else (_FLOOR_CPU, _LEVEL)
    if shapes is _FEW:
        return (_faster(5, FUSED), _faster(10, FOREACH))
    return (_faster(5, FUSED),) if shapes is _MANY else ()


def _case(
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind,
    shapes: Shapes,
    *,
    scope: Scope | None = None,
) -> Benchmark:
    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        truth = Truth(kind, shapes, dtype, device)
        size = _numel(shapes) * dtype.itemsize
        make = functools.partial(_ours, truth)
        entries: list[Contender | Skipped] = []
        for ours in our_ways("optimizer_step", make, device, dtype, size):
            if isinstance(ours, Skipped):
                entries.append(ours)
            else:
                entries.append(_contender(ours.name, ours.function, within=ours.within))
        entries.append(_contender(EAGER, _torch(truth)))
        entries.append(_compiled(truth, shapes, scope))
        for way in (FUSED, FOREACH):
            broken = way == FUSED and not kind.adam and dtype.itemsize == 2
            if broken and device.type == "cpu":
                # torch 2.13: momentum_buffer is empty_like, and the loop for 16 bits (of whole
                # vectors) does not know a first step.
                entries.append(Skipped(FUSED, "torch's first step reads what nobody wrote"))
            else:
                entries.append(_contender(way, _torch(truth, **{way: True})))
        if not kind.option:
            entries.append(_optimi(truth))
        return entries

    return Benchmark(
        op="optimizer_step",
        variant=kind.name,
        direction=STEP,
        dtype=dtype,
        shape=(_numel(shapes),),
        tensors=len(shapes),
        bytes=kind.bytes(dtype) * _numel(shapes),
        prepare=prepare,
        # What launches many small kernels is bound by the host, and a training step waits for it.
        wall=shapes not in (_LARGE, _LARGE_GPU, _TYPICAL),
        cold=device.type == "cpu" and (shapes is _FEW or shapes is _MANY),
        peers=PEERS[:2] if kind.option else PEERS,
        goals=_goals(device, kind, shapes),
    )


def _contender(name: str, stepper: Stepper, **options: Any) -> Contender:
    return Contender(
        name, lambda i: stepper.step(), functools.partial(stepper.check, name), **options
    )


def _ours(truth: Truth, backend: str | None) -> Stepper:
    kind = truth.kind
    options: dict[str, Any] = {"lr": LR_CHECKED, "weight_decay": DECAY, "backend": backend}
    options |= {
        "": {},
        "l1": {"l1": L1},
        "clip": {"max_grad_norm": truth.max_norm},
        "ema": {"ema_decay": EMA_DECAY},
    }[kind.option]
    options |= {"betas": BETAS, "eps": EPS} if kind.adam else {"momentum": MOMENTUM}
    return Stepper(truth, lambda p: getattr(optim, kind.algorithm)(p, **options))


def _torch(truth: Truth, *, compiled: bool = False, **way: bool) -> Stepper:
    """torch.optim's, followed by what one writes for the options that it does not have. Its SGD
    decays by the gradient."""
    kind = truth.kind
    options: dict[str, Any] = {"lr": LR_CHECKED, "weight_decay": DECAY, **way}
    options |= {"betas": BETAS, "eps": EPS} if kind.adam else {"momentum": MOMENTUM}
    name = kind.algorithm if kind.adam else "SGD"
    return Stepper(
        truth,
        lambda p: getattr(torch.optim, name)(p, **options),
        by_hand=True,
        coupled=name != "AdamW",
        compiled=compiled,
    )


def _compiled(truth: Truth, shapes: Shapes, scope: Scope | None) -> Contender | Skipped:
    """torch.optim's step compiled, by way of foreach, which compiles the fastest."""
    if scope is None or not scope.compiled:
        return Skipped(COMPILE, "left out: compiling takes seconds a benchmark")
    if len(shapes) > _COMPILED_UP_TO:
        reason = f"left out: compiling a step of {len(shapes)} tensors takes minutes"
        return Skipped(COMPILE, reason)
    # What is compiled for the CPU computes Adam's powers of beta anew for each vector of elements.
    brief = truth.kind.option == "" and shapes is _TYPICAL and truth.start.dtype == scope.dtypes[0]
    if not scope.everything and not brief:
        return Skipped(COMPILE, "left out: it takes half a minute; --all has it")
    if truth.kind.adam and truth.start.dtype == torch.float64:
        return Skipped(COMPILE, "torch 2.13 compiles Adam's bias corrections in float32")
    torch.compiler.reset()
    stepper = _torch(truth, compiled=True, foreach=True)
    return _contender(COMPILE, stepper, may_fail=True)


def _optimi(truth: Truth) -> Contender | Skipped:
    """torch-optimi's, by its default: Triton kernels on a GPU, torch's functions elsewhere."""
    optimi = peer(OPTIMI, "optimi")
    if isinstance(optimi, Skipped):
        return optimi
    kind = truth.kind
    options: dict[str, Any] = {"lr": LR_CHECKED, "weight_decay": DECAY, "kahan_sum": False}
    if kind.adam:
        options |= {"betas": BETAS, "eps": EPS}
    else:
        options |= {"momentum": MOMENTUM, "decouple_wd": kind.algorithm == "SGDW"}
    stepper = Stepper(
        truth,
        lambda p: getattr(optimi, kind.algorithm.replace("SGDW", "SGD"))(p, **options),
        moments=False,  # Adam's it keeps with the bias taken off, and names SGD's otherwise
    )
    return _contender(OPTIMI, stepper, may_fail=True)


class Stepper:
    """An optimizer over parameters and gradients of its own.

    `by_hand`: the kind's option takes separate calls; `coupled`: its decay goes by the gradient
    (None: as the algorithm's name says); `moments`: it keeps them as torch does; `compiled`: the
    step is, by torch.compile.
    """

    def __init__(
        self,
        truth: Truth,
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        *,
        by_hand: bool = False,
        coupled: bool | None = None,
        moments: bool = True,
        compiled: bool = False,
    ) -> None:
        self._truth, self._make = truth, make
        self._by_hand, self._moments, self._compiled = by_hand, moments, compiled
        self._coupled = truth.kind in _COUPLED if coupled is None else coupled
        self.step: Callable[[], object] = self._reset

    def _reset(self) -> None:
        """From the start, with a new optimizer."""
        self._params = [p.clone().requires_grad_() for p in self._truth.split(self._truth.start)]
        self._optimizer = self._make(self._params)
        self._averages: list[Tensor] = []
        self._load(1.0)
        step = self._stepped_by_hand() if self._by_hand else self._optimizer.step
        self.step = torch.compile(step) if self._compiled else step

    def _load(self, factor: float) -> None:
        """Gives every parameter its gradient, times a power of two."""
        grads = self._truth.split(self._truth.gradient * factor)
        for p, grad in zip(self._params, grads, strict=True):
            p.grad = grad.clone() if p.grad is None else p.grad.copy_(grad)

    def _stepped_by_hand(self) -> Callable[[], object]:
        step, params, option = self._optimizer.step, self._params, self._truth.kind.option
        (group,) = self._optimizer.param_groups

        def clipped() -> None:
            clip_grad_norm_(params, self._truth.max_norm)
            step()

        @torch.no_grad()
        def shrunk() -> None:
            step()
            for p in params:
                p.copy_(F.softshrink(p, group["lr"] * L1))

        update = get_ema_multi_avg_fn(EMA_DECAY)
        compute = torch.promote_types(params[0].dtype, torch.float32)
        if option == "ema":
            self._averages = [p.detach().to(compute, copy=True) for p in params]

        def averaged() -> None:
            step()
            update(self._averages, [p.detach().to(compute) for p in params], None)

        return {"": step, "clip": clipped, "l1": shrunk, "ema": averaged}[option]

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Raises WrongValues unless FACTORS' steps from the start lead where they should; leaves an
        optimizer that takes small steps."""
        self._reset()
        for factor in FACTORS:
            self._load(factor)
            self.step()
        self._load(1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = LR_TIMED
        expected = self._truth.expected(self._coupled)
        for what, value in expected.items():
            if (found := self._found(what)) is not None:
                self._truth.compare(f"optimizer_step, {name}: {what}", what, found, value)

    def _found(self, what: str) -> Tensor | None:
        """All that the optimizer has of one kind, in one tensor."""
        if what == "parameters":
            tensors = self._params
        elif what == "ema" and self._by_hand:
            tensors = self._averages
        elif self._moments or what == "ema":
            states = [self._optimizer.state[p] for p in self._params]
            if any(what not in state for state in states):
                raise WrongValues(f"optimizer_step: there is no {what}")
            tensors = [state[what] for state in states]
        else:
            return None
        return torch.cat([t.flatten() for t in tensors])


class Truth:
    """Where steps have to lead, in float64: all tensors of a kind in one, of no dimensions but one.

    Gradients are around 1 and never near 0, where the direction of AdamW would be one of roundings.
    """

    def __init__(
        self, kind: Kind, shapes: Shapes, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kind = kind
        self._shapes = [torch.Size(shape) for shape in shapes]
        count = _numel(shapes)
        self.start = torch.randn(count, dtype=dtype, device=device)
        sizes = torch.rand(count, dtype=dtype, device=device).add_(0.5)
        self.gradient = sizes.copysign_(torch.randn(count, dtype=dtype, device=device))
        self._norm = float(self.gradient.norm(dtype=torch.promote_types(dtype, torch.float64)))
        self.max_norm = CLIP * self._norm
        self._expected: dict[bool, dict[str, Tensor]] = {}

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat` in the parameters' shapes."""
        views = flat.split([shape.numel() for shape in self._shapes])
        return [view.view(shape) for view, shape in zip(views, self._shapes, strict=True)]

    def expected(self, coupled: bool) -> dict[str, Tensor]:
        """What there is after FACTORS' steps, by its name in an optimizer's state."""
        if coupled not in self._expected:
            found = [self._steps(*part, coupled) for part in parts(self.start, self.gradient)]
            self._expected[coupled] = {
                name: torch.cat([f[name] for f in found]) for name in found[0]
            }
        return self._expected[coupled]

    def _steps(self, start: Tensor, gradient: Tensor, coupled: bool) -> dict[str, Tensor]:
        adam, option = self.kind.adam, self.kind.option
        lr = LR_CHECKED
        beta1, beta2 = BETAS
        p = average = start.double()
        m = v = torch.zeros_like(p)
        for t, factor in enumerate(FACTORS, start=1):
            g = gradient.double() * factor
            if option == "clip":
                g = g * min(1.0, self.max_norm / (abs(factor) * self._norm + 1e-6))
            if coupled:
                g = g + DECAY * p
            else:
                p = p * (1 - lr * DECAY)
            if adam:
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
                p = p - lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + EPS)
            else:
                m = MOMENTUM * m + g
                p = p - lr * m
            if option == "l1":
                p = F.softshrink(p, lr * L1)
            average = EMA_DECAY * average + (1 - EMA_DECAY) * p
        moments = {"exp_avg": m, "exp_avg_sq": v} if adam else {"momentum_buffer": m}
        return {"parameters": p, **moments, **({"ema": average} if option == "ema" else {})}

    def compare(self, name: str, what: str, found: Tensor, value: Tensor) -> None:
        """Raises WrongValues unless `found` is right to a few roundings of values around 1, or
        around 1e-3 for squares. torch's norm of many tensors has some more of them."""
        allowed = (32 if self.kind.option == "clip" else 8) * torch.finfo(self.start.dtype).eps
        floor = 1e-3 if what == "exp_avg_sq" else 1.0
        compare(name, found, lambda value: value, (value,), allowed, floor=floor)
