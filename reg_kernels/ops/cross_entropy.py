"""Cross-entropy of class indices, of pairs of them, and of class probabilities."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import _reduction
from torch.overrides import has_torch_function

from .._mixed_target import MixedTarget
from ..reference import cross_entropy as reference
from ._checks import hand_over
from ._loss import TARGET, register_loss, run
from ._loss_checks import check_entry, checked_call


def _check(op: str, arguments: Any) -> None:
    check_entry(op, arguments, stats=2)


_OPS = register_loss(
    "cross_entropy",
    f"Tensor {TARGET}",
    stats=2,
    reference=reference.cross_entropy,
    by_torch=reference.cross_entropy_backward,
    check=_check,
)


def cross_entropy(
    input: Tensor,
    target: Tensor | MixedTarget,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""`torch.nn.functional.cross_entropy` in one read of the logits and one write of the gradient,
    which also takes pairs of labels:
    :math:`\lambda\,\mathrm{CE}(a) + (1 - \lambda)\,\mathrm{CE}(b)`, where
    :math:`\mathrm{CE}(y) = -\sum_c w_c q_c \log \mathrm{softmax}(x)_c` and
    :math:`q = (1 - \varepsilon)\,\mathrm{one\_hot}(y) + \varepsilon / C`.

    Neither one-hot targets nor a softmax are made. Half precision is computed in float32 and
    rounded once: smoothing over a large vocabulary does not overflow.

    Args:
        input: logits (N, C, ...) or (C,); float64, float32, float16 or bfloat16.
        target: class indices, int64 (N, ...) in [0, C); or class probabilities of the input's
            shape; or a `reg_kernels.augment.MixedTarget`, whose two losses are each reduced as
            torch reduces one, and added by its shares.
        weight: the weight of each class, (C,).
        size_average, reduce: deprecated, as torch's.
        ignore_index: a label that counts for nothing.
        reduction: "none", "mean" or "sum". A mean is over the weights of the labels that are not
            ignored: if all are, NaN, as torch's.
        label_smoothing: in [0, 1]; a MixedTarget may bring its own.
        backend: "native", "triton" or "reference"; by default the first that can run here.

    Returns:
        The loss, of no dimensions or (N, ...), in the input's dtype, under autocast in float32. Its
        gradient goes to the input, and to class probabilities that require grad.

    Raises:
        IndexError: a label outside of [0, C) that is not ignored; on a GPU a device-side assertion,
            in a compiled program a RuntimeError.
        ValueError: a batch of labels of another size, an unknown `reduction` or `backend`, shares
            outside [0, 1], or two different smoothings.
        RuntimeError: another dtype, shape or device, `label_smoothing` outside [0, 1], or a
            `backend` that cannot run here.
        TypeError: something that is no tensor.

    Source: C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR
    2016 (label smoothing); M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax",
    2018.
    """
    if has_torch_function((input, weight)):
        return hand_over(cross_entropy, locals(), "input", "weight")
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    name = "cross_entropy"
    call = checked_call(name, input, target, weight, ignore_index, reduction, label_smoothing)
    return run(_OPS, name, call, (), (), backend, reference.cross_entropy)
