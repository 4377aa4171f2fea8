"""Benchmarks of BatchNorm's layers, and of BatchNorm and what follows it as one layer.

Bytes an element, s = sizeof(dtype): a training forward reads x for the statistics, then x again and
writes y: 3 s. A backward reads the gradient and x for its sums, then both again, and writes another
gradient: 5 s. On a GPU, what a direction reads need be read only once where it fits the chip, 230
KiB a multiprocessor: 2 s and 3 s. An inference reads x and writes y: 2 s. A residual is one more
transfer in each direction. Dropout, and relu behind a residual, need a bit an element: written
once, and read in each pass of the backward.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import nn
from ..reference.batch_norm import per_channel
from ..reference.dropout import rate
from ._measure import (
    BACKWARD,
    BOTH,
    FORWARD,
    Benchmark,
    Contender,
    Goal,
    Scope,
    Skipped,
    WrongValues,
    faster,
)
from ._values import check_share, compare, parts
from ._ways import Inputs, Makers, Way, calls, in_layout, ways

P = 0.1


class Kind(NamedTuple):
    """What is computed: torch's layers one after the other, and one of ours."""

    op: str
    variant: str = ""
    training: bool = True
    residual: bool = False
    relu: bool = False
    drop: float = 0.0

    @property
    def gated(self) -> bool:
        """Whether the backward needs a bit an element."""
        return self.residual or self.drop > 0


PLAIN = Kind("batch_norm")
FROZEN = Kind("batch_norm_inference", training=False)
ACTIVATED = Kind("batch_norm_act", "relu", relu=True)
DROPPED = Kind("batch_norm_act", "relu+dropout", relu=True, drop=P)
ADDED = Kind("batch_norm_act", "residual+relu", relu=True, residual=True)

_LAYOUTS = ("contiguous", "channels_last")
_SMALL = (32, 16)
_STAGE = (64, 64, 56, 56)  # N, C, H, W of a ResNet's first stage
_TYPICAL = (64, 64, 14, 14)  # the caches of a CPU and of a GPU hold it
_FLAT = (4096, 512)
# C, H, W of ResNet-50's BatchNorms, from the first to the last.
_RESNET = (
    (64, 112, 112),
    (64, 56, 56),
    (256, 56, 56),
    (512, 28, 28),
    (1024, 14, 14),
    (2048, 7, 7),
)
_CHIP = 230 * 1024  # bytes a multiprocessor
_EPS = 1e-5  # every layer's by default

_HOST_CPU = Goal("native", "at most 1.5 of nn.BatchNorm1d's time", "time_over_eager", 1.5)
_HOST_GRAD = Goal("native", "at most 1.2 of nn.BatchNorm1d's time", "time_over_eager", 1.2)
_HOST_GPU = Goal("native", "at most 1.3 of nn.BatchNorm1d's time", "time_over_eager", 1.3)
_FLOOR = Goal("native", "at least 0.85 of the floor", "share_of_copy", 0.85, True)


def cases(scope: Scope) -> list[Benchmark]:
    """Small calls, then layers and chains by dtype, shape, layout and direction."""
    result = []
    for dtype in scope.of_small_calls:
        small = functools.partial(_case, scope, dtype=dtype, shape=_SMALL, host=True)
        result.append(small(PLAIN, direction=FORWARD, requires_grad=False))
        result += [small(PLAIN, direction=direction) for direction in (FORWARD, BOTH)]
        result += [small(kind, direction=BOTH) for kind in (DROPPED, ADDED)]
        result.append(small(FROZEN, direction=FORWARD))
    for point in _gpu(scope) if scope.device.type == "cuda" else _cpu(scope):
        result.append(_case(scope, *point))
    return result


