"""Benchmarks of mixup, of floats and of bytes that it normalises, and of CutMix.

timm's mixup is a contender. Its CutMix is none, since it pastes one box for the whole batch.

Bytes an element, s = sizeof(dtype): forward reads x, s or 1, and writes y, s; backward reads the
gradient and writes another, 2 s. That each sample is read again as a partner is not counted. On
the CPU `Tensor.copy_` moves three transfers for two that are counted, since it reads what it
overwrites: the floor is 2/3 of its time where the result is streamed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional as fused
from ._measure import BOTH, COMPILE, FORWARD, Benchmark, Contender, Goal, Scope, Skipped, faster
from ._peers import TIMM, peer
from ._values import compare
from ._ways import Inputs, Makers, Way, calls, in_layout, ways

LAM = 0.3
# ImageNet's, of values in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_BATCH = (128, 3, 224, 224)
_TYPICAL = (128, 3, 32, 32)
_SMALL = (8, 3, 8, 8)
_CLASSES = 10  # of the targets that timm makes besides


# The copy is of as many bytes as are moved, five eighths of those of a copy of the result.
_COPY = Goal(
    "native", "at most 0.96 of copy_'s time: 0.6 of that for the result", "time_over_copy", 0.96
)


class Kind(NamedTuple):
    """What becomes of a batch."""

    variant: str = ""
    from_bytes: bool = False  # normalised as well
    boxes: bool = False  # pasted instead of blended, each sample a box of its own


MIXED = Kind()
BYTES = Kind("from uint8", from_bytes=True)
PASTED = Kind("cutmix", boxes=True)
_KINDS = (MIXED, BYTES, PASTED)


def cases(scope: Scope) -> list[Benchmark]:
    """A batch of images, each kind of batch without a gradient, and mixup with one; then smaller
    batches."""
    forward = [(kind, FORWARD) for kind in _KINDS]
    points = [*forward, (MIXED, BOTH)]
    result = []
    for dtype in scope.brief:
        for layout in ("contiguous", "channels_last") if scope.everything else ("contiguous",):
            result += [_case(scope, *point, dtype, _BATCH, layout) for point in points]
    for dtype in scope.dtypes:
        smaller = points if scope.everything else forward
        result += [_case(scope, *point, dtype, _TYPICAL) for point in smaller]
    for dtype in scope.of_small_calls:
        result += [_case(scope, *point, dtype, _SMALL, host=True) for point in forward]
    return result


def sized(scope: Scope, elements: int) -> list[Benchmark]:
    """Points of growth curves: 64 square images of one channel; `elements` is a power of four."""
    side = math.isqrt(elements // 64)
    return [_case(scope, MIXED, FORWARD, torch.float32, (64, 1, side, side))]


def _goals(
    device: torch.device,
    kind: Kind,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
) -> tuple[Goal, ...]:
    if (direction, dtype, shape, layout) != (FORWARD, torch.float32, _BATCH, "contiguous"):
        return ()
    if kind is MIXED:
        return (faster(4), faster(1.3, COMPILE))
    if kind is not BYTES:
        return ()
    return (faster(12), faster(1.4, COMPILE), *((_COPY,) if device.type == "cpu" else ()))


def _case(
    scope: Scope,
    kind: Kind,
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    *,
    host: bool = False,
) -> Benchmark:
    requires_grad = direction == BOTH
    count = math.prod(shape)
    transfers = 2 * dtype.itemsize if requires_grad else 0  # of the backward
    transfers += dtype.itemsize + (1 if kind.from_bytes else dtype.itemsize)
    for_timm = kind is MIXED and not requires_grad and shape[0] % 2 == 0

    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        arguments = []
        for _ in range(pool):
            x = in_layout(_images(kind, shape, dtype, device), layout).requires_grad_(requires_grad)
            boxes = (_boxes(shape, device),) if kind.boxes else ()
            arguments.append((x, torch.randperm(shape[0], device=device), *boxes))
        grads = [
            in_layout(torch.randn(shape, dtype=dtype, device=device), layout)
            for _ in range(pool if requires_grad else 0)
        ]
        inputs = Inputs(arguments, [of_input[:1] for of_input in arguments], grads)
        makers, size = _makers(kind, dtype, device), count * dtype.itemsize
        entries = [
            way if isinstance(way, Skipped) else _contender(way, kind, direction, dtype, inputs)
            for way in ways(
                "mixup",
                makers,
                direction=direction,
                device=device,
                dtype=dtype,
                size=size,
                compiled=scope.compiled,
            )
        ]
        return [*entries, _timm(inputs)] if for_timm else entries

    return Benchmark(
        op="mixup",
        variant=kind.variant,
        direction=direction,
        dtype=dtype,
        shape=shape,
        bytes=transfers * count,
        prepare=prepare,
        layout=layout,
        requires_grad=requires_grad,
        host=host,
        peers=(TIMM,) if for_timm else (),
        goals=_goals(scope.device, kind, direction, dtype, shape, layout),
    )


def _images(kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if kind.from_bytes:
        return torch.randint(256, shape, dtype=torch.uint8, device=device)
    return torch.randn(shape, dtype=dtype, device=device)


def _boxes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(N, 4): with corners anywhere, a ninth of the image on the average."""
    height, width = shape[2:]
    columns, rows = (
        torch.randint(size + 1, (shape[0], 2), device=device).sort(1).values
        for size in (width, height)
    )
    return torch.stack((columns[:, 0], rows[:, 0], columns[:, 1], rows[:, 1]), 1)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(N, 1, H, W): whether a pixel lies in its image's box."""
    x1, y1, x2, y2 = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    column = torch.arange(width, device=boxes.device)
    row = torch.arange(height, device=boxes.device).unsqueeze(1)
    return (x1 <= column) & (column < x2) & (y1 <= row) & (row < y2)


