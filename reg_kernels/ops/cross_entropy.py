"""Cross-entropy of class indices, of pairs of them, and of class probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import has_torch_function

from .._mixed_target import MixedTarget
from ..backends import forced_by
from ..reference import cross_entropy as reference
from ._checks import hand_over
from ._loss import TARGET, register_loss, run
from ._loss_checks import check_entry, checked_call
from ._signature import is_compiling, signature

is_autocast_enabled = torch._C._is_any_autocast_enabled  # the result's type is another one then


def _check(op: str, arguments: Any, of_backward: bool) -> None:
    check_entry(op, arguments, 2, of_backward)


_OP = register_loss(
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
    r"""Computes `torch.nn.functional.cross_entropy` with one read of the logits and one write of
    their gradient, also for pairs of labels.

    The loss of a pair is :math:`\lambda\,\mathrm{CE}(a) + (1 - \lambda)\,\mathrm{CE}(b)`, with
    :math:`\mathrm{CE}(y) = -\sum_c w_c q_c \log \mathrm{softmax}(x)_c` and :math:`q = (1 -
    \varepsilon)\,\mathrm{one\_hot}(y) + \varepsilon / C`. Neither one-hot targets nor a softmax are
    stored. Half precision is computed in float32 and rounded once, so smoothing over a large
    vocabulary does not overflow.

    Args:
        input: logits (N, C, ...) or (C,); float64, float32, float16 or bfloat16.
        target: class indices, int64 (N, ...) in [0, C); or class probabilities of the input's
            shape; or a `reg_kernels.augment.MixedTarget`. The two losses of a MixedTarget are each
            reduced as torch reduces one, and then added by its shares.
        weight: the weight of each class, (C,).
        size_average: deprecated, as in torch.
        ignore_index: a label that counts for nothing.
        reduce: deprecated, as in torch.
        reduction: "none", "mean" or "sum". A mean is over the weights of the labels that are not
            ignored. Where all are ignored it is NaN, as in torch.
        label_smoothing: :math:`\varepsilon`, in [0, 1]. A MixedTarget may bring its own.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        The loss, of no dimensions or (N, ...), in the input's dtype, and in float32 under autocast.
        Its gradient goes to the input, and to class probabilities that require grad.

    Raises:
        IndexError: a label is outside [0, C) and not ignored. On a GPU this is a device-side
            assertion, in a compiled program a RuntimeError.
        ValueError: the batch of labels has another size; `reduction` or `backend` is unknown; a
            share is outside [0, 1]; or loss and target bring two different smoothings.
        RuntimeError: a dtype, shape or device is another one, `label_smoothing` is outside [0, 1],
            or `backend` cannot run here.
        TypeError: an argument is no tensor.

    Source: C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR
    2016 (label smoothing); M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax",
    2018.
    """
    if has_torch_function((input, weight)):
        return hand_over(cross_entropy, locals(), "input", "weight", by_place=2)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    given = (input, target, weight, ignore_index, reduction, label_smoothing)
    key = None
    if not is_compiling():
        key = signature(*given, backend, forced_by(), is_autocast_enabled())
        if (found := _OP.route.known.get(key)) is not None:
            try:
                return _OP.route.run_again(found, given)
            except RuntimeError:
                key = None  # the checks say what is wrong with the labels
    call = checked_call("cross_entropy", *given)
    return run(_OP, "cross_entropy", call, (), (), backend, given, key)
