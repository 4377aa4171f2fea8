"""Benchmarks of dropout and channel dropout.

Forward reads x and writes y, backward reads the gradient and writes another: 2 * sizeof(dtype)
bytes an element either way. The mask is drawn again, never read.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends, nn
from .. import functional as fused
from ..reference.dropout import rate
from ._measure import COMPILE, EAGER, Case, Contender, Goal, Scope, Skipped, WrongValues

P = 0.1

_MIB = 2**20
_CHANNELS = (64, 64, 56, 56)  # N, C, H, W of a ResNet's first stage
_REFERENCE_UP_TO = _MIB  # bytes: it is there to be read, not to be fast
_ISAS = ("baseline", "avx2", "avx512")  # rising
_CHUNK = 2**24  # elements that a check looks at in one go

_KEPT = Goal("native", "keeps 16 bytes for backward", "kept_bytes", 16)
_HOST_CPU = Goal("native", "at most 1.5 of nn.Dropout's time", "time_over_eager", 1.5)
_HOST_GPU = Goal("native", "at most 1.3 of eager's time", "time_over_eager", 1.3)
_CPU_FP32 = Goal("native", "at most 0.85 of copy_'s time", "time_over_copy", 0.85)
_CPU_BF16 = Goal("native", "at most 1.3 of copy_'s time", "time_over_copy", 1.3)
_CPU_EAGER = Goal("native", "at least 50 times eager's speed", "speedup_over_eager", 50, True)
_GPU = (
    Goal("native", "at least 0.92 of copy bandwidth", "share_of_copy", 0.92, True),
    Goal("native", "ahead of eager", "speedup_over_eager", 1, True),
    Goal("native", "ahead of torch.compile", "speedup_over_compile", 1, True),
)


def cases(scope: Scope) -> list[Case]:
    """Small calls, elements by size, and channels in both layouts; each forward and backward."""
    result = []
    host = _HOST_GPU if scope.device.type == "cuda" else _HOST_CPU
    for direction, requires_grad in (("forward", False), ("forward", True), ("backward", True)):
        goals = (host,) if direction == "forward" else ()
        case = functools.partial(_case, "dropout", direction, torch.float32, (16,), "contiguous")
        result.append(case(scope, requires_grad=requires_grad, host=True, goals=goals))
    for size in _sizes(scope.device):
        for dtype in scope.dtypes:
            for direction in ("forward", "backward"):
                goals = _goals(scope.device, direction, dtype, size)
                shape = (size // dtype.itemsize,)
                result.append(
                    _case("dropout", direction, dtype, shape, "contiguous", scope, goals=goals)
                )
    for dtype in scope.dtypes if scope.everything else scope.dtypes[:1]:
        for layout in ("contiguous", "channels_last"):
            for direction in ("forward", "backward"):
                result.append(_case("dropout2d", direction, dtype, _CHANNELS, layout, scope))
    return result


def _sizes(device: torch.device) -> list[int]:
    """Bytes of an input; those that goals are about come first where time may be short."""
    if device.type != "cuda":
        return [_MIB, 64 * _MIB]
    # Every contender's outputs, saved masks and gradients are there at the same time.
    memory = torch.cuda.get_device_properties(device).total_memory
    return [s for s in (64 * _MIB, 256 * _MIB, 1024 * _MIB, _MIB) if 16 * s <= memory]


def _goals(device: torch.device, direction: str, dtype: torch.dtype, size: int) -> tuple[Goal, ...]:
    if size < 64 * _MIB or dtype not in (torch.float32, torch.bfloat16):
        return ()
    kept = (_KEPT,) if direction == "forward" else ()
    if device.type == "cuda":
        return (*_GPU, *kept)
    if dtype == torch.bfloat16:
        return (_CPU_BF16, *kept)
    return (_CPU_FP32, *((_CPU_EAGER,) if direction == "forward" else ()), *kept)


def _case(
    op: str,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    scope: Scope,
    *,
    requires_grad: bool = True,
    host: bool = False,
    goals: tuple[Goal, ...] = (),
) -> Case:
    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        inputs = [_input(shape, dtype, layout, device, requires_grad) for _ in range(pool)]
        count = pool if direction == "backward" else 0
        grads = [_input(shape, dtype, layout, device, False) for _ in range(count)]
        ways = _modules(op) if host else _functions(op)
        return [
            way if isinstance(way, Skipped) else _contender(*way, op, direction, inputs, grads)
            for way in _ways(ways, device, dtype, shape, scope.compiled)
        ]

    return Case(
        op=op,
        direction=direction,
        dtype=dtype,
        shape=shape,
        bytes=2 * math.prod(shape) * dtype.itemsize,
        prepare=prepare,
        layout=layout,
        requires_grad=requires_grad,
        host=host,
        goals=goals,
    )


def _input(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device, grad: bool
) -> Tensor:
    # In [1, 2): a zero in the output is then a dropped element, and nothing else.
    x = torch.rand(shape, dtype=dtype, device=device).mul_(0.99).add_(1)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


Function = Callable[[Tensor], Tensor]
# Name, function, its scale of kept elements, the context it runs in, and whether it may fail.
Way = tuple[str, Function, float, Callable[[], Any], bool]


def _functions(op: str) -> tuple[Function, Callable[[str | None], Function]]:
    """Eager's function and, by backend, ours."""
    eager, ours = getattr(F, op), getattr(fused, op)
    return (
        lambda x: eager(x, P, True),
        lambda backend: lambda x: ours(x, P, True, backend=backend),
    )


