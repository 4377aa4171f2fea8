"""Mixup and CutMix of a batch: what to mix is drawn here, on the batch's device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .. import _part, backends
from .._dtypes import named
from .._mixed_target import MixedTarget
from .._numbers import integer, number, probability, refuse
from ..ops._checks import check_tensor
from ..ops._modes import is_fake
from ..ops.mixup import blend


class Mixing(NamedTuple):
    """How a batch is mixed: numbers of the whole batch, or of each sample, (N,)."""

    lam: Tensor  # float32, of the pixels outside of the boxes
    boxes: Tensor | None  # int64 (..., 4): x1, y1, x2, y2
    label_lam: Tensor  # float32


MODES = ("batch", "elem", "pair")
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: sets the seeds of an object's workers apart


class Mixup:
    r"""Blends each sample with its partner, or pastes a box of it, and mixes their labels alike.

    It takes the arguments of timm's `Mixup`, makes one pass over the batch and does not wait for a
    GPU. The partner of sample n of N is sample N - 1 - n; in a batch of odd size the middle sample
    is its own. Mixup computes :math:`\lambda x_n + (1 - \lambda) x_{N-1-n}` with :math:`\lambda
    \sim \mathrm{Beta}(\alpha, \alpha)`. CutMix pastes a box whose sides are :math:`\sqrt{1 -
    \lambda}` of the image's. The box lies around a pixel that is drawn from the image, and is
    clipped to the image.

    Args:
        mixup_alpha: :math:`\alpha` of Mixup; 0 makes no Mixup.
        cutmix_alpha: :math:`\alpha` of CutMix; 0 makes no CutMix.
        cutmix_minmax: (least, most), the shares of the image's sides that a box's sides have,
            instead of sides by lambda. Each length in between and each place is equally likely. It
            sets `cutmix_alpha` to 1.
        prob: the probability that a batch, sample or pair is mixed at all.
        switch_prob: the probability of CutMix where both are possible.
        mode: what has a draw of its own: the "batch", each sample ("elem"), or each two partners
            ("pair").
        correct_lam: True makes the labels' lambda the share of the image outside the box. False
            leaves it what was drawn, although the box is clipped and its sides are rounded down to
            even numbers. With `cutmix_minmax` it always is that share.
        label_smoothing: the smoothing of the target, in [0, 1].
        num_classes: the number of classes, against which labels are checked on the CPU. None checks
            nothing.
        seed: the seed of a random generator of the object's own, one for each device. None uses
            torch's generators, under `torch.manual_seed`. In a worker of a DataLoader the draws
            depend on the worker's seed too, which follows `torch.manual_seed` and differs from
            epoch to epoch.
        mean: the mean of each channel, for a normalisation in the same pass, as in
            `functional.mixup`: numbers, or tensors on the batch's device.
        std: the deviation of each channel, in the same way.
        dtype: the dtype of the mixed batch. None takes the input's, and torch's default for bytes.
        inplace: True writes over the input.
        dense: True returns class probabilities (N, num_classes), float32, instead of a
            `MixedTarget`, for losses that know nothing else, as timm's `SoftTargetCrossEntropy`.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Call it as `mixup(input, target)`. The input is (N, C, H, W) or (N, H, W), or, where nothing can
    be cut, any (N, ...); its dtypes are those of `functional.mixup`. The target holds class indices
    (N,), int64, on the same device. A call returns the mixed batch, whose gradient goes to the
    input, and a `MixedTarget`. Its `lam` is float32, one number in mode "batch" and (N,) otherwise.
    With `dense` a call returns what the `MixedTarget`'s `to_dense` would.

    Raises:
        ValueError: an argument is out of its range, or both alphas are 0. At a call: the target has
            another shape, or an input that could be cut is no image.
        IndexError: at a call, on the CPU: a label is outside [0, num_classes).
        TypeError, RuntimeError: a type, dtype or device is another one, as in `functional.mixup`.

    While its attribute `mixup_enabled` is False, as timm's, a batch is normalised and no more. It
    may be part of a DataLoader's collate_fn. As the last transform of a `Pipeline` it draws by the
    pipeline's seed and the samples' indices instead. Without a `seed`,
    `torch.compile(fullgraph=True)` and `torch.export` take it.

    With `distributed.shard`, or inside of `distributed.batch`, each sample has the lambda and the
    box that one process would have drawn for its place in the batch of all ranks, and a lambda of
    the batch is the same on all ranks. Partners are samples of one rank: no image goes to another
    one. So mixed batches, and losses, depend on the number of ranks.

    Example::

        mixup = reg_kernels.augment.Mixup(0.8, cutmix_alpha=1.0, num_classes=10)
        criterion = reg_kernels.nn.CrossEntropyLoss()
        input, target = mixup(input, target)
        loss = criterion(model(input), target)

    Source: H. Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018; S. Yun et al.,
    "CutMix: regularization strategy to train strong classifiers with localizable features", ICCV
    2019; the interface is that of R. Wightman's timm.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int | None = 1000,
        *,
        seed: int | None = None,
        mean: Tensor | Sequence[float] | float | None = None,
        std: Tensor | Sequence[float] | float | None = None,
        dtype: torch.dtype | None = None,
        inplace: bool = False,
        dense: bool = False,
        backend: str | None = None,
    ) -> None:
        mixup_alpha = number("Mixup", "mixup_alpha", mixup_alpha)
        cutmix_alpha = number("Mixup", "cutmix_alpha", cutmix_alpha)
        prob = probability("Mixup", "prob", prob)
        switch_prob = probability("Mixup", "switch_prob", switch_prob)
        label_smoothing = probability("Mixup", "label_smoothing", label_smoothing)
        if cutmix_minmax is not None:
            cutmix_minmax = _checked_minmax(cutmix_minmax)
            cutmix_alpha = 1.0
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not (alpha >= 0 and math.isfinite(alpha)):
                raise ValueError(f"Mixup: {name} must be finite and not negative, got {alpha}")
        if mixup_alpha == cutmix_alpha == 0:
            raise ValueError(
                "Mixup: mixup_alpha or cutmix_alpha must be positive, or cutmix_minmax given"
            )
        if mode not in MODES:
            raise ValueError(f"Mixup: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if num_classes is not None:
            num_classes = integer("Mixup", "num_classes", num_classes)
            if num_classes < 1:
                raise ValueError(f"Mixup: num_classes must be at least 1, got {num_classes}")
        elif dense:
            raise ValueError("Mixup: num_classes must be given for a dense target")
        if seed is not None:
            seed = integer("Mixup", "seed", seed)
        if backend is not None:
            backends.check_name(backend, "backend")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        self.mix_prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.correct_lam = correct_lam
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.seed = seed
        self.mean = mean
        self.std = std
        self.dtype = dtype
        self.inplace = inplace
        self.dense = dense
        self.backend = backend
        self.mixup_enabled = True
        self._sharding: _part.Sharding | None = None  # `distributed.shard` sets it
        # (device, seed of the DataLoader's worker, or None outside of one) -> generator
        self._generators: dict[tuple[str, int | None], torch.Generator] = {}

    def __repr__(self) -> str:
        kinds = ("mixup_alpha", "cutmix_alpha", "cutmix_minmax", "mix_prob", "switch_prob")
        names = (*kinds, *_OPTIONS[1:])
        shown = (f"{name.removeprefix('mix_')}={getattr(self, name)!r}" for name in names)
        return f"Mixup({', '.join(shown)})"

    def __call__(self, input: Tensor, target: Tensor) -> tuple[Tensor, MixedTarget | Tensor]:
        return self.mix(input, target, lambda: self._drawn(input))

    def mix(
        self, input: Tensor, target: Tensor, draw: Callable[[], Mixing]
    ) -> tuple[Tensor, MixedTarget | Tensor]:
        """What a call does with `input` and `target`: mixes by what `draw` returns, which is called
        once these two have been checked. A `Pipeline` draws by its own seed."""
        self._check(input, target)
        lam, boxes, label_lam = draw()
        normalisation = (self.mean, self.std, self.dtype)
        # Gray images have one channel, whether this batch is cut or not.
        gray = self._cuts and input.dim() == 3
        images = input.unsqueeze(1) if gray else input
        mixed = blend(
            *("Mixup", images, lam, boxes, None, *normalisation),
            inplace=self.inplace,
            backend=self.backend,
        )
        if gray:
            mixed = input if self.inplace else mixed.squeeze(1)
        mixed_target = MixedTarget(target, target.flip(0), label_lam, self.label_smoothing)
        if not self.dense:
            return mixed, mixed_target
        assert self.num_classes is not None  # without it nobody gets a dense target
        return mixed, mixed_target.to_dense(self.num_classes)

    def _check(self, input: Any, target: Any) -> None:
        for name, value in (("input", input), ("target", target)):
            check_tensor("Mixup", name, value)
        if input.dim() < (3 if self._cuts else 1):
            expected = "images (N, C, H, W) or (N, H, W)" if self._cuts else "a batch (N, ...)"
            raise ValueError(f"Mixup: input must be {expected}, got {input.dim()} dimensions")
        if target.dtype != torch.int64:
            dtype = named(target.dtype)
            raise RuntimeError(f"Mixup: target must be int64 class indices, got {dtype}")
        if target.shape != input.shape[:1]:
            raise ValueError(
                f"Mixup: target must be ({len(input)},), a label for each sample, "
                f"got shape {tuple(target.shape)}"
            )
        if target.device != input.device:
            raise RuntimeError(
                f"Mixup: target must be on the input's device, {input.device}, got {target.device}"
            )
        # On a GPU looking would wait; a loss finds out there.
        on_cpu = target.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.num_classes is None or not on_cpu or is_fake() or target.numel() == 0:
            return
        least, most = (int(value) for value in target.aminmax())
        if least < 0 or most >= self.num_classes:
            wrong = least if least < 0 else most
            raise IndexError(f"Mixup: labels must be in [0, {self.num_classes}), got {wrong}")

    @property
    def _mixes(self) -> bool:
        return self.mixup_alpha > 0 and (self.cutmix_alpha == 0 or self.switch_prob < 1)

    @property
    def _cuts(self) -> bool:
        return self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or self.switch_prob > 0)

    def _drawn(self, input: Tensor) -> Mixing:
        """As one process would draw it for the batch of all ranks, and of that this rank's part; a
        pair, which is one within a rank, has the draws of a pair there."""
        part, samples = None, len(input)
        if self._draws:
            part = _part.of_batch(self._sharding, "Mixup", samples)
        source = _Generated(input, self)
        if part is None or self.mode == "batch":
            return self.draw(input.shape, source)
        drawn = self.draw((part.total, *input.shape[1:]), source)
        if self.mode == "elem":
            rows = slice(part.first, part.first + samples)
            return Mixing(*(x if x is None else x[rows] for x in drawn))  # type: ignore[arg-type]
        rows = slice(part.first // 2, part.first // 2 + (samples + 1) // 2)
        of_pairs = (x if x is None else _of_pairs(x[rows], samples) for x in drawn)
        return Mixing(*of_pairs)  # type: ignore[arg-type]

    @property
    def _draws(self) -> bool:
        return self.mixup_enabled and self.mix_prob > 0

    def draw(self, shape: Sequence[int], source: Any) -> Mixing:
        """For a batch of that shape, from `source`, on whose device it is."""
        samples = shape[0]
        count = {"batch": 1, "elem": samples, "pair": (samples + 1) // 2}[self.mode]
        if not self._draws:
            ones = torch.ones(count, dtype=torch.float32, device=source.device)
            ones = self._of_samples(ones, samples)
            return Mixing(ones, None, ones)
        # In float64, where 1 - lambda and a pixel's coordinate keep their digits.
        options: Any = {"dtype": torch.float64, "device": source.device}
        alpha = torch.full(
            (count,), self.mixup_alpha if self._mixes else self.cutmix_alpha, **options
        )
        if not self._cuts and self.mix_prob == 1:
            lam = self._of_samples(source.beta(alpha).float(), samples)
            return Mixing(lam, None, lam)
        active, choice, *places = source.uniform(alpha).unbind()
        mixed = active < self.mix_prob
        cut = mixed & (choice < self.switch_prob) if self._mixes else mixed
        if self._mixes and self._cuts:
            alpha = alpha.masked_fill(cut, self.cutmix_alpha)
        lam = source.beta(alpha).masked_fill(~mixed, 1.0)
        if not self._cuts:
            lam = self._of_samples(lam.float(), samples)
            return Mixing(lam, None, lam)
        height, width = shape[-2:]
        y1, y2 = self._side(height, lam, *places[:2])
        x1, x2 = self._side(width, lam, *places[2:])
        boxes = torch.stack((x1, y1, x2, y2), 1) * cut.unsqueeze(1)
        label_lam = lam
        if self.correct_lam or self.cutmix_minmax is not None:
            area = (x2 - x1) * (y2 - y1)
            label_lam = torch.where(cut, 1 - area / max(height * width, 1), lam)
        lam = lam.masked_fill(cut, 1.0)  # around a box nothing is blended
        return Mixing(
            self._of_samples(lam.float(), samples),
            self._of_samples(boxes.long(), samples),
            self._of_samples(label_lam.float(), samples),
        )

    def _side(self, side: int, lam: Tensor, place: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Where boxes begin and end along a side of the image; `place` and `size` are uniform."""
        if self.cutmix_minmax is None:
            half = ((1 - lam).sqrt() * (side / 2)).floor()
            centre = (place * side).floor()
            return (centre - half).clamp(min=0), (centre + half).clamp(max=side)
        least, most = (int(share * side) for share in self.cutmix_minmax)
        length = least + (size * (most - least + 1)).floor()
        begin = (place * (side - length + 1)).floor()
        return begin, begin + length

    def _of_samples(self, drawn: Tensor, samples: int) -> Tensor:
        """Spreads what was drawn over the N samples: one for all, or (N, ...)."""
        if self.mode == "batch":
            return drawn[0]
        return drawn if self.mode == "elem" else _of_pairs(drawn, samples)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        worker = get_worker_info()
        key = (str(device), None if worker is None else worker.seed)
        if key not in self._generators:
            seed = self.seed if worker is None else self.seed * _ODD + worker.seed
            self._generators[key] = torch.Generator(device).manual_seed(seed % 2**63)
        return self._generators[key]


class MixUp(Mixup):
    """Blends each sample with its partner: torchvision's transform of this name.

    Args:
        alpha: of the Beta distribution, as `Mixup`'s `mixup_alpha`.
        num_classes: as in `Mixup`.
        options: further arguments of `Mixup`. `label_smoothing` is 0 by default.

    The partner is the sample as far from the batch's end, where torchvision's is the one before it;
    and a call returns a `MixedTarget`, or class probabilities with `dense=True`. Formula, shapes
    and errors are those of `Mixup`.

    Source: H. Zhang et al., "mixup", ICLR 2018; `torchvision.transforms.v2.MixUp`.
    """

    def __init__(
        self, *, alpha: float = 1.0, num_classes: int | None = None, **options: Any
    ) -> None:
        alphas = {"mixup_alpha": alpha, "cutmix_alpha": 0.0, "label_smoothing": 0.0}
        super().__init__(num_classes=num_classes, **alphas | options)


class CutMix(Mixup):
    """Pastes a box of its partner into each sample: torchvision's transform of this name.

    Args:
        alpha: of the Beta distribution, as `Mixup`'s `cutmix_alpha`.
        num_classes: as in `Mixup`.
        options: further arguments of `Mixup`. `label_smoothing` is 0 by default.

    What differs from torchvision is as of `MixUp`. Formula, shapes and errors are those of `Mixup`.

    Source: S. Yun et al., "CutMix", ICCV 2019; `torchvision.transforms.v2.CutMix`.
    """

    def __init__(
        self, *, alpha: float = 1.0, num_classes: int | None = None, **options: Any
    ) -> None:
        alphas = {"mixup_alpha": 0.0, "cutmix_alpha": alpha, "label_smoothing": 0.0}
        super().__init__(num_classes=num_classes, **alphas | options)


class RandomChoice(Mixup):
    """Does one of a `CutMix` and a `MixUp`, chosen for each batch: torchvision's usual
    `RandomChoice([CutMix(), MixUp()])`. It is the `Mixup` that has both alphas.

    Args:
        transforms: a `CutMix` and a `MixUp` in any order, which differ in `alpha` alone.
        p: how likely each is, not negative; divided by their sum. None: all are as likely.

    Raises:
        ValueError: the transforms are others. A transform of images has a `p` of its own.

    Formula and shapes are those of `Mixup`.

    Source: `torchvision.transforms.v2.RandomChoice`.
    """

    def __init__(self, transforms: Sequence[Mixup], p: Sequence[float] | None = None) -> None:
        kinds = {type(transform): transform for transform in transforms}
        if len(transforms) != 2 or set(kinds) != {CutMix, MixUp}:
            names = ", ".join(type(transform).__name__ for transform in transforms)
            must = "a CutMix and a MixUp; transforms of images have a p of their own"
            refuse("RandomChoice", "transforms", must, names or "none", ValueError)
        cut, blended = kinds[CutMix], kinds[MixUp]
        p = [number("RandomChoice", "p", x) for x in ((1, 1) if p is None else p)]
        if len(p) != 2 or min(p) < 0 or not 0 < sum(p) < math.inf:
            must = "a number for each transform, not negative, of a positive sum"
            refuse("RandomChoice", "p", must, p, ValueError)
        shared: dict[str, Any] = dict.fromkeys(_OPTIONS)
        for name in shared:
            shared[name], other = getattr(cut, name), getattr(blended, name)
            if repr(shared[name]) != repr(other):
                got = f"{name} of {shared[name]!r} and {other!r}"
                refuse("RandomChoice", "transforms", "alike but for alpha", got, ValueError)
        super().__init__(
            blended.mixup_alpha,
            cut.cutmix_alpha,
            cut.cutmix_minmax,
            switch_prob=p[[*map(type, transforms)].index(CutMix)] / sum(p),
            **{name.removeprefix("mix_"): value for name, value in shared.items()},
        )


_OPTIONS = (
    *("mix_prob", "mode", "correct_lam", "label_smoothing", "num_classes", "seed", "mean", "std"),
    *("dtype", "inplace", "dense", "backend"),
)


class _Generated:
    """Draws from torch's generators, or from the object's own, for an alpha of each draw."""

    def __init__(self, input: Any, mixup: Mixup) -> None:
        self.device, self._mixup = input.device, mixup

    def uniform(self, alpha: Tensor) -> Tensor:
        """(6, n), in [0, 1)."""
        generator = self._mixup._generator(self.device)
        return alpha.new_empty(6, len(alpha)).uniform_(generator=generator)

    def beta(self, alpha: Tensor) -> Tensor:
        return _draw_beta(alpha, self._mixup._generator(self.device))


def _of_pairs(drawn: Tensor, samples: int) -> Tensor:
    """Spreads what was drawn for each pair over its two samples; one in the middle is its own."""
    return torch.cat((drawn, drawn[: samples // 2].flip(0)))


def _checked_minmax(minmax: Sequence[float]) -> tuple[float, float]:
    if not (len(minmax) == 2 and 0.0 <= minmax[0] <= minmax[1] <= 1.0):
        raise ValueError(
            "Mixup: cutmix_minmax must be two shares of a side, 0 <= least <= most <= 1, "
            f"got {tuple(minmax)}"
        )
    return float(minmax[0]), float(minmax[1])


def _draw_beta(alpha: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws a number of Beta(alpha, alpha) for each alpha, (n,) float64.

    It is X / (X + Y), X and Y of Gamma(alpha), each the product of one of Gamma(alpha + 1) and of
    U^(1 / alpha), U uniform. By logarithms, since for an alpha of 0.01 or less X and Y themselves
    underflow, and 0 / 0 or 1/2 would come of it where 0 or 1 is due.
    """
    gamma = torch._standard_gamma((alpha + 1).expand(2, -1), generator).log()
    exponential = torch.empty_like(gamma).exponential_(generator=generator)  # -log U
    odds = gamma[0] - gamma[1] + (exponential[1] - exponential[0]) / alpha
    return odds.sigmoid()
