"""The optimizer step of AdamW, Adam, SGDW and SGD on whole lists of tensors.

One launch for all tensors of one device and dtype. The op takes lists, so that its schema says what
it writes; `PreparedStep` is the same for a list that comes again and again: it keeps the addresses
in a table and spares the dispatcher the lists. reg_kernels/optim/ is what people use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .._dtypes import named
from .._layout import is_dense
from .._tensor_table import TensorTable, addresses, dtype_number
from ..reference import optimizer_step as reference
from ._checks import Entry, described, has_layout_of
from ._modes import below_autograd
from ._registry import register
from ._route import Route
from ._table import TablePart

# Numbered as in csrc/include/reg_kernels/optimizer_step_math.h.
# "average" is for parameters that have no gradient: it takes their average on and leaves them.
ALGORITHMS = ("adam", "sgd", "average")
_AVERAGE = ALGORITHMS.index("average")
_NEEDED = {  # the lists that an algorithm cannot do without
    "adam": ("params", "grads", "first_moments", "second_moments"),
    "sgd": ("params", "grads"),
    "average": ("params", "emas"),
}
DECAYS = ("decoupled", "decoupled_lr", "l2")
ROUNDINGS = ("nearest", "stochastic", "kahan")

MOST_GROUPS = 32  # of hyperparameters that a launch takes: a GPU gets them as its arguments


class Hyperparameters(NamedTuple):
    """What a group of parameters is stepped with; SGD's momentum and dampening are the betas."""

    lr: float
    decay_lr: float
    weight_decay: float
    l1: float
    beta1: float
    beta2: float
    eps: float
    ema_decay: float
    decay: str
    maximize: bool
    nesterov: bool
    rate_on_device: bool = False  # lr is among the op's `rates`

    def numbers(self) -> tuple[float, ...]:
        return self[:8]

    def flags(self) -> int:
        marks = 4 * self.maximize + 8 * self.nesterov + 16 * self.rate_on_device
        return DECAYS.index(self.decay) + marks


class StepSettings(NamedTuple):
    """What a step is told beside its lists, in the order of the op and of its part."""

    numbers: list[float]  # of each group: Hyperparameters.numbers()
    flags: list[int]  # likewise
    rates: list[Tensor]  # float32, the lr of those groups that have it on the device
    rounding: int = 0
    squares: Tensor | None = None  # float64: they add up to the square of the gradients' norm
    max_norm: float = 0.0  # that it is clipped to, where there are squares
    grad_scale: Tensor | None = None  # as torch.amp.GradScaler has it
    found_inf: Tensor | None = None  # likewise
    rng_state: Tensor | None = None


_SETTINGS = (
    "float[] numbers, int[] flags, Tensor[] rates, int rounding, Tensor? squares, float max_norm, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? rng_state"
)

_STEP = TablePart(
    "optimizer_step",
    "optimizer_step_table",
    f"int algorithm, int[] dtypes, {_SETTINGS}, Tensor(a!) scratch",
)