def _makers(kind: Kind, dtype: torch.dtype, device: torch.device) -> Makers:
    """The functions of images, partners and, where the kind has them, boxes; eager's as one writes
    it, bytes in float32 at least."""
    if kind.boxes:
        # Copies of boxes move less than a mask does, and a GPU would launch each of them.
        eager = _paste if device.type == "cpu" else _select
        return Makers(
            lambda: eager,
            lambda backend: lambda x, index, boxes: fused.cutmix(x, boxes, index, backend=backend),
            compiled=lambda: _select,
        )
    if not kind.from_bytes:
        return Makers(
            lambda: lambda x, index: LAM * x + (1 - LAM) * x[index],
            lambda backend: lambda x, index: fused.mixup(x, LAM, index, backend=backend),
        )
    compute = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(v, dtype=compute, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def convert_and_mix(x: Tensor, index: Tensor) -> Tensor:
        x = x.to(compute) / 255
        x = (x - mean) / std
        return (LAM * x + (1 - LAM) * x[index]).to(dtype)

    options = {"mean": MEAN, "std": STD, "dtype": dtype}
    return Makers(
        lambda: convert_and_mix,
        lambda backend: lambda x, index: fused.mixup(x, LAM, index, backend=backend, **options),
    )


def _paste(x: Tensor, index: Tensor, boxes: Tensor) -> Tensor:
    y = x.clone()
    for n, (partner, box) in enumerate(zip(index.tolist(), boxes.tolist(), strict=True)):
        x1, y1, x2, y2 = box
        y[n, :, y1:y2, x1:x2] = x[partner, :, y1:y2, x1:x2]
    return y


def _select(x: Tensor, index: Tensor, boxes: Tensor) -> Tensor:
    return torch.where(_inside(boxes, x.shape[-2], x.shape[-1]), x[index], x)


def _contender(
    way: Way, kind: Kind, direction: str, dtype: torch.dtype, inputs: Inputs
) -> Contender:
    of = calls(way.function, inputs)
    name = f"{kind.variant or 'mixup'}, {way.name}"

    def check() -> None:
        y, *gradients = of.both(0) if direction == BOTH else (of.forward(0),)
        check_values(name, kind, dtype, inputs.arguments[0], y)
        if gradients:
            check_gradient(name, inputs.arguments[0][1], inputs.grads[0], gradients[0])

    return Contender(way.name, of.of(direction), check, way.within, way.may_fail)


def _timm(inputs: Inputs) -> Contender | Skipped:
    """timm's Mixup of a whole batch, in place. It mixes each image with the one as far from the
    end, by a lambda that it draws for each call, and makes the targets; its time includes that."""
    module = peer(TIMM, "timm", "data/mixup.py")
    if isinstance(module, Skipped):
        return module
    import numpy as np  # which timm's draws by

    mix = module.Mixup(label_smoothing=0.0, num_classes=_CLASSES)
    own = [x.clone() for x, *_ in inputs.arguments]
    count, device = len(own[0]), own[0].device
    labels = torch.arange(count, device=device) % _CLASSES

    def check() -> None:
        # The image of 1 becomes the lambda that this seed leads to.
        state = np.random.get_state()
        try:
            np.random.seed(0)
            pixels = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
            lam = float(mix(pixels, torch.zeros(2, dtype=torch.int64))[0][0])
            np.random.seed(0)
            x = own[0].copy_(inputs.arguments[0][0])
            y, target = mix(x, labels)
        finally:
            np.random.set_state(state)
        check_timm(inputs.arguments[0][0], labels, lam, y, target)

    return Contender(TIMM, lambda i: mix(own[i % len(own)], labels), check, may_fail=True)


def check_timm(x: Tensor, labels: Tensor, lam: float, y: Tensor, target: Tensor) -> None:
    """Raises WrongValues unless y is x and target its labels, mixed with themselves in reverse."""

    def blend(own: Tensor, partner: Tensor) -> Tensor:
        return lam * own.double() + (1 - lam) * partner.double()

    allowed = 4 * torch.finfo(x.dtype).eps
    compare("mixup, timm: output", y, blend, (x, x.flip(0)), allowed, 1.0)
    hot = torch.nn.functional.one_hot(labels, _CLASSES)
    allowed = 4 * torch.finfo(target.dtype).eps
    compare("mixup, timm: target", target, blend, (hot, hot.flip(0)), allowed, 1.0)


def check_values(
    name: str, kind: Kind, dtype: torch.dtype, arguments: tuple[Tensor, ...], y: Tensor
) -> None:
    """Raises WrongValues unless y, of type dtype, is the batch mixed.

    A blend is right to a few roundings of values around 1, and to some more of normalised bytes,
    which are differences of numbers up to 4.4; what is pasted is right to the last bit.
    """
    x, index, *boxes = arguments
    x = x.detach()
    sources = (x, x[index], *boxes)
    allowed = 0.0 if kind.boxes else (16 if kind.from_bytes else 4) * torch.finfo(dtype).eps
    compare(f"{name}: output", y.detach(), functools.partial(_mixed, kind), sources, allowed, 1.0)


def _mixed(kind: Kind, own: Tensor, partner: Tensor, *boxes: Tensor) -> Tensor:
    if kind.boxes:
        inside = _inside(boxes[0], own.shape[-2], own.shape[-1])
        return torch.where(inside, partner.double(), own.double())
    blend = LAM * own.double() + (1 - LAM) * partner.double()
    if kind.from_bytes:
        mean, std = (blend.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        blend = (blend / 255 - mean) / std
    return blend


def check_gradient(name: str, index: Tensor, grad_output: Tensor, gradient: Tensor) -> None:
    """Raises WrongValues unless each image has its own share of the gradient and its receiver's."""
    sources = (grad_output, grad_output[index.argsort()])

    def expected(own: Tensor, given: Tensor) -> Tensor:
        return LAM * own.double() + (1 - LAM) * given.double()

    allowed = 4 * torch.finfo(gradient.dtype).eps
    compare(f"{name}: gradient", gradient, expected, sources, allowed, 1.0)
