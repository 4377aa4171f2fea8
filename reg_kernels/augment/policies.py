"""RandAugment and its relatives: operations chosen at random, each with a strength of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._augment_program import Op
from . import _draws
from ._assemble import Assembly
from ._policy_ops import BLUR_RADIUS, NUMBER, add
from ._policy_tables import CIFAR10, IMAGENET, SVHN
from ._transform import Transform, Values, warp_filter

RAND_OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
_SIGNED = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
)
_ENHANCERS = _SIGNED[5:]


class Scale(NamedTuple):
    """What the last bin of each kind of operation is."""

    shear: float
    rotate: float
    enhance: float
    bits: float  # Posterize keeps bits - bin / (bins - 1) * steps
    steps: float
    shift: Callable[[float], float]  # in pixels, of a side


RAND = Scale(0.3, 30.0, 0.9, 8, 4, lambda side: 150.0 / 331.0 * side)
WIDE = Scale(0.99, 135.0, 0.99, 8, 6, lambda side: 32.0)
MIXED = Scale(0.3, 30.0, 0.9, 4, 4, lambda side: side / 3.0)


def _linear(first: float, last: float, bins: int) -> Tensor:
    """torchvision's float32 numbers, so that whole pixels are the same ones."""
    return torch.linspace(first, last, bins, dtype=torch.float32).double()


@functools.cache
def strengths_by_bin(scale: Scale, names: tuple[str, ...], bins: int) -> Tensor:
    """(operations, bins); 0 of shifts, which go by an image's side."""
    tops = {"Rotate": scale.rotate} | dict.fromkeys(_ENHANCERS, scale.enhance)
    tops |= dict.fromkeys(("ShearX", "ShearY"), scale.shear)
    rows = {name: _linear(0.0, tops.get(name, 0.0), bins) for name in names}
    step = (bins - 1) / scale.steps
    bits = scale.bits - torch.arange(bins, dtype=torch.float32) / step
    rows |= {"Posterize": bits.round().double(), "Solarize": _linear(1.0, 0.0, bins)}
    return torch.stack([rows[name] for name in names])


@functools.cache
def shifts_by_bin(scale: Scale, bins: int, side: float) -> Tensor:
    return _linear(0.0, scale.shift(side), bins).trunc()