class StepLists(NamedTuple):
    """N tensors of one device and dtype, and their state: each list has N tensors or none.

    All tensors at one place of the lists are dense, of one shape and strides; `steps` are float32
    of one element. `first_moments` are exp_avg or momentum_buffer, and have a dtype of their own
    together with the second ones: the parameters', float32, or bfloat16 for float32 parameters.
    `emas` are of the compute type, float32 for 16-bit parameters. "average" takes params and emas,
    and no gradients. In the order of the op.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor] = ()
    steps: Sequence[Tensor] = ()
    first_moments: Sequence[Tensor] = ()
    second_moments: Sequence[Tensor] = ()
    max_second_moments: Sequence[Tensor] = ()
    emas: Sequence[Tensor] = ()
    compensations: Sequence[Tensor] = ()
    groups: Sequence[int] = ()
    element_offsets: Sequence[int] = ()  # of each tensor's first element among the draws
    # Of a shard, whose elements' draws are those of the whole tensor's: how many of them are side
    # by side, 0 for all, and how far apart such runs begin. Both lists are empty where none is one.
    runs: Sequence[int] = ()
    run_strides: Sequence[int] = ()

    def table(self) -> TensorTable:
        """The lists in a table; the tensors have to outlive it."""
        rows: dict[str, Any] = {  # of the lists' names, without the s
            name.removesuffix("s"): addresses(x) if isinstance(x[0], Tensor) else x  # type: ignore[arg-type]
            for name, x in zip(self._fields, self, strict=True)
            if x
        }
        sizes = [p.numel() for p in self.params]
        first, moments = self.params[0], (self.first_moments or self.params)[0]
        return TensorTable(sizes, first.device, (first.dtype, moments.dtype), **rows)

    def check(self, algorithm: int, settings: StepSettings) -> None:
        """Raises RuntimeError where a kernel would read or write past what is there."""
        first, count = self.params[0], len(self.params)
        call = Entry("optimizer_step_", first)
        if algorithm not in range(len(ALGORITHMS)):
            call.refuse("algorithm", "0, 1 or 2", algorithm)
        call.check_floats(first, "params")
        moments = (self.first_moments or self.params)[0].dtype
        if moments not in _moments_of(first.dtype):
            must = f"one of {', '.join(map(named, _moments_of(first.dtype)))}"
            call.refuse("first_moments", must, self.first_moments[0])
        dtypes = {
            **dict.fromkeys(("params", "grads", "compensations"), first.dtype),
            **dict.fromkeys(("first_moments", "second_moments", "max_second_moments"), moments),
            "emas": torch.promote_types(first.dtype, torch.float32),
            "steps": torch.float32,
        }
        needed = _NEEDED[ALGORITHMS[algorithm]]
        for name, dtype in dtypes.items():
            tensors = getattr(self, name)
            if len(tensors) != count and (tensors or name in needed):
                call.refuse(name, f"{count} tensors, one for each parameter", len(tensors))
            for i, (x, p) in enumerate(zip(tensors, self.params, strict=False)):
                if name == "steps":
                    call.check_number(x, dtype, f"steps[{i}]")
                    continue
                if x.dtype != dtype or not is_dense(x) or not has_layout_of(p, x):
                    must = f"dense {named(dtype)}, of the strides of {described(p)}"
                    call.refuse(f"{name}[{i}]", must, x)
                call.check_memory(x, f"{name}[{i}]")
        self._check_settings(call, settings)

    def _check_settings(self, call: Entry, settings: StepSettings) -> None:
        numbers, flags, rates, rounding, squares, _, grad_scale, found_inf, rng_state = settings
        count, groups = len(self.params), len(flags)
        if groups > MOST_GROUPS or len(numbers) != groups * len(Hyperparameters._fields[:8]):
            must = f"8 for each of {groups} groups, which are at most {MOST_GROUPS}"
            call.refuse("numbers", must, len(numbers))
        if any(not 0 <= word < 32 or word % 4 == 3 for word in flags):
            call.refuse("flags", "a decay, 0 to 2, and bits up to 16", flags)
        if len(rates) < sum(word >= 16 for word in flags):
            call.refuse("rates", "one for each group that has it there", len(rates))
        for rate in rates:
            call.check_number(rate, torch.float32, "rates")
        if len(self.groups) != count or not all(0 <= g < groups for g in self.groups):
            call.refuse("groups", f"{count} numbers below {groups}", self.groups)
        for name in ("element_offsets", "runs", "run_strides"):
            places = getattr(self, name)
            needed = name == "element_offsets" or len(self.runs) + len(self.run_strides) > 0
            if len(places) != count * needed or any(not 0 <= o < 2**62 for o in places):
                call.refuse(name, f"{count} numbers in [0, 2^62)", places)
        if rounding not in range(len(ROUNDINGS)):
            call.refuse("rounding", "0, 1 or 2", rounding)
        rounded = self.params[0].dtype in (torch.float16, torch.bfloat16)
        if ROUNDINGS[rounding] == "stochastic" and rounded and rng_state is None:
            call.refuse("rng_state", "given for stochastic rounding", None)
        if rng_state is not None:
            call.check_rng_state(rng_state)
        if squares is not None:
            call.check_vector(squares, torch.float64, squares.numel(), "squares")
        call.check_number(grad_scale, torch.float32, "grad_scale")
        call.check_number(found_inf, torch.float32, "found_inf")

    def dtypes(self) -> list[int]:
        """The parameters' and the moments' dtype, as the kernels number them."""
        moments = self.first_moments or self.params
        return [dtype_number(self.params[0].dtype), dtype_number(moments[0].dtype)]


def _moments_of(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The types that moments of parameters of a type may have."""
    if dtype == torch.float64:
        return (dtype,)
    return (dtype, torch.bfloat16 if dtype == torch.float32 else torch.float32)


def _of_lists(backend: str) -> Any:
    """The op's implementation."""
    count = len(StepLists._fields)

    def run(algorithm: int, *arguments: Any) -> None:
        lists, settings = StepLists(*arguments[:count]), StepSettings(*arguments[count:])
        if not lists.params:
            return
        lists.check(algorithm, settings)
        if backend == "reference":
            reference.optimizer_step_(algorithm, *arguments)
        else:
            table = lists.table()
            head = (*table.head, algorithm, lists.dtypes())
            _STEP.function(backend)(*head, *settings, table.scratch)

    return run


def _fake(*arguments: Any) -> None:
    return None


def _moved(inputs: Any, rest: tuple[Any, ...]) -> list[Tensor]:
    """What a graph may have saved: it must know that it has changed."""
    algorithm, params, *_ = rest
    return [] if algorithm == _AVERAGE else params


OP = register(
    "optimizer_step_",
    "(int algorithm, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] steps, "
    "Tensor(c!)[] first_moments, Tensor(d!)[] second_moments, Tensor(e!)[] max_second_moments, "
    "Tensor(f!)[] emas, Tensor(g!)[] compensations, int[] groups, int[] element_offsets, "
    f"int[] runs, int[] run_strides, {_SETTINGS}) -> ()",
    fake=_fake,
    route=Route(moves=_moved),
    **{backend: _of_lists(backend) for backend in backends.NAMES},
)


class PreparedStep:
    """A step of lists that stay the same; only the gradients may lie somewhere else each time."""

    def __init__(self, algorithm: str, lists: StepLists) -> None:
        self.table = lists.table()
        self.lists = lists._replace(grads=())  # which may be freed
        self._algorithm = ALGORITHMS.index(algorithm)
        self._head = (*self.table.head, self._algorithm, lists.dtypes())
        first = lists.params[0]
        self._kind = (first.device.type, first.dtype)

    def backend(self, backend: str | None) -> str:
        """The implementation that runs it; raises BackendUnavailable where it cannot."""
        return backends.choose("optimizer_step", *self._kind, backend)

    def run(self, grads: Sequence[Tensor], backend: str, settings: StepSettings) -> None:
        """Steps; the addresses of the grads have to be in the table already."""
        if backend == "reference":
            lists = self.lists._replace(grads=grads)
            OP.overloads[backend](self._algorithm, *lists, *settings)
            return
        with below_autograd():
            _STEP.function(backend)(*self._head, *settings, self.table.scratch)
        if self._algorithm != _AVERAGE:
            torch.autograd.graph.increment_version(self.lists.params)
