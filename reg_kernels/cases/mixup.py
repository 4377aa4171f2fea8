"""Mixup's inputs: batches of every layout and type, and every way to choose partners and shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.mixup import blend
from . import Case, in_place
from .dropout import _channels_last, _contiguous, _misaligned, _strided, _transposed

Layout = Callable[[Tensor], Tensor]


# Shares, partners and boxes of N samples.


def _shares(samples: int) -> Tensor:
    """Samples that are kept and replaced are among them."""
    return torch.tensor([0.3, 1.0, 0.7, 0.0, 0.45])[torch.arange(samples) % 5]


def _half_shares(samples: int) -> Tensor:
    return _shares(samples).bfloat16()


def _one_share(samples: int) -> Tensor:
    return torch.tensor(0.3, dtype=torch.float64)


@torch.compiler.assume_constant_result
def _permuted(samples: int) -> Tensor:
    """Cycles of several lengths."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(20))


def _rolled(samples: int) -> Tensor:
    """One cycle of all."""
    return torch.arange(samples).roll(1)


def _repeated(samples: int) -> Tensor:
    """Some are a partner twice or more, some nobody's."""
    return (torch.arange(samples).square() + 1) % samples


def _one_partner(samples: int) -> Tensor:
    return torch.full((samples,), samples // 2)


def _boxes(samples: int, height: int, width: int) -> Tensor:
    """At the edges and inside, of no rows or columns, and the whole image."""
    h, w = height, width
    kinds = [
        (0, 0, (w + 1) // 2, (h + 1) // 2),
        (w // 2, h // 3, w, h),
        (w // 2, 0, w // 2, h),
        (0, 0, w, h),
        (0, h // 2, w, h // 2),
        (w // 3, h // 2, w // 3 + 1, h),
    ]
    return torch.tensor(kinds)[torch.arange(samples) % len(kinds)]


def _one_box(samples: int, height: int, width: int) -> Tensor:
    return _boxes(2, height, width)[1]


def _values(shape: tuple[int, ...], kind: torch.dtype | None) -> Tensor:
    """What every type holds exactly that the case converts to: bytes, or multiples of 1/8."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    if kind == torch.uint8:
        return torch.randint(256, shape, generator=generator).double()
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (8 * x).round().clamp(-16, 16) / 8 if kind in (torch.float16, torch.bfloat16) else x


def _oracle(
    x: Tensor,
    lam: Tensor | float,
    index: Tensor | None,
    boxes: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """lam x + (1 - lam) partner, the boxes pasted slice by slice."""
    partner = x.flip(0) if index is None else x[index]
    if isinstance(lam, Tensor):
        lam = lam.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    y = lam * x + (1 - lam) * partner
    if boxes is not None:
        for n, (x1, y1, x2, y2) in enumerate(boxes.expand(len(x), 4).tolist()):
            y[n, ..., y1:y2, x1:x2] = partner[n, ..., y1:y2, x1:x2]
    if mean is not None and std is not None:
        channels = (-1, *[1] * (x.dim() - 2))
        y = (y - mean.to(x.dtype).view(channels)) / std.to(x.dtype).view(channels)
    return y


def _case(
    shape: tuple[int, ...],
    layout: Layout = _contiguous,
    *,
    op: str = "mixup",
    lam: float | Callable[[int], Tensor] = 0.3,
    index: Callable[[int], Tensor] | None = None,
    boxes: Callable[[int, int, int], Tensor] | None = None,
    normalise: bool = False,
    source: torch.dtype | None = None,
    result: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Case:
    """
    Args:
        op: "mixup"; "mixup_", in place; or "mixup_backward", the gradient by the input where the
            case's own is the one by the output.
        source: the type of the op's input, if not the case's; values are such as it holds.
        result: the type of its output, likewise.
    """

    def arguments(x: Tensor) -> tuple[Any, ...]:
        """(lam, index, boxes, mean, std) for a batch like x."""
        n = len(x)
        mean = torch.arange(x.shape[1]) / 8 - 0.5 if normalise else None
        std = torch.arange(x.shape[1]) % 3 / 4 + 0.25 if normalise else None
        values = (
            lam(n) if callable(lam) else lam,
            None if index is None else index(n),
            None if boxes is None else boxes(n, *x.shape[-2:]),
            mean,
            std,
        )
        return tuple(v.to(x.device) if isinstance(v, Tensor) else v for v in values)

    def mixed(x: Tensor, backend: str | None = None, **options: Any) -> Tensor:
        share, partners, box, mean, std = arguments(x)
        return blend("mixup", x, share, box, partners, mean, std, backend=backend, **options)

    def fresh(x: Tensor, backend: str | None = None) -> Tensor:
        y = layout(x.to(source)) if source else x
        options = {"dtype": result or x.dtype, "memory_format": memory_format}
        return mixed(y, backend, **options).to(x.dtype)

    def over(x: Tensor, backend: str | None = None) -> Tensor:
        return mixed(x, backend, inplace=True)

    def oracle(x: Tensor) -> Tensor:
        share, partners, box, mean, std = arguments(x)
        return _oracle(x / 255 if source == torch.uint8 else x, share, partners, box, mean, std)

    def gradient(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(grad_output: Tensor, **options: Any) -> Tensor:
            # The input, zeros, is contiguous: the gradient's layout may be another one.
            leaf = grad_output.new_zeros(grad_output.shape, requires_grad=True)
            with torch.enable_grad():
                y = forward(leaf, **options)
            return torch.autograd.grad(y, leaf, grad_output.detach())[0]

        return call

    names = [f.__name__[1:] for f in (layout, lam, index, boxes) if callable(f)]
    words = ["x".join(map(str, shape)), *names, "" if callable(lam) else f"lam={lam}"]
    words += ["normalised" if normalise else ""]
    words += [f"{word} {kind}" for word, kind in (("from", source), ("to", result)) if kind]
    words += [f"as {memory_format}" if memory_format else ""]

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (layout(_values(shape, source or result).to(dtype).to(device)),)

    backward = op == "mixup_backward"
    narrow = (torch.uint8, torch.float16, torch.bfloat16)  # a gradient in these is no gradient
    case = Case(
        op=op.rstrip("_"),
        name=" ".join(word for word in words if word).replace("torch.", ""),
        inputs=inputs,
        function=gradient(fresh) if backward else fresh,
        oracle=gradient(oracle) if backward else oracle,
        small=torch.Size(shape).numel() <= 2100,
        exact=False,
        differentiable=not (backward or source in narrow or result in narrow),
    )
    return in_place(case, over) if op == "mixup_" else case


_IMAGES = (6, 3, 5, 7)
_LAST = torch.channels_last
_PLAIN = torch.contiguous_format

CASES = [
    # Batches of one, of odd sizes, of numbers and of rows.
    _case((1,)),
    _case((5,)),
    _case((5,), lam=_shares, index=_repeated),
    _case((1, 1), lam=_shares),
    _case((3, 2), lam=_shares, index=_rolled),
    _case((2, 3, 7)),
    _case((7, 5, 9), lam=_shares),
    _case((7, 5, 9), _transposed, lam=_shares),
    _case((3, 513), _misaligned, lam=_shares),
    _case((5, 2, 129), _misaligned, index=_repeated),
    # How shares and partners are given.
    *(_case(_IMAGES, lam=lam) for lam in (0.0, 1.0, _half_shares, _one_share)),
    *(
        _case(_IMAGES, layout, lam=_shares, index=index)
        for layout in (_contiguous, _channels_last)
        for index in (None, _permuted, _repeated, _one_partner)
    ),
    _case(_IMAGES, _strided, index=_permuted),
    _case((3, 2, 2, 3, 4), _channels_last, lam=_shares),
    # Boxes, and boxes in a blend.
    *(
        _case(_IMAGES, layout, lam=lam, index=index, boxes=boxes, normalise=normalise)
        for layout in (_contiguous, _channels_last)
        for lam, index, boxes, normalise in (
            (1.0, None, _boxes, False),
            (1.0, _repeated, _one_box, True),
            (_shares, _permuted, _boxes, True),
            (0.3, None, _one_box, False),
        )
    ),
    _case((1, 1, 3, 3), lam=1.0, boxes=_boxes),
    _case((4, 5, 7), lam=1.0, boxes=_boxes),
    _case((0, 3, 2, 2), lam=_shares, boxes=_boxes),
    _case((7, 2, 1, 33), _misaligned, lam=1.0, boxes=_boxes),
    _case((3, 2, 2, 4, 5), lam=_shares, boxes=_boxes, normalise=True),
    # Normalised, of another type, in another layout.
    _case((5, 4), lam=_shares, normalise=True),
    _case(_IMAGES, normalise=True),
    _case(_IMAGES, _channels_last, lam=_shares, normalise=True),
    _case(_IMAGES, source=torch.float64, lam=_shares, normalise=True),
    _case(_IMAGES, result=torch.float64, lam=_shares, normalise=True),
    _case(_IMAGES, source=torch.float16, lam=_shares, boxes=_boxes),
    _case(_IMAGES, source=torch.bfloat16, index=_repeated),
    _case(_IMAGES, result=torch.float16, lam=0.25),
    _case(_IMAGES, result=torch.bfloat16, lam=0.25),
    _case((5,), source=torch.uint8),
    _case((3, 2, 65), _misaligned, source=torch.uint8, lam=_shares, normalise=True),
    *(
        _case(
            _IMAGES, layout, lam=lam, boxes=boxes, normalise=True, source=source, memory_format=to
        )
        for layout, to in ((_contiguous, _LAST), (_channels_last, _PLAIN), (_channels_last, None))
        for lam, boxes, source in (
            (_shares, None, torch.uint8),
            (1.0, _boxes, torch.uint8),
            (_shares, _boxes, None),
        )
    ),
    _case((2, 3, 2, 3, 4), memory_format=torch.channels_last_3d, lam=_shares),
    _case((3, 70, 2, 5), memory_format=_LAST, lam=_shares),
    _case((3, 70, 2, 5), _channels_last, memory_format=_PLAIN, lam=_shares),
]
# Several units of work, and edges of theirs.
CASES += [
    _case((3, 333_337)),
    _case((130, 1030), lam=_shares, index=_repeated),
    _case((600, 3, 7, 7), lam=_shares, normalise=True),
    *(
        _case(shape, layout, lam=lam, index=index, boxes=boxes, normalise=True, **options)
        for shape in ((9, 3, 117, 131), (5, 70, 29, 31))
        for layout, to in ((_contiguous, _LAST), (_channels_last, _PLAIN))
        for lam, index, boxes, options in (
            (_shares, _permuted, _boxes, {}),
            (0.3, None, None, {"memory_format": to}),
            (_shares, None, _boxes, {"source": torch.uint8, "memory_format": to}),
        )
    ),
]
CASES += [
    _case((1,), op="mixup_"),
    _case((5,), op="mixup_", lam=_shares, index=_permuted),
    _case((4, 513), _misaligned, op="mixup_", lam=_shares),
    _case(_IMAGES, _strided, op="mixup_", lam=_shares),
    *(
        _case(_IMAGES, layout, op="mixup_", lam=lam, index=index, boxes=boxes, normalise=normalise)
        for layout in (_contiguous, _channels_last)
        for lam, index, boxes, normalise in (
            (_shares, None, None, False),
            (_shares, _permuted, _boxes, True),
            (0.0, _rolled, None, True),
            (1.0, _rolled, _one_box, False),
        )
    ),
    *(
        _case((9, 3, 117, 131), layout, op="mixup_", lam=_shares, index=index, boxes=boxes)
        for layout in (_contiguous, _channels_last)
        for index, boxes in ((None, None), (_permuted, _boxes))
    ),
]
CASES += [
    _case((1,), op="mixup_backward"),
    _case((5,), op="mixup_backward", lam=_shares, index=_repeated),
    _case((3, 513), _misaligned, op="mixup_backward", lam=_shares),
    *(
        _case(
            _IMAGES, layout, op="mixup_backward", lam=lam, index=index, boxes=boxes, normalise=True
        )
        for layout in (_contiguous, _channels_last, _strided)
        for lam, index, boxes in (
            (_shares, None, None),
            (_shares, _repeated, _boxes),
            (1.0, _permuted, _one_box),
            (0.3, _one_partner, None),
        )
    ),
    _case(_IMAGES, op="mixup_backward", lam=_shares, memory_format=_LAST),
    _case(_IMAGES, op="mixup_backward", result=torch.float64, lam=_shares),
    *(
        _case((9, 3, 117, 131), layout, op="mixup_backward", lam=_shares, index=index, boxes=boxes)
        for layout in (_contiguous, _channels_last)
        for index, boxes in ((None, None), (_repeated, _boxes))
    ),
]