@functools.cache
def _kinds(names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each operation its number, whether it has a sign, and what is added to its strength."""
    numbers = torch.tensor([float(NUMBER[name]) for name in names], dtype=torch.float64)
    signed = torch.tensor([name in _SIGNED for name in names])
    offsets = torch.tensor([float(name in _ENHANCERS) for name in names], dtype=torch.float64)
    return numbers, signed, offsets


def _strengths(
    scale: Scale,
    names: tuple[str, ...],
    count: int,
    choice: Tensor,
    bins: Tensor | int,
    negative: Tensor,
    height: Tensor,
    width: Tensor,
) -> Tensor:
    """Of operations, their bins of `count`, and whether those with a sign have the negative one."""
    strengths = strengths_by_bin(scale, names, count).take(choice * count + bins)
    for name, side in (("TranslateX", width), ("TranslateY", height)):
        sides, which = side.unique(return_inverse=True)
        rows = [shifts_by_bin(scale, count, side) for side in sides.tolist()]
        shifts = torch.stack(rows).take(which * count + bins)
        strengths = torch.where(choice == names.index(name), shifts, strengths)
    _, signed, offsets = _kinds(names)
    negative = negative & signed.take(choice)
    return torch.where(negative, -strengths, strengths) + offsets.take(choice)


@functools.lru_cache
def _all_strengths(
    scale: Scale, names: tuple[str, ...], count: int, height: int, width: int
) -> Tensor:
    """Of images of one size: (operations, bins, 2), the positive ones first."""
    choice = torch.arange(len(names)).view(-1, 1, 1)
    bins, negative = torch.arange(count).unsqueeze(1), torch.tensor([False, True])
    choice, bins, negative = torch.broadcast_tensors(choice, bins, negative)
    sides = (torch.tensor(float(side), dtype=torch.float64) for side in (height, width))
    return _strengths(scale, names, count, choice, bins, negative, *sides)


class _Policy(Transform):
    """What chooses from `names` and draws bins and signs."""

    step_columns: tuple[str, ...] = ("op", "strength")  # what one operation goes by
    scale: ClassVar[Scale] = RAND
    names: tuple[str, ...] = RAND_OPS
    bins: int

    def _set_warp(self, interpolation: Any, fill: Any) -> None:
        self.interpolation = interpolation
        self.filter = warp_filter(self, interpolation)
        self.fill = self._fill(fill)

    def _numbers(self, choice: Tensor) -> Tensor:
        return _kinds(self.names)[0].take(choice)

    def _strengths(
        self, choice: Tensor, bins: Tensor | int, sign: Tensor, assembly: Assembly
    ) -> Tensor:
        """Of operations (K, N), their bins, and uniform numbers for the signs."""
        kind = (self.scale, self.names, self.bins)
        negative = sign <= 0.5
        if assembly.sides is None:
            return _strengths(*kind, choice, bins, negative, assembly.height, assembly.width)
        return _all_strengths(*kind, *assembly.sides).take(
            (choice * self.bins).add_(bins).mul_(2).add_(negative)
        )

    def _columns(self, count: int) -> tuple[str, ...]:
        return tuple(f"{name}{k}" for name in ("op", "strength") for k in range(1, count + 1))

    def _stacked(self, values: Values, what: str, count: int) -> Tensor:
        return torch.stack([values[f"{what}{k}"] for k in range(1, count + 1)])

    def _add(self, values: Values, count: int, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(1, 3)
        ops, strengths = (self._stacked(values, what, count) for what in self.step_columns)
        add(assembly, ops, strengths, self.filter, self.fill, on)


class RandAugment(_Policy):
    """Does `num_ops` operations, each chosen from 14 with replacement, at one magnitude.

    An operation with a sign has either one with probability 1/2. Coordinates are rounded, and
    compared with the image's bounds, operation by operation.

    Args:
        num_ops: how many operations, 0 to 64.
        magnitude: the bin of the strength, from 0.
        num_magnitude_bins: the number of bins, from nothing to the operation's most.
        interpolation: as in `RandomRotation`.
        fill: as in `RandomRotation`.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: op1, op2, ... and strength1, strength2, ...: the number of an operation in `POLICY_OPS`
    and its strength: the tangent of a shear, pixels of a shift, degrees, an enhancer's factor, the
    bits that Posterize keeps, or Solarize's threshold as a share of the full range.

    Source: E. Cubuk et al., "RandAugment: practical automated data augmentation with a reduced
    search space", 2019; operations and ranges are those of `torchvision.transforms.v2.RandAugment`.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: str = "nearest",
        fill: float | Sequence[float] | None = None,
        *,
        p: float = 1.0,
    ) -> None:
        self.num_ops = self._integer("num_ops", num_ops, 0, 64)
        self.num_magnitude_bins = self._integer("num_magnitude_bins", num_magnitude_bins, 2)
        self.magnitude = self._integer("magnitude", magnitude, 0, self.num_magnitude_bins - 1)
        self.bins = self.num_magnitude_bins
        self._set_warp(interpolation, fill)
        self._set_p(p)
        self.columns = self._columns(self.num_ops)

    @property
    def needed_words(self) -> int:
        return 2 * self.num_ops

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        if not self.num_ops:
            return ()
        choice = _draws.integers(u[: self.num_ops], len(self.names)).long()
        strengths = self._strengths(choice, self.magnitude, u[self.num_ops :], assembly)
        return *self._numbers(choice), *strengths

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        if self.num_ops:
            self._add(values, self.num_ops, on, assembly)


class TrivialAugmentWide(_Policy):
    """Does one operation, chosen from 14, at a magnitude that is drawn too.

    Args:
        num_magnitude_bins: the number of bins, from nothing to the operation's most.
        interpolation: as in `RandomRotation`.
        fill: as in `RandomRotation`.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: op1 and strength1, as of `RandAugment`.

    Source: S. Müller, F. Hutter, "TrivialAugment: tuning-free yet state-of-the-art data
    augmentation", ICCV 2021; operations and ranges are those of
    `torchvision.transforms.v2.TrivialAugmentWide`.
    """

    scale = WIDE
    words = 3

    def __init__(
        self,
        num_magnitude_bins: int = 31,
        interpolation: str = "nearest",
        fill: float | Sequence[float] | None = None,
        *,
        p: float = 1.0,
    ) -> None:
        self.num_magnitude_bins = self._integer("num_magnitude_bins", num_magnitude_bins, 2)
        self.bins = self.num_magnitude_bins
        self._set_warp(interpolation, fill)
        self._set_p(p)
        self.columns = self._columns(1)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        choice = _draws.integers(u[:1], len(self.names)).long()
        bins = _draws.integers(u[1:2], self.bins).long()
        return *self._numbers(choice), *self._strengths(choice, bins, u[2:3], assembly)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        self._add(values, 1, on, assembly)