def sized(scope: Scope, elements: int) -> list[Benchmark]:
    """Points of growth curves: 16 square images of 64 channels; `elements` is a power of four."""
    side = math.isqrt(elements // (16 * 64))
    return [_case(scope, ACTIVATED, torch.float32, (16, 64, side, side), BOTH)]


Point = tuple[Kind, torch.dtype, tuple[int, ...], str, str]  # the last: direction and layout


def _cpu(scope: Scope) -> Iterator[Point]:
    places = (*((_STAGE, layout) for layout in _LAYOUTS), (_FLAT, "contiguous"))
    for kind in (PLAIN, DROPPED, ADDED, FROZEN):
        for dtype in scope.dtypes:
            first = scope.everything or dtype == scope.dtypes[0]
            if not first and kind is not PLAIN:
                directions = _directions(kind, False)
                yield kind, dtype, _STAGE, directions[0], "contiguous"
                continue
            directions = _directions(kind, scope.everything or (first and kind is PLAIN))
            for (shape, layout), direction in itertools.product(places, directions):
                yield kind, dtype, shape, direction, layout
        for dtype in scope.dtypes if kind is PLAIN else scope.brief:
            for direction in _directions(kind, scope.everything):
                yield kind, dtype, _TYPICAL, direction, "contiguous"


def _gpu(scope: Scope) -> Iterator[Point]:
    """Benchmarks with goals come first, since time may be short; dtypes of 16 bits are enough."""
    memory = torch.cuda.get_device_properties(scope.device).total_memory
    halves = tuple(dtype for dtype in scope.dtypes if dtype.itemsize == 2)
    dtypes = scope.dtypes if scope.everything else halves or scope.dtypes
    small_batch = [((64, *shape), layout) for shape in _RESNET for layout in _LAYOUTS]
    large_batch = [((256, *shape), layout) for shape in _RESNET for layout in _LAYOUTS]
    late = [(_TYPICAL, "contiguous")]
    chained = [*(((64, 256, 56, 56), layout) for layout in _LAYOUTS), (_FLAT, "contiguous")]
    uneven = [
        ((8, 3, 1024, 1024), "contiguous"),  # few channels of many pixels
        ((8, 3, 1024, 1024), "channels_last"),
        ((32, 8192, 4, 4), "contiguous"),  # many channels of few
        ((32, 8192, 4, 4), "channels_last"),
        (_FLAT, "contiguous"),
    ]
    for kind, places, brief in (
        (DROPPED, chained, (BOTH,)),
        (PLAIN, small_batch, (FORWARD, BOTH)),
        (PLAIN, uneven, (FORWARD, BOTH)),
        (ADDED, chained, (BOTH,)),
        (FROZEN, chained[:2], (FORWARD,)),
        (PLAIN, large_batch, (BOTH,)),
        *((kind, late, _directions(kind, False)) for kind in (PLAIN, DROPPED, ADDED, FROZEN)),
    ):
        for dtype, (shape, layout) in itertools.product(dtypes, places):
            # Every contender's outputs and gradients are there at the same time.
            if 16 * _size(shape, dtype) <= memory:
                for direction in _directions(kind, True) if scope.everything else brief:
                    yield kind, dtype, shape, direction, layout


def _directions(kind: Kind, all_of_them: bool) -> tuple[str, ...]:
    if not kind.training:
        return (FORWARD,)
    return (FORWARD, BACKWARD, BOTH) if all_of_them else (BOTH,)


def _goals(
    device: torch.device,
    kind: Kind,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    direction: str,
    layout: str,
    host: bool,
    requires_grad: bool,
) -> tuple[Goal, ...]:
    on_gpu = device.type == "cuda"
    if host:
        if kind is not PLAIN or (on_gpu and direction != FORWARD):
            return ()
        return (_HOST_GPU if on_gpu else _HOST_GRAD if requires_grad else _HOST_CPU,)
    if shape == _TYPICAL:
        return ()
    goals: list[Goal] = []
    if kind.gated and direction != BACKWARD:
        # 64 bytes a channel: parameters, statistics and what rounding up to whole bytes costs.
        size = _size(shape, dtype)
        limit = size + size // dtype.itemsize // 8 + 64 * (shape[1] + 1)
        goals.append(Goal("native", "keeps x and one bit an element", "kept_bytes", limit))
    if on_gpu:
        if kind is PLAIN and direction == FORWARD and dtype == torch.bfloat16:
            goals.append(_FLOOR)
        if kind is PLAIN and direction == BOTH and shape[1:] in _RESNET:
            goals += [faster(1.5), faster(1.2, "compile")]
        if kind is DROPPED and direction == BOTH:
            goals.append(faster(2.5))
    elif dtype == torch.float32 and direction == BOTH:
        if kind is DROPPED:
            goals.append(faster(10))
        if kind is PLAIN and layout == "contiguous":
            goals += [faster(2.2), faster(1.5, "compile")]
        if kind is PLAIN and layout == "channels_last":
            goals.append(faster(1.4))
    return tuple(goals)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _bytes(
    device: torch.device, kind: Kind, dtype: torch.dtype, shape: tuple[int, ...], direction: str
) -> int:
    """Bytes that have to move, as the head of this file counts them."""
    size = _size(shape, dtype)
    gate = size // dtype.itemsize // 8 if kind.gated else 0
    chip = 0
    if device.type == "cuda":
        chip = _CHIP * torch.cuda.get_device_properties(device).multi_processor_count
    added = size if kind.residual else 0
    passes = 2 if kind.training and size > chip else 1
    forward = (passes + 1) * size + added + gate
    passes = 2 if 2 * size > chip else 1
    backward = (2 * passes + 1) * size + added + passes * gate
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]