def _modules(op: str) -> tuple[Function, Callable[[str | None], Function]]:
    """The same as layers, which is what a small call's time on the host is about."""
    name = {"dropout": "Dropout", "dropout2d": "Dropout2d"}[op]
    return getattr(torch.nn, name)(P), lambda backend: getattr(nn, name)(P, backend=backend)


def _ways(
    functions: tuple[Function, Callable[[str | None], Function]],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    compiled: bool,
) -> Iterator[Way | Skipped]:
    eager, ours = functions
    scale = rate(P)[1]
    with backends.backend(None):
        automatic = backends.choose("dropout", device.type, dtype)
    forced = backends.forced_by() is not None
    for name in backends.NAMES:
        if name == "reference" and math.prod(shape) * dtype.itemsize > _REFERENCE_UP_TO:
            continue
        reason = backends.why_not(name, device.type, dtype)
        if reason is None and name == "triton" and device.type != "cuda":
            reason = "triton's interpreter is not made for speed"
        if reason is not None:
            yield Skipped(name, reason)
            continue
        # The one that is used anyway is called as users call it: naming it takes a check more.
        function = ours(None if name == automatic and not forced else name)
        yield name, function, scale, contextlib.nullcontext, False
        if name == "native" and device.type == "cpu":
            for isa in _lower_isas():
                yield f"native[{isa}]", function, scale, functools.partial(_isa, isa), False
    yield EAGER, eager, 1 / (1 - P), contextlib.nullcontext, False
    if compiled:
        torch.compiler.reset()  # or torch stops compiling a function it has compiled a few times
        function = torch.compile(eager, dynamic=False, fullgraph=True)
        yield COMPILE, function, 1 / (1 - P), _repeatable_backward, True
    else:
        yield Skipped(COMPILE, "left out: compiling takes seconds a benchmark")


def _lower_isas() -> tuple[str, ...]:
    """The instruction sets below the one that the CPU kernels use, the higher ones first."""
    from .. import _C

    return _ISAS[: _ISAS.index(_C.isa())][::-1]


@contextlib.contextmanager
def _isa(name: str) -> Iterator[None]:
    from .. import _C

    previous = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(previous)


def _repeatable_backward() -> Any:
    """Compiled backwards may otherwise reuse what the forward saved, and refuse to run twice."""
    from torch._functorch import config

    return config.patch(donated_buffer=False)


def _contender(
    name: str,
    function: Function,
    scale: float,
    within: Callable[[], Any],
    may_fail: bool,
    op: str,
    direction: str,
    inputs: list[Tensor],
    grads: list[Tensor],
) -> Contender:
    pool = len(inputs)

    def forward(i: int) -> Tensor:
        return function(inputs[i % pool])

    @functools.cache
    def outputs() -> list[Tensor]:
        return [function(x) for x in inputs]

    def backward(i: int) -> tuple[Tensor, ...]:
        i %= pool
        return torch.autograd.grad(outputs()[i], inputs[i], grads[i], retain_graph=True)

    def check() -> None:
        y = outputs()[0] if direction == "backward" else forward(0)
        check_forward(f"{op}, {name}", op, inputs[0], y, scale)
        if direction == "backward":
            check_backward(f"{op}, {name}", y, grads[0], backward(0)[0], scale)

    return Contender(name, forward if direction == "forward" else backward, check, within, may_fail)


def check_forward(name: str, op: str, x: Tensor, y: Tensor, scale: float) -> None:
    """Raises WrongValues unless y is x with a share P of it dropped and the rest scaled.

    The share has to be within 5 standard deviations; x must hold no zeros. Channel dropout has to
    drop whole channels.
    """
    x, y = x.detach(), y.detach()
    dropped = y == 0
    if op != "dropout":
        channels = dropped.flatten(2)
        dropped = channels.all(2)
        if not torch.equal(dropped, channels.any(2)):
            raise WrongValues(f"{name}: a channel is dropped in part")
    count = dropped.numel()
    share = int(dropped.sum()) / count
    if abs(share - P) > 5 * math.sqrt(P * (1 - P) / count):
        raise WrongValues(f"{name}: {share:.4%} of {count} were dropped, p is {P:.0%}")
    _compare(f"{name}: output", y, x, y, scale)


def check_backward(name: str, y: Tensor, grad_output: Tensor, grad: Tensor, scale: float) -> None:
    """Raises WrongValues unless grad is grad_output with the mask that y shows."""
    _compare(f"{name}: gradient", grad, grad_output, y.detach(), scale)


def _compare(name: str, actual: Tensor, source: Tensor, mask: Tensor, scale: float) -> None:
    """Raises unless actual = source * scale where mask is not 0, and 0 elsewhere."""
    # Two roundings: PyTorch rounds the scale to the dtype before it multiplies.
    allowed = torch.finfo(source.dtype).eps * 1.01
    parts = (t.flatten().split(_CHUNK) for t in (actual, source, mask))
    for got, s, m in zip(*parts, strict=True):
        expected = torch.where(m != 0, s.double() * scale, 0.0)
        error = ((got.double() - expected).abs() / expected.abs().clamp(min=1e-30)).max()
        if not error <= allowed:
            raise WrongValues(f"{name} is off by {float(error):.2e}, allowed {allowed:.2e}")
