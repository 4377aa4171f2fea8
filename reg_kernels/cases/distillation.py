"""Distillation's inputs: a student's logits, a teacher beside them, and cross-entropy's targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .. import functional as F
from . import Case
from .cross_entropy import Layout, LossCall, loss_case
from .dropout import _channels_last, _contiguous, _misaligned, _strided, _transposed


def _case(
    shape: tuple[int, ...],
    layout: Layout = _contiguous,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    teacher: torch.dtype | None = None,
    backward: bool = False,
    **options: Any,
) -> Case:
    """`teacher`: the type of its logits, if not the case's."""
    call = LossCall(shape, layout, **options)

    @torch.compiler.assume_constant_result
    def drawn() -> Tensor:
        """Multiples of 1/8, which every type holds."""
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randint(-40, 41, shape, generator=generator) / 8

    def teacher_of(x: Tensor) -> Tensor:
        """Contiguous, whatever the student is."""
        return drawn().to(teacher or x.dtype).to(x.device)

    def function(x: Tensor, backend: str | None = None) -> Tensor:
        return F.distillation_loss(
            x,
            teacher_of(x),
            call.target(x),
            temperature=temperature,
            alpha=alpha,
            backend=backend,
            **call.options(x),
        )

    def oracle(x: Tensor) -> Tensor:
        class_dim = min(1, x.dim() - 1)
        log_q = (x / temperature).log_softmax(class_dim)
        log_p = (teacher_of(x).to(x.dtype) / temperature).log_softmax(class_dim)
        divergence = TF.kl_div(log_q, log_p, reduction="none", log_target=True).sum(class_dim)
        if call.reduction == "mean":
            divergence = divergence / divergence.numel()
        if call.reduction != "none":
            divergence = divergence.sum()
        of_labels = call.cross_entropy(x, call.target(x))
        return alpha * temperature**2 * divergence + (1 - alpha) * of_labels

    words = f" T={temperature} alpha={alpha}" + (f" teacher {teacher}" if teacher else "")
    words = words.replace("torch.", "")
    return loss_case("distillation", call, function, oracle, backward, words)


_KINDS = ("labels", "pair", "shares")

CASES = [
    # One position, one class, two, vectors and rows that are not filled.
    *(_case(shape, kind=kind) for shape in ((1, 1), (3, 1), (1, 2), (7,)) for kind in _KINDS[:2]),
    _case((65, 2), kind="shares"),
    _case((5, 17), temperature=4.0),
    _case((3, 129), label_smoothing=0.1),
    _case((2, 1000), alpha=0.9),
    _case((2, 1000), kind="shares", weighted=True, label_smoothing=0.1, temperature=3.0),
    # Every option with every target. Few positions' errors, which T^2 multiplies, may happen to
    # cancel in torch's sum of them: where they are summed T is small.
    *(
        _case((7, 5), kind=kind, reduction=reduction, temperature=T, alpha=0.7, **options)
        for kind in _KINDS
        for reduction, T, options in (
            ("none", 3.0, {}),
            ("sum", 1.25, {"label_smoothing": 0.2}),
            ("mean", 1.25, {"weighted": True}),
            ("none", 3.0, {"ignore_index": -100, "weighted": True, "label_smoothing": 0.2}),
            ("sum", 1.25, {"ignore_index": 2}),
            ("mean", 1.25, {"ignore_index": 2, "weighted": True, "label_smoothing": 0.2}),
        )
    ),
    *(_case((7, 5), alpha=alpha, ignore_index=-100) for alpha in (0.0, 1.0)),
    *(_case((7, 5), temperature=temperature) for temperature in (1.0, 0.5)),
    _case((7, 5), temperature=20.0, reduction="none"),
    *(_case((7, 5), teacher=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    _case((7, 5), teacher=torch.float64, reduction="none"),
    # Layouts; positions beside the samples.
    _case((9, 33), _transposed),
    _case((9, 33), _strided, weighted=True),
    _case((9, 33), _misaligned, label_smoothing=0.1, teacher=torch.float32),
    *(
        _case(shape, layout, kind=kind, reduction=reduction, **options)
        for shape in ((3, 5, 4, 3), (2, 19, 7))
        for layout in (_contiguous, _channels_last)
        for kind, reduction, options in (
            ("labels", "none", {}),
            ("labels", "mean", {"ignore_index": 255, "weighted": True}),
            ("shares", "mean", {"ignore_index": -100, "label_smoothing": 0.1}),
        )
    ),
    _case((2, 3, 2, 3, 4), _channels_last, kind="pair", teacher=torch.float16, reduction="sum"),
]
# Several units of work, and edges of theirs.
CASES += [
    _case((8, 50_257)),
    _case((3, 50_257), _misaligned, kind="shares", temperature=3.0, teacher=torch.float32),
    _case((257, 1000), label_smoothing=0.1, ignore_index=-100, temperature=4.0),
    _case((1, 128_256), reduction="none"),
    _case((3000, 10), weighted=True),
    *(
        _case((4, 21, 65, 67), layout, ignore_index=255, weighted=True, label_smoothing=0.1)
        for layout in (_contiguous, _channels_last)
    ),
]
CASES += [
    *(
        _case((7, 5), kind=kind, reduction=reduction, temperature=3.0, backward=True, **options)
        for kind in _KINDS
        for reduction, options in (
            ("none", {}),
            ("sum", {"label_smoothing": 0.2}),
            ("mean", {"weighted": True, "ignore_index": 2}),
        )
    ),
    _case((1, 1), backward=True),
    _case((7,), reduction="none", backward=True),
    _case((9, 33), _misaligned, ignore_index=-100, teacher=torch.float32, backward=True),
    *(
        _case((3, 5, 4, 3), layout, kind=kind, ignore_index=1, reduction=reduction, backward=True)
        for layout in (_contiguous, _channels_last)
        for kind, reduction in (("labels", "none"), ("shares", "mean"))
    ),
    _case((8, 50_257), temperature=4.0, backward=True),
    _case((4, 21, 65, 67), ignore_index=255, reduction="none", backward=True),
    _case((4, 21, 65, 67), _channels_last, label_smoothing=0.1, backward=True),
]
