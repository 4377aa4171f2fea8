"""BatchNorm's inputs: channels of few and of many values, every layout, and the chain behind it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .. import functional as F
from .._activation import NUMBERS
from ..ops import _batch_norm_ops as ops
from ..reference.batch_norm import activate
from ..reference.dropout import dropout as reference_dropout
from . import Case
from .dropout import P, _channels_last, _contiguous, _misaligned, _strided, _transposed, state

EPS = 1e-5
SLOPE = 0.2  # not the default, so that it cannot be lost on the way


def _inputs(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], affine: bool, residual: bool
) -> Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]:
    """(input, weight, bias, residual), of which the last three may be left out."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        tensors = [layout((2 * draw(*shape) + 0.7).to(dtype).to(device))]
        if affine:
            tensors += [(draw(shape[1]) + s).to(dtype).to(device) for s in (1.0, 0.0)]
        if residual:
            tensors.append(layout(draw(*shape).to(dtype).to(device)))
        return tuple(tensors)

    return make


def _frozen(x: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics for an input like x."""
    steps = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64, device=x.device)
    return (steps - 0.9).to(x.dtype), steps.square().to(x.dtype)


def _split(tensors: tuple[Tensor, ...], affine: bool) -> tuple[Any, ...]:
    """(weight, bias, residual) of what comes after the input."""
    weight, bias = tensors[:2] if affine else (None, None)
    rest = tensors[2 if affine else 0 :]
    return weight, bias, rest[0] if rest else None


def _case(
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor] = _contiguous,
    *,
    activation: str | None = None,
    residual: bool = False,
    drop: float = 0.0,
    affine: bool = True,
    training: bool = True,
    element_offset: int = 0,
    twice: bool = False,
) -> Case:
    """`twice`: what is called is the gradient by the input; its gradients are second ones."""

    def function(x: Tensor, *tensors: Tensor, backend: str | None = None) -> Tensor:
        weight, bias, added = _split(tensors, affine)
        statistics = (None, None) if training else _frozen(x)
        return F.batch_norm_act(
            *(x, *statistics, weight, bias, added, training),
            activation=activation,
            negative_slope=SLOPE,
            drop=drop,
            rng_state=state(),
            element_offset=element_offset,
            backend=backend,
        )

    def oracle(x: Tensor, *tensors: Tensor) -> Tensor:
        weight, bias, added = _split(tensors, affine)
        statistics = (None, None) if training else _frozen(x)
        y = TF.batch_norm(x, *statistics, weight, bias, training)
        y = y if added is None else y + added
        y = activate(y, NUMBERS[activation], SLOPE)
        if drop and training:
            ones = torch.ones_like(x if torch.ops.aten.is_non_overlapping_and_dense(x) else y)
            y = y * reference_dropout(ones, drop, state(x.device), element_offset)
        return y

    def gradient(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor, **options: Any) -> Tensor:
            with torch.enable_grad():
                tensors = tuple(t if t.requires_grad else t.requires_grad_() for t in tensors)
                y = forward(*tensors, **options)
                g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)
                g = g.sin().to(y.dtype).view(y.shape)
                gradient = torch.autograd.grad(y, tensors[0], g, create_graph=True)[0]
                # The bias is no part of it; its gradient shall be zero, not missing.
                return gradient + 0 * sum(t.sum() for t in tensors)

        return call

    words = ["x".join(map(str, shape)), layout.__name__[1:], "" if affine else "no affine"]
    words += [activation or "", "residual" if residual else "", "drop" if drop else ""]
    words += ["" if training else "frozen", f"offset {element_offset}" if element_offset else ""]
    name = "batch_norm" if training else "batch_norm_inference"
    return Case(
        op="batch_norm_backward" if twice else name,
        name=" ".join(word for word in words if word),
        inputs=_inputs(shape, layout, affine, residual),
        function=gradient(function) if twice else function,
        oracle=gradient(oracle) if twice else oracle,
        small=torch.Size(shape).numel() <= 2100,
        exact=False,
    )


def _tracked(
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor] = _contiguous,
    momentum: float | None = 0.1,
    **options: Any,
) -> Case:
    """In training with running statistics, which are returned behind the output. Without momentum
    it is the fourth batch of an average."""

    def moved(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        return torch.cat([call(mean, var).flatten(), mean, var])

    def function(x: Tensor, *affine: Tensor, backend: str | None = None) -> Tensor:
        count = torch.tensor(3, device=x.device) if momentum is None else None
        given = {"num_batches_tracked": count, "rng_state": state(), "backend": backend}
        chain = {"activation": None, "negative_slope": SLOPE, **options, **given}
        return moved(lambda *s: F.batch_norm_act(x, *s, *affine, None, True, momentum, **chain), x)

    def oracle(x: Tensor, *affine: Tensor) -> Tensor:
        share = 0.25 if momentum is None else momentum
        activation = NUMBERS[options.get("activation")]
        return moved(
            lambda *s: activate(TF.batch_norm(x, *s, *affine, True, share), activation, SLOPE), x
        )

    words = ["x".join(map(str, shape)), layout.__name__[1:], f"momentum {momentum}"]
    return Case(
        op="batch_norm",
        name=" ".join([*words, *map(str, options.values())]),
        inputs=_inputs(shape, layout, True, False),
        function=function,
        oracle=oracle,
        small=torch.Size(shape).numel() <= 2100,
        exact=False,
    )


def _of_each_rank(
    x: Tensor, tensors: tuple[Tensor, ...], activation: str | None, drop: float, backend: str | None
) -> Iterator[tuple[Any, ...]]:
    """A batch as three ranks have it, one of them nothing: what each takes its backward by, which
    is (input, weight, bias, residual, mean, invstd, gate), and its output."""
    weight, bias, added = _split(tensors, True)
    cuts = (0, len(x) // 3 + 1, len(x), len(x))
    parts = [x[a:b] for a, b in itertools.pairwise(cuts)]
    where = (x.device, x.dtype, backend)
    gathered = torch.stack([ops.MOMENTS.overload(*where)(part) for part in parts])
    for part, first in zip(parts, cuts, strict=False):
        residual = None if added is None else added[first : first + len(part)]
        values = (part, weight, bias, residual)
        how = ops.Training(
            *([], None, EPS, NUMBERS[activation], SLOPE, drop, state() if drop else None),
            *(first * x[0].numel(), True, gathered),
        )
        y, mean, invstd, gate = ops.TRAINING.overload(*where)(*values, *how)
        yield (*values, mean, invstd, gate if gate.numel() or drop else None), y


def _across(
    op: str,
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor] = _contiguous,
    activation: str | None = None,
    residual: bool = False,
    drop: float = 0.0,
) -> Case:
    """What the ops for several ranks make of their batches is what one makes of all of them:
    outputs, or gradients by the input, or sums of the gradient."""
    number = NUMBERS[activation]

    @torch.no_grad()
    def function(x: Tensor, *tensors: Tensor, backend: str | None = None) -> Tensor:
        ranks = list(_of_each_rank(x, tensors, activation, drop, backend))
        outputs = torch.cat([y for _, y in ranks])
        if op == "batch_norm":
            return outputs
        given = []
        for (part, *values), g in zip((r[0] for r in ranks), _like(outputs, ranks), strict=True):
            given.append((g, part, *values))
        where = (x.device, x.dtype, backend)
        sums = [ops.SUMS.overload(*where)(*values, number, SLOPE, drop) for values in given]
        total = torch.stack(sums).sum(0)
        if op == "batch_norm_sums":
            return total
        how = (None, 0, True, number, SLOPE, drop, True, False, False, total)
        return torch.cat([ops.BACKWARD.overload(*where)(*v, *how)[0] for v in given])

    def oracle(x: Tensor, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, *tensors)]
            weight, bias, added = _split(tuple(leaves[1:]), True)
            y = TF.batch_norm(leaves[0], None, None, weight, bias, True)
            y = activate(y if added is None else y + added, number, SLOPE)
            if drop:
                y = y * reference_dropout(torch.ones_like(x), drop, state(x.device))
            g = torch.autograd.grad(y, leaves[:3], _weights(y))
        if op == "batch_norm":
            return y.detach()
        if op == "batch_norm_backward":
            return g[0]
        return torch.cat([g[2], g[1], g[1].new_tensor([x.numel() // x.shape[1]])])

    words = ["x".join(map(str, shape)), layout.__name__[1:], "of ranks", activation or ""]
    words += ["residual" if residual else "", "drop" if drop else ""]
    return Case(
        op=op,
        name=" ".join(word for word in words if word),
        inputs=_inputs(shape, layout, True, residual),
        function=function,
        oracle=oracle,
        small=torch.Size(shape).numel() <= 2100,
        exact=False,
        differentiable=False,
    )


def _weights(y: Tensor) -> Tensor:
    """A gradient for an output."""
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).sin().to(y.dtype)
    return torch.empty_like(y).copy_(g.view(y.shape))


def _like(outputs: Tensor, ranks: list[Any]) -> list[Tensor]:
    """The gradient of all outputs, as each rank has its part of it."""
    parts = _weights(outputs).split([len(y) for _, y in ranks])
    return [torch.empty_like(y).copy_(g) for g, (_, y) in zip(parts, ranks, strict=True)]


def _moments(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor] = _contiguous) -> Case:
    def function(x: Tensor, backend: str | None = None) -> Tensor:
        return ops.MOMENTS.overload(x.device, x.dtype, backend)(x)

    def oracle(x: Tensor) -> Tensor:
        dims, count = [d for d in range(x.dim()) if d != 1], x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, dims, correction=0)
        sizes = torch.full_like(mean, count)
        return torch.stack([sizes, mean, torch.zeros_like(mean), variance * count])

    return Case(
        op="batch_norm_moments",
        name=f"{'x'.join(map(str, shape))} {layout.__name__[1:]}",
        inputs=_inputs(shape, layout, False, False),
        function=function,
        oracle=oracle,
        small=torch.Size(shape).numel() <= 2100,
        exact=False,
        differentiable=False,
    )


CASES = [
    _case((2, 1)),
    _case((3, 2, 1)),
    _case((6, 3)),
    _case((130, 2)),
    _case((70, 30), affine=False),
    _case((2, 3, 7)),
    _case((1, 5, 129)),
    _case((3, 70, 2)),
    _case((3, 70, 2), _channels_last),
    _case((4, 3, 5, 5)),
    _case((4, 3, 5, 5), _channels_last),
    _case((4, 3, 5, 5), _strided),
    _case((4, 3, 5, 5), _misaligned),
    _case((4, 3, 5, 5), _transposed),
    _case((2, 2, 3, 3, 3), affine=False),
    _case((2, 2, 3, 3, 3), _channels_last),
    _case((2, 2, 17, 19)),
    # Several units of work, and edges of theirs: for each way that a tensor is cut.
    _case((3, 5, 300)),
    _case((5, 2, 70_001)),
    _case((16, 64, 29, 31)),
    _case((16, 64, 29, 31), _channels_last),
    _case((64, 30, 7, 7)),
    _case((70, 2050, 3)),
    _case((70, 2050, 3), _channels_last),
    _case((5000, 3)),
    _case((300, 1030)),
]
CASES += [
    _case(shape, layout, activation=activation, residual=residual, drop=drop)
    for shape, layout in (((4, 6, 5, 3), _contiguous), ((4, 6, 5, 3), _channels_last))
    for activation in NUMBERS
    for residual in (False, True)
    for drop in (0.0, P)
    if activation or residual or drop
]
CASES += [
    _case(shape, layout, activation=activation, residual=residual, drop=drop)
    for shape, layout in (
        ((5, 2, 7001), _contiguous),
        ((30, 19, 17, 7), _contiguous),
        ((30, 19, 17, 7), _channels_last),
        ((500, 130), _contiguous),
    )
    for activation, residual, drop in (
        ("relu", True, 0.0),
        ("relu", False, P),
        ("leaky_relu", True, P),
        ("gelu", True, P),
    )
]
# A part of a larger batch: it begins within one of the mask's groups, and with one.
CASES += [
    _case(shape, layout, drop=P, activation="relu", element_offset=offset)
    for shape, layout in (
        ((4, 6, 5, 3), _contiguous),
        ((4, 6, 5, 3), _channels_last),
        ((3, 16, 24), _contiguous),
        ((3, 16, 24), _channels_last),
        ((30, 19, 17, 7), _contiguous),
        ((30, 19, 17, 7), _channels_last),
        ((5, 2, 7001), _contiguous),
    )
    for offset in (2**40 + 13, 7 * 4096)
]
CASES += [
    _tracked(shape, layout, momentum, activation=activation)
    for shape, layout in (
        ((4, 3, 5, 5), _contiguous),
        ((4, 3, 5, 5), _channels_last),
        ((130, 2), _contiguous),
        ((5, 2, 7001), _contiguous),
        ((30, 19, 17, 7), _channels_last),
        ((3, 20_011), _contiguous),
    )
    for momentum, activation in ((0.1, None), (None, "gelu"))
]
CASES += [
    _case((4, 3, 5, 5), training=False),
    _case((4, 3, 5, 5), _channels_last, training=False, affine=False),
    _case((1, 3), training=False),
    _case((16, 64, 29, 31), training=False),
    _case((4, 6, 5, 3), training=False, activation="relu", residual=True),
    _case((4, 6, 5, 3), _channels_last, training=False, activation="silu", residual=True),
    _case((4, 6, 5, 3), training=False, activation="gelu", drop=P),
    _case((4, 3, 2, 3), twice=True),
    _case((4, 3, 2, 3), _channels_last, twice=True, activation="silu", residual=True, drop=P),
    _case((4, 3, 2, 3), twice=True, activation="relu", residual=True),
    _case((4, 3, 2, 3), twice=True, activation="leaky_relu", drop=P),
    _case((4, 3, 2, 3), twice=True, activation="silu", drop=P, element_offset=12),
]
CASES += [
    _moments(shape, layout)
    for shape, layout in (
        ((1, 3), _contiguous),
        ((130, 2), _contiguous),
        ((4, 3, 5, 5), _contiguous),
        ((4, 3, 5, 5), _channels_last),
        ((5, 2, 7001), _contiguous),
        ((30, 19, 17, 7), _channels_last),
    )
]
CASES += [
    _across(op, shape, layout, activation, residual, drop)
    for op in ("batch_norm", "batch_norm_sums", "batch_norm_backward")
    for shape, layout, activation, residual, drop in (
        ((6, 3), _contiguous, None, False, 0.0),
        ((4, 6, 5, 3), _contiguous, "relu", True, 0.0),
        ((4, 6, 5, 3), _channels_last, "silu", True, P),
        ((4, 3, 8, 3), _contiguous, "leaky_relu", False, P),
        ((30, 19, 17, 7), _contiguous, "gelu", False, 0.0),
        ((30, 19, 17, 7), _channels_last, None, False, P),
        ((5, 2, 7001), _contiguous, "relu", True, P),
    )
]
