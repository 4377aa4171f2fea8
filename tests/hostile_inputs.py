"""Valid calls of every op, and what is done to their arguments: for hostile_calls.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from case_runs import SMALL, Recorder
from torch import Tensor

from reg_kernels import functional as F
from reg_kernels._tensor_table import TensorTable, addresses, dtype_number
from reg_kernels.ops._registry import OPS
from reg_kernels.ops.optimizer_step import StepLists

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)
COMPUTE = {torch.float64: torch.float64}
ONLY_OP: str | None = None


def _is_plain(value: Any, kind: str) -> bool:
    """Whether an argument of a type of the schema is handed on as it is."""
    if kind == "List[Tensor]":
        return isinstance(value, list) and all(_is_plain(x, "Tensor") for x in value)
    if isinstance(value, Tensor):
        odd = value.is_neg() or value.is_conj() or value._is_zerotensor()
        known = value.dtype in (*FLOATS, *OTHERS[:4])
        return value.device.type == "cpu" and value.layout == torch.strided and known and not odd
    if "Tensor" in kind:
        return value is None and kind != "Tensor"
    if kind in ("int", "float") and isinstance(value, int) and abs(value) >= 2**63:
        return False
    return isinstance(value, int | float | bool | torch.dtype | None)


@dataclass
class HostileCall:
    op: str
    arguments: list[Any]
    changes: list[str] = field(default_factory=list)
    below_autograd: bool = False
    hook: Callable[[Tensor], Any] | None = None
    hooked: int = 0  # which function's saved tensors the hook gives back
    keeps: Any = None  # alive as long as the call

    def is_plain(self) -> bool:
        """Whether the arguments reach the implementation as they are."""
        overload = getattr(torch.ops.reg_kernels, self.op).default
        pairs = zip(self.arguments, overload._schema.arguments, strict=True)
        return all(_is_plain(value, str(argument.type)) for value, argument in pairs)

    def through_hook(self) -> Any:
        """A public function whose saved tensors a hook gives back changed."""
        x = torch.randn(4, 3, 5, requires_grad=True)
        labels = torch.randint(3, (4, 5))
        functions: list[Callable[[], Tensor]] = [
            lambda: F.batch_norm_act(
                x, None, None, torch.ones(3, requires_grad=True), None, x * 2, True, drop=0.5
            ),
            lambda: F.batch_norm(x, torch.zeros(3), torch.ones(3)),
            lambda: F.dropout(x, 0.5),
            lambda: F.cross_entropy(x, labels, reduction="none"),
            lambda: F.distillation_loss(x, x.detach(), labels, reduction="none"),
            lambda: F.mixup(x, 0.3, torch.tensor([1, 0, 3, 2])),
            lambda: F.l2_penalty([x]),
            lambda: F.drop_path(x, 0.5, layer_scale=torch.ones(5, requires_grad=True)),
        ]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, self.hook):
            y = functions[self.hooked % len(functions)]()
        return torch.autograd.grad(y.sum(), x)

    def __str__(self) -> str:
        if self.hook is not None:
            return f"through_hook() of function {self.hooked}: {self.changes[0]}"
        values = ", ".join(_described(value) for value in self.arguments)
        return f"{self.op}({values})  # {'; '.join(self.changes)}"


def _described(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_described, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.layout != torch.strided:
        return f"{value.layout}"
    name = str(value.dtype).removeprefix("torch.")
    return f"<{name} {tuple(value.shape)} {value.stride()} {value.device}>"


# Valid calls


def _values(r: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.linspace(-2, 2, math.prod(shape)).reshape(shape).to(dtype)


def _images(r: Random, dtype: torch.dtype, least: int = 2) -> Tensor:
    shape = r.choice([(4, 3), (64, 10), (2, 3, 5), (3, 8, 4, 4), (2, 1, 300), (2, 5, 2, 2, 2)])
    x = _values(r, shape, dtype)
    if len(shape) > 2 and r.random() < 0.4:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x


def _maybe(r: Random, value: Any) -> Any:
    return value if r.random() < 0.5 else None


def _state(r: Random) -> Tensor:
    return torch.tensor([r.getrandbits(62), r.getrandbits(40)])


def _dropout(r: Random) -> list[Any]:
    x = _images(r, r.choice(FLOATS))
    traced = _maybe(r, torch.tensor(0.25, dtype=torch.float64))
    return [x, 0.5, _state(r), 8 * r.randrange(3), traced]


def _normalised(r: Random) -> tuple[Tensor, list[Any]]:
    """An input, and weight, bias, residual."""
    x = _images(r, r.choice(FLOATS))
    channels, own = x.shape[1], r.choice([x.dtype, torch.float32])
    weight, bias = (torch.ones(channels, dtype=own) for _ in range(2))
    return x, [_maybe(r, weight), _maybe(r, bias), _maybe(r, x.clone())]


def _batch_norm(r: Random) -> list[Any]:
    x, rest = _normalised(r)
    tracked = [torch.zeros(x.shape[1]), torch.ones(x.shape[1])] if r.random() < 0.7 else []
    tracked.append(torch.tensor(r.choice([0, 5, 2**63 - 1])))
    p = r.choice([0.0, 0.5])
    rest += [tracked, r.choice([None, 0.1]), 1e-5, r.randrange(5), 0.01, p, _state(r)]
    rest.append(r.choice([0, 8, 13]))
    moments = torch.full((r.choice([1, 3]), 4, x.shape[1]), 2.0, dtype=torch.float64)
    return [x, *rest, r.random() < 0.5, _maybe(r, moments), None]


def _batch_norm_inference(r: Random) -> list[Any]:
    x, rest = _normalised(r)
    channels = x.shape[1]
    return [
        *(x, *rest, torch.zeros(channels), torch.ones(channels)),
        *(1e-5, r.randrange(5), 0.01),
    ]


def _batch_norm_backward(r: Random) -> list[Any]:
    x, rest = _normalised(r)
    channels = x.shape[1]
    count = x.numel() // channels
    gate = torch.full((channels * ((count + 7) // 8),), 255, dtype=torch.uint8)
    p = r.choice([0.0, 0.5])
    statistics = [torch.full((channels,), v, dtype=torch.float64) for v in (0.1, 1.0)]
    sums = _maybe(r, torch.ones(2 * channels + 1, dtype=torch.float64))
    wants = [r.random() < 0.7 for _ in range(3)]
    wants[1] = wants[1] and sums is None
    return [
        *(x.clone(), x, *rest, *statistics, gate if p else _maybe(r, gate), _state(r), 0),
        *(r.random() < 0.5, r.randrange(5), 0.01, p, *wants, sums),
    ]


def _batch_norm_moments(r: Random) -> list[Any]:
    return [_images(r, r.choice(FLOATS))]


def _batch_norm_sums(r: Random) -> list[Any]:
    a = _batch_norm_backward(r)
    return [*a[:8], *a[11:14]]


def _targets(r: Random, x: Tensor, of_labels: bool) -> list[Any]:
    """target, partner, lam, one_lam, weight, ignore_index, smoothing, reduction, and the smoothing
    as a compiled program may pass it."""
    positions = (x.shape[0], *x.shape[2:])
    compute = COMPUTE.get(x.dtype, torch.float32)
    traced = torch.full((1,), 0.2, dtype=torch.float64) if r.random() < 0.2 else None
    rest = [_maybe(r, torch.ones(x.shape[1], dtype=compute)), -100, r.choice([0.0, 0.1])]
    rest += [r.randrange(3), traced]
    if not of_labels:
        return [x.softmax(1).to(x.dtype), None, None, 1.0, *rest]
    pair = [torch.zeros(positions, dtype=torch.int64) for _ in range(2)]
    pair[0].fill_(x.shape[1] - 1)
    if r.random() < 0.5:
        return [pair[0], None, None, 1.0, *rest]
    lam = _maybe(r, torch.full(r.choice([(1,), (x.shape[0],)]), 0.3))
    return [*pair, lam, 0.4, *rest]


def _softness(r: Random) -> list[Any]:
    """temperature, alpha, and the two as a compiled program may pass them."""
    return [2.0, 0.5, torch.tensor([3.0, 0.25]).double() if r.random() < 0.2 else None]


def _saved(x: Tensor, reduction: int, stats: int) -> tuple[Tensor, Tensor]:
    compute = COMPUTE.get(x.dtype, torch.float32)
    positions = (x.shape[0], *x.shape[2:])
    grad = torch.ones(positions if reduction == 0 else (), dtype=compute)
    return grad, torch.ones((stats, *positions), dtype=compute)


def _cross_entropy(r: Random) -> list[Any]:
    x = _images(r, r.choice(FLOATS))
    return [x, *_targets(r, x, r.random() < 0.6), r.random() < 0.5]


def _cross_entropy_backward(r: Random) -> list[Any]:
    x = _images(r, r.choice(FLOATS))
    targets = _targets(r, x, r.random() < 0.6)
    grad, stats = _saved(x, targets[-2], 2)
    return [grad, x, stats, *targets]


def _distillation(r: Random) -> list[Any]:
    x = _images(r, r.choice(FLOATS))
    return [x, x.clone(), *_targets(r, x, True), *_softness(r), r.random() < 0.5]


def _distillation_backward(r: Random) -> list[Any]:
    x = _images(r, r.choice(FLOATS))
    targets = _targets(r, x, True)
    grad, stats = _saved(x, targets[-2], 5)
    return [grad, x, stats, x.clone(), *targets, *_softness(r)]


def _blend(r: Random, x: Tensor, dtype: torch.dtype) -> list[Any]:
    """lam, one_lam, index, boxes, scale"""
    samples, compute = len(x), torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    lam = _maybe(r, torch.full(r.choice([(1,), (samples,)]), 0.3))
    boxes = torch.tensor([[0, 0, 1, 1]] * r.choice([1, samples])) if x.dim() >= 4 else None
    index = torch.arange(samples).roll(1)
    scale = torch.ones(x.shape[1], dtype=compute)
    return [lam, 0.4, _maybe(r, index), _maybe(r, boxes), _maybe(r, scale)]


def _mixup(r: Random) -> list[Any]:
    dtype = r.choice(FLOATS)
    x = _images(r, r.choice([*FLOATS, torch.uint8]))
    blend = _blend(r, x, dtype)
    return [x, *blend, None if blend[-1] is None else blend[-1].clone(), dtype, r.random() < 0.5]


def _mixup_(r: Random) -> list[Any]:
    x = _images(r, r.choice(FLOATS))
    return [x, *_blend(r, x, x.dtype), None]


def _mixup_backward(r: Random) -> list[Any]:
    dtype = r.choice(FLOATS)
    x = _images(r, r.choice(FLOATS))
    lam, one_lam, index, boxes, scale = _blend(r, x, dtype)
    sorted_: list[Any] = [None, None]
    if index is not None:
        sorted_ = [torch.argsort(index), torch.arange(len(x) + 1)]
    return [x, lam, one_lam, *sorted_, boxes, scale, dtype, r.random() < 0.5]


def _lists(r: Random) -> tuple[int, list[Any], list[Any]]:
    """algorithm, what optimizer_step_ has of lists, and what follows them."""
    algorithm, count = r.randrange(3), r.choice([1, 3])
    dtype = r.choice(FLOATS)
    moments = r.choice([dtype, torch.float32]) if dtype != torch.float64 else dtype
    shapes = [r.choice([(3, 5), (700,), (0,), ()]) for _ in range(count)]

    def each(dtype: torch.dtype, present: bool = True) -> list[Tensor]:
        return [torch.full(s, 0.5, dtype=dtype) for s in shapes] if present else []

    compute = torch.promote_types(dtype, torch.float32)
    rounding = r.randrange(3)
    lists = [
        each(dtype),
        each(dtype, algorithm != 2),  # an average alone takes no gradients
        *([torch.zeros(()) for _ in shapes], each(moments)),
        *(each(moments, algorithm == 0), each(moments, algorithm == 0 and r.random() < 0.3)),
        *(each(compute, algorithm == 2 or r.random() < 0.3), each(dtype, rounding == 2)),
        *([0] * count, [0] * count),
        *(([r.choice([0, 1, 5])] * count, [7] * count) if r.random() < 0.5 else ([], [])),
    ]
    on_device = r.random() < 0.3
    common = [
        [0.1, 0.1, 0.1, 0.0, 0.9, 0.99, 1e-3, 0.5],
        [16 * on_device],
        [torch.tensor(0.1)] if on_device else [],
        rounding,
        _maybe(r, torch.ones(1, dtype=torch.float64)),
        1.0,
        _maybe(r, torch.tensor(2.0)),
        _maybe(r, torch.tensor(0.0)),
        _state(r),
    ]
    return algorithm, lists, common


def _optimizer_step_(r: Random) -> list[Any]:
    algorithm, lists, common = _lists(r)
    return [algorithm, *lists, *common]


def _optimizer_step_table(r: Random) -> tuple[list[Any], Any]:
    algorithm, lists, common = _lists(r)
    of = StepLists(*lists)
    table = of.table()
    arguments = [table.data, table.count, table.seal, algorithm, of.dtypes(), *common]
    return [*arguments, table.scratch], (lists, table)


def _penalty(r: Random) -> list[Any]:
    return [[_images(r, r.choice(FLOATS)) for _ in range(r.choice([1, 3]))], r.choice([1, 2])]


def _penalty_backward(r: Random) -> list[Any]:
    tensors, power = _penalty(r)
    return [tensors, torch.tensor(1.0), power]


def _penalty_table(r: Random) -> tuple[list[Any], Any]:
    x = _values(r, (r.choice([0, 5, 9000]),), r.choice(FLOATS))
    table = TensorTable([x.numel()], x.device, (x.dtype,), grad=addresses([x]))
    head = [table.data, 1, table.seal, dtype_number(x.dtype), 2]
    sums = torch.zeros(2, dtype=torch.float64)
    return [*head, sums, 1, table.scratch], (x, table)


def _penalty_backward_table(r: Random) -> tuple[list[Any], Any]:
    x = _values(r, (r.choice([0, 5, 9000]),), r.choice(FLOATS))
    y = torch.empty_like(x)
    table = TensorTable(
        [x.numel()], x.device, (x.dtype,), grad=addresses([x]), param=addresses([y])
    )
    head = [table.data, 1, table.seal, dtype_number(x.dtype), 2]
    return [*head, torch.ones(1, dtype=torch.float64)], (x, y, table)


VALID: dict[str, Callable[[Random], Any]] = {
    **dict.fromkeys(("dropout", "dropout_", "feature_dropout", "feature_dropout_"), _dropout),
    **{
        function.__name__.removeprefix("_"): function
        for function in (
            *(_batch_norm, _batch_norm_inference, _batch_norm_backward),
            *(_batch_norm_moments, _batch_norm_sums),
            *(_cross_entropy, _cross_entropy_backward, _distillation, _distillation_backward),
            *(_mixup, _mixup_, _mixup_backward),
            *(_optimizer_step_, _optimizer_step_table),
            *(_penalty, _penalty_backward, _penalty_table, _penalty_backward_table),
        )
    },
}


def _of_a_case(op: str, r: Random) -> list[Any]:
    """The arguments that one of the op's cases comes to call it with. In place, what is not dense
    goes by way of another op."""
    calls: list[Any] = []
    while not calls:
        case = r.choice([case for case in SMALL if case.op == op])
        inputs = case.inputs(torch.device("cpu"), r.choice(FLOATS))
        with Recorder() as recorder:
            case.function(*inputs, backend="reference")
        calls = [call for call in recorder.calls if call.op == op]
    (call,) = calls
    left_out = call.overload._schema.arguments[len(call.args) :]
    return [*call.args, *(argument.default_value for argument in left_out)]


VALID |= {op: functools.partial(_of_a_case, op) for op in OPS if op not in VALID}

# What is done to a tensor. Each returns another one; where that cannot be made, torch raises.


def _freed(x: Tensor, numel: int = 0) -> Tensor:
    x = x.detach().clone()
    x.untyped_storage().resize_(numel)
    return x


def _between(x: Tensor) -> Tensor:
    """Strided: every second element of a buffer."""
    wide = torch.zeros((*x.shape, 2), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def _overlapping(x: Tensor) -> Tensor:
    return x.clone().as_strided(x.shape, [1] * x.dim())


def _misaligned(x: Tensor) -> Tensor:
    buffer = bytearray(x.numel() * x.itemsize + 1)
    return torch.frombuffer(buffer, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)


def _offset(x: Tensor) -> Tensor:
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


TENSORS: dict[str, Callable[[Random, Tensor], Any]] = {
    "dtype": lambda r, x: x.detach().to(r.choice([*FLOATS, *OTHERS])),
    "another float": lambda r, x: x.detach().to(r.choice(FLOATS)),
    "meta": lambda r, x: x.to("meta"),
    "expanded": lambda r, x: x.detach()[:1].clone().expand(x.shape),
    "expanded from one": lambda r, x: x.new_ones(()).expand(x.shape),
    "huge": lambda r, x: x.new_ones(1).expand(r.choice([2**40, 2**62])),
    "huge and empty": lambda r, x: x.new_ones((2**40, 0, 2**20)[: r.choice([2, 3])]),
    "huge batch of nothing": lambda r, x: x.new_ones((1, 0, 1, 1)).expand(2**62, 0, 1, 1),
    "every second": lambda r, x: _between(x),
    "overlapping": lambda r, x: _overlapping(x),
    "transposed": lambda r, x: x.detach().clone().transpose(0, -1),
    "transposed strides": lambda r, x: x.detach().transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda r, x: x.detach().movedim(1, -1).contiguous().movedim(-1, 1),
    "no rows": lambda r, x: x.detach()[:0],
    "no columns": lambda r, x: x.detach()[:, :0],
    "empty": lambda r, x: x.new_empty(0),
    "one less": lambda r, x: x.detach()[:-1].clone(),
    "one more": lambda r, x: torch.cat([x.detach(), x.detach()[:1]]),
    "flat": lambda r, x: x.detach().reshape(-1),
    "another dimension": lambda r, x: x.detach().unsqueeze(r.randrange(x.dim() + 1)),
    "one number": lambda r, x: x.new_ones(()),
    "one element": lambda r, x: x.new_ones(1),
    "freed": lambda r, x: _freed(x),
    "half freed": lambda r, x: _freed(x, x.nbytes // 2),
    "freed from an offset on": lambda r, x: _freed(_offset(x)),
    "a zero tensor": lambda r, x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "negative view": lambda r, x: x.detach().clone()._neg_view(),
    "conjugate": lambda r, x: x.to(torch.complex64).conj(),
    "sparse": lambda r, x: x.detach().to_sparse(),
    "mkldnn": lambda r, x: x.detach().float().to_mkldnn(),
    "misaligned": lambda r, x: _misaligned(x),
    "at an offset": lambda r, x: _offset(x),
    "NaN": lambda r, x: torch.full_like(x, math.nan),
    "infinite": lambda r, x: torch.full_like(x, r.choice([math.inf, -math.inf])),
    "integers": lambda r, x: torch.full_like(
        x, r.choice([-1, 3, 99, 2**40, 2**63 - 1, -(2**63)]), dtype=torch.int64
    ),
    "requires grad": lambda r, x: x.detach().clone().requires_grad_(),
    "None": lambda r, x: None,
    "no tensor": lambda r, x: r.choice([3, "x", [1.0]]),
}
INTEGERS = (-1, 0, 1, 2, 3, 4, 5, 7, 99, 2**31, 2**40, 2**60, 2**62, 2**63 - 1, -(2**63), 2**70)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 2.0, 1e308, 1e-320)


def tensors_in(arguments: list[Any]) -> list[Tensor]:
    flat = [v for value in arguments for v in (value if isinstance(value, list) else [value])]
    return [v for v in flat if isinstance(v, Tensor)]


def _changed_list(r: Random, values: list[Any], kind: str, arguments: list[Any]) -> Any:
    how = r.choice(["empty", "shorter", "longer", "one of them", "one of them", "None"])
    if how == "empty" or not values:
        return [], how
    if how == "None":
        return None, how
    if how == "shorter":
        return values[:-1], how
    if how == "longer":
        return [*values, values[0]], how
    place = r.randrange(len(values))
    value, what = _changed(r, values[place], kind, arguments)
    return [*values[:place], value, *values[place + 1 :]], f"[{place}] {what}"


def _changed(r: Random, value: Any, kind: str, arguments: list[Any]) -> tuple[Any, str]:
    """Another value for an argument of a type of the schema, and what it is."""
    if isinstance(value, list):
        return _changed_list(r, value, kind, arguments)
    if value is None or isinstance(value, Tensor):
        if value is None and "Tensor" not in kind:
            # Not a tensor: torch's own refusal prints its values, freed or not.
            return r.choice(["", "0", "x" * 99]), "a word"
        others = tensors_in(arguments)
        if value is None or r.random() < 0.08:
            other = r.choice(others)
            if r.random() < 0.5:
                return other, "another argument"
            return other.detach().view(r.choice([*FLOATS, *OTHERS[:3]])), "another one's memory"
        name = r.choice(list(TENSORS))
        return TENSORS[name](r, value), name
    if isinstance(value, bool):
        return not value, "the other one"
    if isinstance(value, torch.dtype):
        return r.choice([*FLOATS, *OTHERS]), "dtype"
    numbers = INTEGERS if isinstance(value, int) else NUMBERS
    number = r.choice(numbers)
    return number, f"{number!r}"


def draw(r: Random) -> HostileCall:
    """A valid call with one to three of its arguments changed; now and then with none."""
    op = ONLY_OP or r.choice([*VALID, "optimizer_step_", "optimizer_step_"])  # of many arguments
    made = VALID[op](r)
    arguments, keeps = made if isinstance(made, tuple) else (made, None)
    call = HostileCall(op, arguments, keeps=keeps, below_autograd=r.random() < 0.6)
    schema = getattr(torch.ops.reg_kernels, op).default._schema.arguments
    assert len(arguments) == len(schema), (op, len(arguments), len(schema))
    if ONLY_OP is None and r.random() < 0.05:
        # Not of what is freed: torch's own functions read it as well.
        name = r.choice([name for name in TENSORS if "freed" not in name])
        only = r.randrange(8)  # of the tensors that are saved
        seen = iter(range(1000))
        call.hook = lambda t: TENSORS[name](r, t) if next(seen) == only else t
        call.hooked = r.randrange(8)
        call.changes.append(f"saved tensor {only}: {name}")
        return call
    changes = min(r.choice([0, 1, 1, 1, 1, 1, 2, 2, 3]), len(arguments))
    for place in r.sample(range(len(arguments)), changes):  # no change of what is freed already
        try:
            value, what = _changed(r, arguments[place], str(schema[place].type), arguments)
        except Exception:  # not of this tensor
            continue
        arguments[place] = value
        call.changes.append(f"{schema[place].name} {what}")
    return call