_POLICIES = {"imagenet": IMAGENET, "cifar10": CIFAR10, "svhn": SVHN}


class AutoAugment(_Policy):
    """Does one of a policy's 25 pairs of operations, each of the two with its probability.

    Args:
        policy: "imagenet", "cifar10" or "svhn".
        interpolation: as in `RandomRotation`.
        fill: as in `RandomRotation`.
        p: the probability that it applies.

    Raises:
        ValueError: there is no policy of that name, or another argument is out of its range.
        TypeError: an argument is of another type.

    Columns: op1, op2, strength1, strength2, as of `RandAugment`; an operation that is not done is
    Identity.

    Source: E. Cubuk et al., "AutoAugment: learning augmentation policies from data", CVPR 2019;
    operations and ranges are those of `torchvision.transforms.v2.AutoAugment`.
    """

    words = 5
    bins = 10
    names = (*RAND_OPS, "Invert")

    def __init__(
        self,
        policy: str = "imagenet",
        interpolation: str = "nearest",
        fill: float | Sequence[float] | None = None,
        *,
        p: float = 1.0,
    ) -> None:
        policy = getattr(policy, "value", policy)  # torchvision's
        if policy not in _POLICIES:
            self._refuse("policy", f"one of {', '.join(_POLICIES)}", repr(policy))
        self.policy = policy
        self._set_warp(interpolation, fill)
        self._set_p(p)
        self.columns = self._columns(2)
        steps = [step for pair in _POLICIES[policy] for step in pair]
        choices = [[self.names.index(name), strength] for name, _, strength in steps]
        self._choices = torch.tensor(choices, device="cpu").long().view(-1, 2, 2)
        own = [p for _, p, _ in steps]
        self._p = torch.tensor(own, dtype=torch.float64, device="cpu").view(-1, 2)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        pair = _draws.integers(u[0], len(self._p)).long()
        choice, bins = self._choices[pair].permute(2, 1, 0)
        choice = choice * (u[1:3] < self._p[pair].T)  # else Identity, the first one
        return *self._numbers(choice), *self._strengths(choice, bins, u[3:5], assembly)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        self._add(values, 2, on, assembly)