def _case(
    scope: Scope,
    kind: Kind,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    direction: str,
    layout: str = "contiguous",
    *,
    requires_grad: bool = True,
    host: bool = False,
) -> Benchmark:
    requires_grad = requires_grad and kind.training

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        def draw() -> Tensor:
            return in_layout(torch.randn(shape, dtype=dtype, device=device), layout)

        arguments = []
        for _ in range(pool):
            tensors = [draw().mul_(2).add_(0.7), *([draw()] if kind.residual else [])]
            arguments.append(tuple(t.requires_grad_(requires_grad) for t in tensors))
        grads = [draw() for _ in range(0 if direction == FORWARD else pool)]
        inputs = Inputs(arguments, arguments, grads)
        truth = Truth(kind, dtype, *arguments[0])
        makers = _layers(truth, shape, requires_grad)
        size = _size(shape, dtype)
        return [
            way if isinstance(way, Skipped) else _contender(way, truth, direction, inputs)
            for way in ways(
                kind.op,
                makers,
                direction=direction,
                device=device,
                dtype=dtype,
                size=size,
                compiled=scope.compiled,
            )
        ]

    return Benchmark(
        op=kind.op,
        variant=kind.variant,
        direction=direction,
        dtype=dtype,
        shape=shape,
        bytes=_bytes(scope.device, kind, dtype, shape, direction),
        prepare=prepare,
        layout=layout,
        requires_grad=requires_grad,
        host=host,
        goals=_goals(scope.device, kind, dtype, shape, direction, layout, host, requires_grad),
    )


