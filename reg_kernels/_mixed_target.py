"""The target of a mixed batch: two labels a sample and their shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map


class MixedTarget(NamedTuple):
    r"""Labels of a mixed batch, for a loss :math:`\lambda\,\ell(a) + (1 - \lambda)\,\ell(b)`.

    `reg_kernels.nn.CrossEntropyLoss` and `DistillationLoss` take it as it is; `to_dense` makes
    class probabilities of it for any other loss. A tuple of its fields, so that DataLoader's
    workers, pinning, pickling and `torch.compile` know what to do with it; `default_collate` makes
    a batch of single targets.

    Attributes:
        labels: the labels a of the samples, int64 (N, ...).
        partner_labels: the labels b of their partners, of the same shape.
        lam: the share of the samples' own labels, in [0, 1]: (N,), or one number as a tensor of no
            dimensions or a float.
        label_smoothing: of both losses, in [0, 1].
    """

    labels: Tensor
    partner_labels: Tensor
    lam: Tensor | float
    label_smoothing: float = 0.0

    def to(self, *args: Any, **kwargs: Any) -> MixedTarget:
        """On another device, as `Tensor.to(device, non_blocking=...)`; a floating-point dtype is
        that of `lam`, another is left out of account."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:  # of a batch of bytes, say
            dtype = None
        options = {"device": device, "non_blocking": non_blocking}
        lam = self.lam
        if isinstance(lam, Tensor):
            lam = lam.to(dtype=dtype or lam.dtype, **options)
        return self._replace(
            labels=self.labels.to(**options),
            partner_labels=self.partner_labels.to(**options),
            lam=lam,
        )

    def pin_memory(self) -> MixedTarget:
        """In page-locked memory, for copies to a GPU that nobody waits for."""
        lam = self.lam.pin_memory() if isinstance(self.lam, Tensor) else self.lam
        return self._replace(
            labels=self.labels.pin_memory(),
            partner_labels=self.partner_labels.pin_memory(),
            lam=lam,
        )

    def to_dense(self, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Class probabilities (N, num_classes, ...), of a single target (num_classes,):
        lam smooth(a) + (1 - lam) smooth(b), where smooth(y) is (1 - label_smoothing) one_hot(y) +
        label_smoothing / num_classes.

        Args:
            num_classes: at least 1; the labels lie below it, none is an ignore_index.
            dtype: of the result.

        Raises:
            ValueError: `num_classes` below 1, a smoothing or, on the CPU, a share outside of
                [0, 1], or another number of shares than 1 and N.
            IndexError: on the CPU, a label that is not in [0, num_classes).
        """
        if num_classes < 1:
            raise ValueError(
                f"MixedTarget.to_dense: num_classes must be at least 1, got {num_classes}"
            )
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(
                "MixedTarget.to_dense: label_smoothing must be in [0, 1], "
                f"got {self.label_smoothing}"
            )
        labels, partners = self.labels.long(), self.partner_labels.long()
        samples = labels.shape[0] if labels.dim() else 1
        shares = self.lam.numel() if isinstance(self.lam, Tensor) else 1
        if shares not in (1, samples):
            raise ValueError(
                f"MixedTarget.to_dense: lam must be one number, or one for each of the {samples} "
                f"samples, got {shares}"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            for each in (labels, partners):
                wrong = each[(each < 0) | (each >= num_classes)]
                if wrong.numel():
                    raise IndexError(
                        f"MixedTarget.to_dense: labels must be in [0, {num_classes}), "
                        f"got {int(wrong[0])}"
                    )
            lam = torch.as_tensor(self.lam)
            if not bool(((lam >= 0) & (lam <= 1)).all()):
                raise ValueError(f"MixedTarget.to_dense: lam must be in [0, 1], got {lam.tolist()}")
        # In float64, so that a probability is rounded once.
        options: Any = {"dtype": torch.float64, "device": labels.device}
        lam = self.lam.to(**options) if isinstance(self.lam, Tensor) else self.lam
        lam = torch.ones((), **options) * lam  # a copy from the host would wait for a GPU
        lam = lam.reshape(-1, *[1] * labels.dim())
        dim = min(1, labels.dim())  # a single target has no N
        shape = (*labels.shape[:dim], num_classes, *labels.shape[dim:])
        dense = torch.full(shape, self.label_smoothing / num_classes, **options)
        for each, share in ((labels, lam), (partners, 1 - lam)):
            each = each.unsqueeze(dim)
            hot = (1 - self.label_smoothing) * share
            dense.scatter_add_(dim, each, hot.expand(each.shape))
        return dense.to(dtype)


def _collate(batch: list[MixedTarget], *, collate_fn_map: Any = None) -> MixedTarget:
    """Single targets as one of a batch; all have to be smoothed alike."""
    smoothings = {target.label_smoothing for target in batch}
    if len(smoothings) > 1:
        raise ValueError(
            "MixedTarget: a batch must have one label_smoothing, "
            f"got {', '.join(map(str, sorted(smoothings)))}"
        )
    labels, partner_labels, lam = (
        default_collate([target[i] for target in batch]) for i in range(3)
    )
    return MixedTarget(labels, partner_labels, lam, smoothings.pop())


default_collate_fn_map[MixedTarget] = _collate
