"""Cross-entropy's inputs: few classes and whole vocabularies, and every kind of target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .. import functional as F
from .._mixed_target import MixedTarget
from . import Case
from .dropout import _channels_last, _contiguous, _misaligned, _strided, _transposed

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossCall:
    """A loss of logits (N, C, ...) or (C,).

    Targets and weights are the same for every dtype: all of them hold them exactly.

    Attributes:
        kind: of target: "labels"; "probabilities"; a "pair" of labels with one share, or with
            "shares" of each sample.
        ignore_index: of every third label.
        weighted: whether classes have weights, among them 0 and 1.
        infinite: whether every other position excludes a class, by a logit of -inf, and those that
            are ignored hold what is not finite. What an ignored position holds counts for nothing,
            where torch makes its gradient NaN.
    """

    shape: tuple[int, ...]
    layout: Layout = _contiguous
    kind: str = "labels"
    ignore_index: int | None = None
    weighted: bool = False
    label_smoothing: float = 0.0
    reduction: str = "mean"
    infinite: bool = False

    @property
    def classes(self) -> int:
        return self.shape[min(1, len(self.shape) - 1)]

    @property
    def positions(self) -> tuple[int, ...]:
        return self.shape[:1] + self.shape[2:] if len(self.shape) > 1 else ()

    @property
    def small(self) -> bool:
        return torch.Size(self.shape).numel() <= 2100

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.layout.__name__[1:], self.kind]
        words += [] if self.ignore_index is None else [f"ignoring {self.ignore_index}"]
        words += ["weighted"] * self.weighted + ["infinite"] * self.infinite
        words += [f"smoothing {self.label_smoothing}"] if self.label_smoothing else []
        return " ".join([*words, self.reduction])

    def logits(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(sum(self.shape) + len(self.shape))
        x = 3 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.infinite:
            rows = x.movedim(1, -1).reshape(-1, self.classes)
            rows[::2, 1] = -torch.inf
            ignored = self._ignored().view(-1)
            nothing = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
            rows[ignored] = nothing[torch.arange(int(ignored.sum())) % 3].unsqueeze(1)
            x = rows.view(*self.positions, self.classes).movedim(-1, 1)
        return self.layout(x.to(dtype).to(device))

    def grad_output(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As a backward gets it."""
        shape = self.positions if self.reduction == "none" else ()
        g = torch.linspace(-1, 1, torch.Size(shape).numel() + 2, dtype=torch.float64)[1:-1] + 0.125
        return g.view(shape).to(dtype).to(device)

    def target(self, x: Tensor) -> Tensor | MixedTarget:
        """For logits x."""
        if self.kind == "probabilities":
            return self.probabilities().to(x.dtype).to(x.device)
        labels = self._labels(0).to(x.device)
        if self.kind == "labels":
            return labels
        shares = torch.tensor([0.25, 1.0, 0.75, 0.0, 0.5], device=x.device)
        lam = shares[torch.arange(len(x)) % 5] if self.kind == "shares" else 0.3
        return MixedTarget(labels, self._labels(1).to(x.device), lam)

    @torch.compiler.assume_constant_result  # a generator is nothing to compile
    def probabilities(self) -> Tensor:
        """Multiples of 1/64 whose sum is 1; of many classes most have none. In float64."""
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randint(self.classes, (*self.positions, 64), generator=generator)
        counts = torch.zeros((*self.positions, self.classes), dtype=torch.float64)
        counts.scatter_add_(-1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        return counts.movedim(-1, min(1, len(self.shape) - 1)).contiguous() / 64

    def options(self, x: Tensor) -> dict[str, Any]:
        """torch's options of a loss of logits x."""
        weight = (torch.arange(self.classes) * 3 % 16 / 8).to(x.dtype).to(x.device)
        return {
            "weight": weight if self.weighted else None,
            "ignore_index": -100 if self.ignore_index is None else self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }

    def cross_entropy(self, x: Tensor, target: Tensor | MixedTarget) -> Tensor:
        """torch's loss; of a pair both of them, each reduced on its own, added by their shares."""
        options = self.options(x)
        if self.infinite:
            x = x.masked_fill(self._ignored().to(x.device).unsqueeze(1), 0.0)
        if isinstance(target, Tensor):
            return TF.cross_entropy(x, target, **options)
        weight, ignore_index = options["weight"], options["ignore_index"]
        lam: Any = target.lam
        if isinstance(lam, Tensor):
            lam = lam.to(x.dtype).view(-1, *[1] * (len(self.positions) - 1))
        loss = x.new_zeros(())
        for labels, share in ((target.labels, lam), (target.partner_labels, 1 - lam)):
            each = share * TF.cross_entropy(x, labels, **{**options, "reduction": "none"})
            if self.reduction == "mean":
                valid = labels[labels != ignore_index]
                each = each / (len(valid) if weight is None else weight[valid].sum())
            loss = loss + (each if self.reduction == "none" else each.sum())
        return loss

    def _ignored(self) -> Tensor:
        """The positions of which no label counts."""
        sides = 1 if self.kind == "labels" else 2
        ignored = torch.stack([self._labels(side) == self.ignore_index for side in range(sides)])
        return ignored.all(0)

    def _labels(self, side: int) -> Tensor:
        # Scattered by arithmetic: torch.compile takes no generator.
        places = torch.arange(torch.Size(self.positions).numel()).view(self.positions)
        labels = (7919 * places + places // 3 + 3 * side + 1) % self.classes
        if self.ignore_index is not None:
            labels.view(-1)[1 + side :: 3] = self.ignore_index
            if self.infinite:  # one has no label that counts
                labels.view(-1)[-1] = self.ignore_index
        return labels


def second_gradient(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient by the logits at a second backward, for which the forward has kept none."""

    def call(x: Tensor, grad_output: Tensor, **options: Any) -> Tensor:
        leaf, grad_output = x.detach().requires_grad_(), grad_output.detach()
        with torch.enable_grad():
            loss = forward(leaf, **options)
        torch.autograd.grad(loss, leaf, grad_output, retain_graph=True)
        return torch.autograd.grad(loss, leaf, grad_output)[0]

    return call


def loss_case(
    op: str,
    call: LossCall,
    function: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    backward: bool,
    words: str = "",
) -> Case:
    """The case of a loss, or of its gradient once more."""

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = call.logits(device, dtype)
        return (x, call.grad_output(device, dtype)) if backward else (x,)

    return Case(
        op=f"{op}_backward" if backward else op,
        name=f"{call}{words}",
        inputs=inputs,
        function=second_gradient(function) if backward else function,
        oracle=second_gradient(oracle) if backward else oracle,
        small=call.small,
        exact=False,
        differentiable=not (backward or call.infinite),
    )


def _case(
    shape: tuple[int, ...], layout: Layout = _contiguous, *, backward: bool = False, **options: Any
) -> Case:
    call = LossCall(shape, layout, **options)

    def function(x: Tensor, backend: str | None = None) -> Tensor:
        return F.cross_entropy(x, call.target(x), **call.options(x), backend=backend)

    def oracle(x: Tensor) -> Tensor:
        return call.cross_entropy(x, call.target(x))

    return loss_case("cross_entropy", call, function, oracle, backward)


def _learnt(shape: tuple[int, ...]) -> Case:
    """Probabilities that want a gradient of their own."""
    call = LossCall(shape, kind="probabilities", label_smoothing=0.1)

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return call.logits(device, dtype), call.probabilities().to(dtype).to(device)

    def function(x: Tensor, target: Tensor, backend: str | None = None) -> Tensor:
        return F.cross_entropy(x, target, **call.options(x), backend=backend)

    return Case(
        op="cross_entropy",
        name=f"{call} learnt",
        inputs=inputs,
        function=function,
        oracle=call.cross_entropy,
        small=call.small,
        exact=False,
    )


_KINDS = ("labels", "probabilities", "pair", "shares")

CASES = [
    # One position, one class, two, vectors and rows that are not filled.
    *(_case(shape, kind=kind) for shape in ((1, 1), (3, 1), (1, 2), (7,)) for kind in _KINDS[:3]),
    _case((65, 2), kind="shares"),
    _case((5, 17)),
    _case((3, 129), label_smoothing=0.1),
    _case((2, 1000)),
    _case((2, 1000), kind="probabilities", label_smoothing=0.1),
    _case((2, 1000), kind="shares", weighted=True, label_smoothing=0.1),
    # Every option with every target.
    *(
        _case((7, 5), kind=kind, reduction=reduction, **options)
        for kind in _KINDS
        for reduction, options in (
            ("none", {}),
            ("sum", {"label_smoothing": 0.2}),
            ("mean", {"weighted": True}),
            ("none", {"weighted": True, "label_smoothing": 0.2}),
        )
    ),
    *(
        _case((7, 5), kind=kind, reduction=reduction, ignore_index=ignore_index, **options)
        for kind in ("labels", "pair", "shares")
        for reduction, ignore_index, options in (
            ("none", -100, {"label_smoothing": 0.2}),
            ("sum", 2, {}),
            ("mean", -1, {}),
            ("mean", 2, {"weighted": True, "label_smoothing": 0.2}),
        )
    ),
    _case((7, 5), label_smoothing=1.0),
    # Layouts; positions beside the samples.
    _case((9, 33), _transposed),
    _case((9, 33), _strided, weighted=True),
    _case((9, 33), _misaligned, label_smoothing=0.1),
    _case((3, 143), _misaligned, kind="probabilities"),
    *(
        _case(shape, layout, kind=kind, reduction=reduction, **options)
        for shape in ((3, 5, 4, 3), (3, 19, 7))
        for layout in (_contiguous, _channels_last)
        for kind, reduction, options in (
            ("labels", "none", {}),
            ("labels", "mean", {"ignore_index": 255, "weighted": True}),
            ("probabilities", "mean", {"label_smoothing": 0.1}),
            ("shares", "mean", {"ignore_index": -100, "label_smoothing": 0.1}),
        )
    ),
    _case((2, 3, 5, 7), _strided, kind="pair"),
    _case((2, 3, 2, 3, 4), _channels_last, kind="probabilities", weighted=True, reduction="sum"),
    _learnt((5, 7)),
]
# Several units of work, and edges of theirs.
CASES += [
    _case((8, 50_257)),
    _case((8, 50_257), _misaligned, ignore_index=-100, weighted=True),
    _case((3, 50_257), kind="shares", reduction="sum"),
    _case((5, 8193), kind="probabilities"),
    _case((257, 1000), label_smoothing=0.1),
    _case((257, 1000), kind="shares", label_smoothing=0.1),
    _case((1, 128_256), reduction="none"),
    _case((3000, 10), weighted=True),
    *(
        _case((4, 21, 65, 67), layout, ignore_index=255, weighted=weighted, label_smoothing=0.1)
        for layout in (_contiguous, _channels_last)
        for weighted in (False, True)
    ),
]
CASES += [
    _case((7, 5), kind=kind, reduction=reduction, backward=True, **options)
    for kind in _KINDS
    for reduction, options in (
        ("none", {}),
        ("sum", {"label_smoothing": 0.2}),
        ("mean", {"weighted": True}),
    )
]
CASES += [
    _case(
        *((11, classes, *rest), layout),
        kind=kind,
        infinite=True,
        ignore_index=-100,
        reduction="none",
        label_smoothing=smoothing,
        backward=backward,
    )
    for classes, rest, layout in (
        (5, (), _contiguous),
        (70, (), _contiguous),
        (5, (3,), _contiguous),
        (5, (3,), _channels_last),
    )
    for kind, smoothing in (("labels", 0.0), ("shares", 0.1))
    for backward in (False, True)
]
CASES += [
    _case((1, 1), backward=True),
    _case((7,), reduction="none", backward=True),
    _case((9, 33), _misaligned, ignore_index=-100, label_smoothing=0.1, backward=True),
    *(
        _case((3, 5, 4, 3), layout, kind=kind, ignore_index=1, reduction=reduction, backward=True)
        for layout in (_contiguous, _channels_last)
        for kind in ("labels", "shares")
        for reduction in ("none", "mean")
    ),
    _case((8, 50_257), backward=True),
    _case((3, 50_257), kind="pair", reduction="none", weighted=True, backward=True),
    _case((4, 21, 65, 67), ignore_index=255, reduction="none", backward=True),
    _case((4, 21, 65, 67), _channels_last, label_smoothing=0.1, backward=True),
]