class _Mixing(_Policy):
    """What blends chains of operations with the image."""

    width: int
    depth: int  # of the longest chain
    alpha: float
    blurs = False

    @property
    def _weight_words(self) -> int:
        return (self.width + 2) * _draws.GAMMA_WORDS + self.width

    def _mix_columns(self) -> tuple[str, ...]:
        weights = (f"weight{k}" for k in range(1, self.width + 1))
        return ("original", *weights, *self._columns(self.width * self.depth))

    def _draw_weights(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the image and of the chains, which add up to 1, (1 + width, N), and which
        steps are done, (width, depth, N)."""
        words = u[: (self.width + 2) * _draws.GAMMA_WORDS].view(_draws.GAMMA_WORDS, -1)
        logs = _draws.log_gammas(self.alpha, words).view(self.width + 2, -1)
        original, mixed = logs[:2].softmax(0)
        weights = torch.cat((original.unsqueeze(0), logs[2:].softmax(0) * mixed))
        return weights, self._steps(u[-self.width :])

    def _steps(self, u: Tensor) -> Tensor:
        length = torch.full_like(u, self.depth)
        if self._draws_depth:
            length = _draws.integers(u, 3) + 1
        return torch.arange(self.depth).view(1, -1, 1) < length.unsqueeze(1)

    _draws_depth: bool

    def _set_depth(self, argument: str, depth: int) -> None:
        depth = self._integer(argument, depth, -1, 16)
        self._draws_depth = depth <= 0
        self.depth = 3 if depth <= 0 else depth

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(1, 3)
        count = self.width * self.depth
        assembly.colour(Op.SAVE, on, values["original"])
        stacks = [self._stacked(values, what, count) for what in self.step_columns]
        for chain in range(self.width):
            if assembly.mask is None:
                first = chain * self.depth
                steps = [stack[first : first + self.depth] for stack in stacks]
                self._add_chain(steps, on, assembly)
            assembly.colour(Op.JOIN, on, values[f"weight{chain + 1}"])
        assembly.colour(Op.MIX, on)

    def _add_chain(self, steps: list[Tensor], on: Tensor | None, assembly: Assembly) -> None:
        """Of `step_columns`, each (depth, N)."""
        ops, strengths = steps
        add(assembly, ops, strengths, self.filter, self.fill, on, is_seen=False)


class AugMix(_Mixing):
    r"""Blends the image with chains of operations on it.

    The result is :math:`m_0 x + m_1 \sum_i w_i c_i(x)` with :math:`w` of a Dirichlet distribution
    of `alpha` and :math:`m` of a Beta distribution of it. Masks, boxes and points stay as they are.

    Args:
        severity: the number of bins that a strength is drawn from, of 10.
        mixture_width: the number of chains, 1 to 8.
        chain_depth: the operations of a chain; -1 draws 1, 2 or 3.
        alpha: of both distributions, positive.
        all_ops: False leaves out brightness, contrast, colour and sharpness.
        interpolation: as in `RandomRotation`.
        fill: as in `RandomRotation`.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: original, the weight of the image; weight1, ..., those of the chains; op1, ... and
    strength1, ... as of `RandAugment`, chain by chain, each three or `chain_depth` long.

    Source: D. Hendrycks et al., "AugMix: a simple data processing method to improve robustness and
    uncertainty", ICLR 2020; ranges are torchvision's.
    """

    scale = MIXED
    bins = 10

    def __init__(
        self,
        severity: int = 3,
        mixture_width: int = 3,
        chain_depth: int = -1,
        alpha: float = 1.0,
        all_ops: bool = True,
        interpolation: str = "bilinear",
        fill: float | Sequence[float] | None = None,
        *,
        p: float = 1.0,
    ) -> None:
        self.severity = self._integer("severity", severity, 1, self.bins)
        self.mixture_width = self.width = self._integer("mixture_width", mixture_width, 1, 8)
        self.chain_depth = chain_depth
        self._set_depth("chain_depth", chain_depth)
        self.alpha = self._number("alpha", alpha, 1e-6)
        self.all_ops = bool(all_ops)
        left_out = ("Identity", *(() if self.all_ops else _ENHANCERS))
        self.names = tuple(name for name in RAND_OPS if name not in left_out)
        self._set_warp(interpolation, fill)
        self._set_p(p)
        self.columns = self._mix_columns()

    @property
    def needed_words(self) -> int:
        return self._weight_words + 3 * self.width * self.depth

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        count = self.width * self.depth
        drawn = u[: 3 * count].view(3, count, -1)
        choice = _draws.integers(drawn[0], len(self.names)).long()
        bins = _draws.integers(drawn[1], self.severity).long()
        weights, done = self._draw_weights(u[3 * count :])
        ops = self._numbers(choice) * done.view(count, -1)
        return *weights, *ops, *self._strengths(choice, bins, drawn[2], assembly)


class ThreeAugment(_Policy):
    r"""Does one of three: makes the image gray, solarises it from half of the range on, or blurs it
    with a deviation that is uniform from 0.1 to 2 pixels, as `Grayscale`, `RandomSolarize` and
    `GaussianBlur` do.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Columns: op1 and strength1, as of `RandAugment`.

    Source: H. Touvron, M. Cord, H. Jégou, "DeiT III: revenge of the ViT", ECCV 2022; with
    `ColorJitter` beside it, it is the paper's 3-Augment.
    """

    words = 2

    def __init__(self, *, p: float = 1.0) -> None:
        self._set_p(p)
        self.columns = self._columns(1)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        names = ("Color", "Solarize", "GaussianBlur")
        ops = torch.tensor([float(NUMBER[name]) for name in names], dtype=torch.float64)
        choice = _draws.integers(u[0], len(names)).long()
        fixed = torch.tensor([0.0, 128 / 255, 0.0], dtype=torch.float64)[choice]
        return ops[choice], torch.where(choice == 2, _draws.between(u[1], (0.1, 2.0)), fixed)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(1, 3)
        check_blur(assembly)
        ops, strengths = (values[what].unsqueeze(0) for what in ("op1", "strength1"))
        add(assembly, ops, strengths, warp_filter(self, "nearest"), None, on, blurs=True)


def check_blur(assembly: Assembly) -> None:
    if assembly.mask is None:
        least = int(min(assembly.height.min(), assembly.width.min()))
        if least <= BLUR_RADIUS:
            assembly.refuse("images", f"larger than {BLUR_RADIUS} pixels to be blurred", least)