class _AddReLU(torch.nn.Module):
    """The end of a ResNet's block, as torchvision writes it."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        output = self.norm(input)
        output += residual
        return torch.relu_(output)


def _layers(truth: Truth, shape: tuple[int, ...], requires_grad: bool) -> Makers:
    """Layers with the parameters and statistics of `truth`, each with its own."""
    kind = truth.kind
    suffix = {2: "1d", 4: "2d"}[len(shape)]

    def ready(layer: torch.nn.Module) -> torch.nn.Module:
        layer.to(truth.weight).train(kind.training).requires_grad_(requires_grad)
        truth.load(layer)
        return layer

    def eager() -> torch.nn.Module:
        norm = getattr(torch.nn, f"BatchNorm{suffix}")(shape[1])
        if kind.residual:
            return ready(_AddReLU(norm))
        if kind.relu:
            dropout = [torch.nn.Dropout(kind.drop)] if kind.drop else []
            return ready(torch.nn.Sequential(norm, torch.nn.ReLU(inplace=True), *dropout))
        return ready(norm)

    def ours(backend: str | None) -> torch.nn.Module:
        if kind.relu:
            layer = getattr(nn, f"BatchNormAct{suffix}")
            return ready(layer(shape[1], drop=kind.drop, backend=backend))
        return ready(getattr(nn, f"BatchNorm{suffix}")(shape[1], backend=backend))

    return Makers(eager, ours)


def _contender(way: Way, truth: Truth, direction: str, inputs: Inputs) -> Contender:
    layer = way.function
    of = calls(layer, inputs, tuple(layer.parameters()))
    drop = truth.kind.drop
    scale = rate(drop)[1] if way.ours else 1 / (1 - drop)
    name = f"{truth.kind.op}, {way.name}"

    def check() -> None:
        truth.reset(layer)
        y = of.forward(0)
        truth.check_output(name, y, scale)
        truth.check_statistics(name, layer)
        if direction == BOTH:
            y, *gradients = of.both(0)
            truth.check_gradients(name, y, inputs.grads[0], gradients, scale)
        elif direction == BACKWARD:
            y, gradients = of.outputs()[0], of.backward(0)
            truth.check_gradients(name, y, inputs.grads[0], gradients, scale)

    return Contender(way.name, of.of(direction), check, way.within, way.may_fail)


class Truth:
    """What a layer must compute from x and, where the kind has one, a residual, in float64.

    Behind relu or dropout, zeros in the layer's own output tell which elements it closed or
    dropped. Next to zero roundings decide that for relu; for dropout the mask decides it.
    """

    def __init__(
        self, kind: Kind, dtype: torch.dtype, x: Tensor, residual: Tensor | None = None
    ) -> None:
        self.kind = kind
        self._inputs = (x,) if residual is None else (x, residual)
        compute = torch.promote_types(dtype, torch.float32)
        options = {"dtype": compute, "device": x.device}
        self.weight, self._variance = (torch.rand(x.shape[1], **options) + 0.5 for _ in range(2))
        self.bias, self._mean = (torch.randn(x.shape[1], **options) for _ in range(2))
        # Errors of values around 1, of sums over M values divided by sqrt(M), and of statistics.
        # PyTorch rounds 16-bit values after each layer, and its float sums of 200,000 values are
        # off by up to 5e-5.
        sums = 1024 * torch.finfo(compute).eps
        self._allowed = 8 * torch.finfo(dtype).eps if dtype.itemsize == 2 else sums
        self._allowed_statistics = sums

    @torch.no_grad()
    def load(self, layer: torch.nn.Module) -> None:
        """Gives a layer this object's parameters and statistics."""
        norm = _norm(layer)
        norm.weight.copy_(self.weight)
        norm.bias.copy_(self.bias)
        self.reset(layer)

    @torch.no_grad()
    def reset(self, layer: torch.nn.Module) -> None:
        """Puts a layer's statistics back; parameters stay untouched, since graphs hold them."""
        norm = _norm(layer)
        norm.running_mean.copy_(self._mean)
        norm.running_var.copy_(self._variance)
        norm.num_batches_tracked.zero_()

    @functools.cached_property
    def _count(self) -> int:
        return self._inputs[0].numel() // self._inputs[0].shape[1]

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of what is normalised, [C]."""
        if not self.kind.training:
            return self._mean.double(), self._variance.double()
        x = self._inputs[0]
        mean = _sums(Tensor.double, x) / self._count
        squares = _sums(lambda x: (x.double() - per_channel(mean, x)).square(), x)
        return mean, squares / self._count

    @functools.cached_property
    def _invstd(self) -> Tensor:
        return (self._statistics[1] + _EPS).rsqrt()

    def _normalised(self, x: Tensor) -> Tensor:
        shifted = x.double() - per_channel(self._statistics[0], x)
        return shifted * per_channel(self._invstd, x)

    def _preactivation(self, x: Tensor, *residual: Tensor) -> Tensor:
        z = self._normalised(x) * per_channel(self.weight, x) + per_channel(self.bias, x)
        return z + residual[0].double() if residual else z

    def check_output(self, name: str, y: Tensor, scale: float) -> None:
        """Raises WrongValues unless y is right; `scale` is dropout's, of what was kept."""
        kind, sources = self.kind, (y, *self._inputs)

        def expected(y: Tensor, *inputs: Tensor) -> Tensor:
            z = self._preactivation(*inputs)
            z = z.relu() * scale if kind.relu else z
            return torch.where(y == 0, 0.0, z) if kind.drop else z

        if kind.drop:
            dropped = count = 0
            with torch.no_grad():
                for part, *inputs in parts(*sources):
                    passed = self._preactivation(*inputs) > self._allowed
                    dropped, count = dropped + (passed & (part == 0)).sum(), count + passed.sum()
            check_share(name, int(dropped), int(count), kind.drop)
        compare(f"{name}: output", y, expected, sources, self._allowed, floor=1.0)

    def check_statistics(self, name: str, layer: torch.nn.Module) -> None:
        """Raises WrongValues unless one call after `reset` moved the running statistics right."""
        norm, count = _norm(layer), self._count
        mean, variance = self._statistics
        share = norm.momentum if self.kind.training else 0.0
        for what, actual, before, batch in (
            ("mean", norm.running_mean, self._mean, mean),
            ("variance", norm.running_var, self._variance, variance * count / (count - 1)),
        ):
            compare(
                f"{name}: running {what}",
                actual,
                lambda before, batch: (1 - share) * before.double() + share * batch,
                (before, batch),
                self._allowed_statistics,
                floor=1.0,
            )
        if (batches := int(norm.num_batches_tracked)) != self.kind.training:
            raise WrongValues(f"{name}: one call counted as {batches} batches")

    def check_gradients(
        self, name: str, y: Tensor, g: Tensor, gradients: Sequence[Tensor], scale: float
    ) -> None:
        """Raises WrongValues unless these are the gradients of inputs, weight and bias."""
        kind, count, x = self.kind, self._count, self._inputs[0]

        def behind(y: Tensor, g: Tensor) -> Tensor:
            return torch.where(y == 0, 0.0, g.double() * scale) if kind.relu else g.double()

        y = y.detach()
        sums = _sums(behind, y, g)
        projections = _sums(lambda y, g, x: behind(y, g) * self._normalised(x), y, g, x)

        def grad_input(y: Tensor, g: Tensor, x: Tensor) -> Tensor:
            d = behind(y, g) - per_channel(sums / count, x)
            d = d - self._normalised(x) * per_channel(projections / count, x)
            return d * per_channel(self.weight * self._invstd, x)

        grad_x, *grad_residual, grad_weight, grad_bias = gradients
        allowed = self._allowed
        compare(f"{name}: gradient of x", grad_x, grad_input, (y, g, x), allowed, floor=1.0)
        for grad in grad_residual:
            compare(f"{name}: gradient of the residual", grad, behind, (y, g), allowed, floor=1.0)
        for what, grad, value in (("weight", grad_weight, projections), ("bias", grad_bias, sums)):
            compare(
                f"{name}: gradient of {what}",
                grad,
                lambda value: value,
                (value,),
                allowed,
                floor=count**0.5,
            )


def _norm(layer: torch.nn.Module) -> torch.nn.Module:
    """The BatchNorm in a layer, compiled ones included."""
    return next(m for m in layer.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))


def _sums(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The sums over each channel, [C], of a function of tensors, computed in parts."""
    with torch.no_grad():
        total: Tensor | float = 0.0
        for part in parts(*tensors):
            values = function(*part)
            total = total + values.sum([d for d in range(values.dim()) if d != 1])
    return total
