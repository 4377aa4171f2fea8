"""The target of a mixed batch: two labels a sample and their shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from ._numbers import check_shares, integer, number, probability, refuse

_FIELDS = ("labels", "partner_labels", "lam", "label_smoothing")


class MixedTarget(Mapping[str, Any]):
    r"""The labels of a mixed batch, for a loss :math:`\lambda\,\ell(a) + (1 - \lambda)\,\ell(b)`.

    `reg_kernels.nn.CrossEntropyLoss` and `DistillationLoss` take it as it is. `to_dense` makes
    class probabilities of it for any other loss. DataLoader's workers, pinning, pickling and
    `torch.compile` handle it, and `default_collate` makes a batch of single targets.

    Its length is the number of samples, and `target[samples]` is the target of some of them. It is
    also a mapping from the names of its fields to tensors with an entry for each sample, even where
    a field is one number for all, and it can be made again from such a mapping. So whatever joins,
    cuts, gathers or broadcasts mappings of tensors, as accelerate does, keeps each sample's shares
    with it. `==` raises TypeError, since two labels cannot equal one.

    Attributes:
        labels: the samples' own labels a, int64 (N, ...).
        partner_labels: the labels b of their partners, of the same shape.
        lam: the share of the samples' own labels, in [0, 1]: (N,), or one number for all, as a
            tensor of no dimensions or a float.
        label_smoothing: the smoothing of both losses, in [0, 1].
    """

    labels: Tensor
    partner_labels: Tensor
    lam: Tensor | float
    label_smoothing: float

    def __init__(
        self,
        labels: Tensor | Mapping[str, Any],
        partner_labels: Tensor | None = None,
        lam: Tensor | float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        fields: tuple[Any, ...] = (labels, partner_labels, lam, label_smoothing)
        if isinstance(labels, Mapping):
            fields = tuple(labels[name] for name in _FIELDS)
            fields = (*fields[:3], _one_smoothing(fields[3]))
        elif partner_labels is None:
            raise TypeError("MixedTarget: partner_labels must be given")
        self.labels, self.partner_labels, self.lam, self.label_smoothing = fields

    def _replace(self, **changes: Any) -> MixedTarget:
        """The same with other values of some fields."""
        return MixedTarget(**{name: getattr(self, name) for name in _FIELDS} | changes)

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in _FIELDS)
        return f"MixedTarget({', '.join(shown)})"

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[str]:
        return iter(_FIELDS)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            raise TypeError(f"MixedTarget: a field's name must be a str, got {type(name).__name__}")
        return name in _FIELDS

    def __getitem__(self, key: Any) -> Any:
        """Some samples; or a field by its name, with an entry for each sample."""
        if isinstance(key, str):
            if key not in _FIELDS:
                raise KeyError(key)
            value = getattr(self, key)
            return self._of_each_sample(value) if key in _FIELDS[2:] else value
        if isinstance(key, tuple):
            raise TypeError("MixedTarget: an index must be one of samples, got a tuple")
        lam = self.lam
        if isinstance(lam, Tensor) and lam.dim() > 0 and len(lam) == len(self):
            lam = lam[key]
        return self._replace(
            labels=self.labels[key], partner_labels=self.partner_labels[key], lam=lam
        )

    def _of_each_sample(self, value: Any) -> Any:
        shape = self.labels.shape[:1]
        if isinstance(value, Tensor):
            return value if value.shape == shape else value.expand(shape).contiguous()
        return torch.full(shape, value, dtype=torch.float64, device=self.labels.device)

    def __eq__(self, other: object) -> bool:
        raise TypeError(
            "MixedTarget: there is no comparison with two labels a sample: compare with `labels` "
            "and `partner_labels`, or with `to_dense(num_classes)`"
        )

    __hash__ = None  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> MixedTarget:
        """Returns the target on another device, as `Tensor.to(device, non_blocking=...)` does. A
        floating-point dtype becomes that of `lam`; any other dtype is ignored.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        options: Any = {"device": device, "non_blocking": non_blocking}
        lam = self.lam
        if isinstance(lam, Tensor):
            is_of_lam = dtype is not None and dtype.is_floating_point  # not a batch of bytes' dtype
            lam = lam.to(dtype=dtype if is_of_lam else lam.dtype, **options)
        return self._replace(
            labels=self.labels.to(**options),
            partner_labels=self.partner_labels.to(**options),
            lam=lam,
        )

    def pin_memory(self) -> MixedTarget:
        """Returns the target in page-locked memory, from which copies to a GPU need not be
        waited for.
        """
        lam = self.lam.pin_memory() if isinstance(self.lam, Tensor) else self.lam
        return self._replace(
            labels=self.labels.pin_memory(),
            partner_labels=self.partner_labels.pin_memory(),
            lam=lam,
        )

    def to_dense(self, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns class probabilities (N, num_classes, ...), or (num_classes,) for a single target.

        They are lam smooth(a) + (1 - lam) smooth(b), where smooth(y) is (1 - label_smoothing)
        one_hot(y) + label_smoothing / num_classes.

        Args:
            num_classes: the number of classes, at least 1. All labels lie below it; none is an
                ignore_index.
            dtype: the dtype of the result.

        Raises:
            ValueError: `num_classes` is below 1, a smoothing is outside [0, 1], the number of
                shares is neither 1 nor N, or, on the CPU, a share is outside [0, 1].
            IndexError: on the CPU, a label is not in [0, num_classes).
        """
        name = "MixedTarget.to_dense"
        num_classes = integer(name, "num_classes", num_classes)
        smoothing = probability(name, "label_smoothing", self.label_smoothing)
        lam = self.lam
        if not isinstance(lam, Tensor):
            lam = number(name, "lam", lam)
        if num_classes < 1:
            refuse(name, "num_classes", "at least 1", num_classes, ValueError)
        labels, partners = self.labels.long(), self.partner_labels.long()
        samples = labels.shape[0] if labels.dim() else 1
        shares = lam.numel() if isinstance(lam, Tensor) else 1
        if shares not in (1, samples):
            must = f"one number, or one for each of the {samples} samples"
            refuse(name, "lam", must, shares, ValueError)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            for each in (labels, partners):
                wrong = each[(each < 0) | (each >= num_classes)]
                if wrong.numel():
                    must = f"in [0, {num_classes})"
                    refuse(name, "labels", must, int(wrong[0]), IndexError)
            if isinstance(lam, Tensor):
                check_shares(name, lam)
            else:
                probability(name, "lam", lam)
        # In float64, so that a probability is rounded once.
        options: Any = {"dtype": torch.float64, "device": labels.device}
        lam = lam.to(**options) if isinstance(lam, Tensor) else lam
        lam = torch.ones((), **options) * lam  # a copy from the host would wait for a GPU
        lam = lam.reshape(-1, *[1] * labels.dim())
        dim = min(1, labels.dim())  # a single target has no N
        shape = (*labels.shape[:dim], num_classes, *labels.shape[dim:])
        dense = torch.zeros(shape, **options) + smoothing / num_classes
        for each, share in ((labels, lam), (partners, 1 - lam)):
            each = each.unsqueeze(dim)
            hot = (1 - smoothing) * share
            dense.scatter_add_(dim, each, hot.expand(each.shape))
        return dense.to(dtype)


def _one_smoothing(smoothing: Any) -> Any:
    """The one smoothing of a batch, from those of its samples. What is no tensor is returned."""
    if not isinstance(smoothing, Tensor):
        return smoothing
    different = smoothing.unique().tolist() or [0.0]
    if len(different) > 1:
        got = ", ".join(map(str, different))
        raise ValueError(f"MixedTarget: a batch must have one label_smoothing, got {got}")
    return different[0]


def _collate(batch: list[MixedTarget], *, collate_fn_map: Any = None) -> MixedTarget:
    """Single targets as one of a batch; all have to be smoothed alike."""
    smoothings = [float(target.label_smoothing) for target in batch]
    labels, partner_labels, lam = (
        default_collate([getattr(target, name) for target in batch]) for name in _FIELDS[:3]
    )
    smoothing = _one_smoothing(torch.tensor(smoothings, dtype=torch.float64, device="cpu"))
    return MixedTarget(labels, partner_labels, lam, smoothing)


default_collate_fn_map[MixedTarget] = _collate
pytree.register_pytree_node(
    MixedTarget,
    lambda target: ([getattr(target, name) for name in _FIELDS], None),
    lambda values, _: MixedTarget(*values),
    serialized_type_name="reg_kernels.augment.MixedTarget",
    flatten_with_keys_fn=lambda target: (
        [(pytree.GetAttrKey(name), getattr(target, name)) for name in _FIELDS],
        None,
    ),
)
# A saved program holds its example inputs, which torch.load reads by weights_only.
torch.serialization.add_safe_globals([MixedTarget])
