"""Transforms of a pixel's colour, of what is known of the whole image, or of its neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._augment_program import LARGEST_RADIUS, Axes, Op
from . import _draws
from ._assemble import Assembly
from ._transform import Transform, Values

_ORDERS = list(itertools.permutations(range(4)))
_PERMUTATIONS = list(itertools.permutations(range(3)))
_CHANNEL_ORDERS = torch.tensor(_PERMUTATIONS, dtype=torch.float64, device="cpu").T.contiguous()


def _factors(transform: Transform, argument: str, value: Any) -> tuple[float, float] | None:
    """The range of a factor: a number v for 1 - v to 1 + v, and None for none."""
    return None if value is None else transform._spread(argument, value, 1.0, 0.0)


def _shifts(transform: Transform, value: Any) -> tuple[float, float] | None:
    return None if value is None else transform._spread("hue", value, 0.0, -0.5, 0.5)


class Grayscale(Transform):
    """Makes the image gray, 0.2989 R + 0.587 G + 0.114 B.

    Args:
        num_output_channels: 1, or 3 that are all the same.
        p: the probability that it applies; with one channel it always does.

    Shape: images (N, C, H, W) become (N, num_output_channels, H, W).

    Raises:
        ValueError: `num_output_channels` is neither 1 nor 3, or `p` is out of its range.

    Source: `torchvision.transforms.v2.Grayscale`.
    """

    def __init__(self, num_output_channels: int = 1, *, p: float = 1.0) -> None:
        if num_output_channels not in (1, 3):
            self._refuse("num_output_channels", "1 or 3", num_output_channels)
        self.num_output_channels = num_output_channels
        self.always = "one channel" if num_output_channels == 1 else None
        self._set_p(p)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(1, 3)
        if assembly.channels == 3:
            assembly.colour(Op.GRAYSCALE, on)
            assembly.channels = self.num_output_channels

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        return (self,) if self.p == 1 else ()


class RandomGrayscale(Transform):
    """Makes all three channels gray, with probability `p`.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Source: `torchvision.transforms.v2.RandomGrayscale`.
    """

    def __init__(self, p: float = 0.1) -> None:
        self._set_p(p)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(1, 3)
        if assembly.channels == 3:
            assembly.colour(Op.GRAYSCALE, on)


_JITTER = (Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def _of_steps(orders: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Of each order: which of the four is at each step, (4, orders); and of it, (4, 4, orders), its
    opcode, its opcode for gray images, its neutral factor, and whether it has a rest."""
    places = torch.tensor(orders, device="cpu").T.contiguous()
    opcodes = [float(op) for op in _JITTER]
    kinds = [opcodes, [*opcodes[:2], 0.0, 0.0], _NEUTRAL, [0.0, 1.0, 1.0, 0.0]]
    return places, torch.stack(
        [torch.tensor(kind, dtype=torch.float64, device="cpu")[places] for kind in kinds]
    )


def _jitter(
    values: Values, order: Tensor, orders: tuple[Tensor, Tensor], on: Tensor | None, a: Assembly
) -> None:
    """Adds the four instructions, in the order of that number, of the four factors."""
    number = order.long()
    factors = torch.stack(
        [values[name] for name in ("brightness", "contrast", "saturation", "hue")]
    )
    used = factors.gather(0, orders[0].index_select(1, number))
    opcode, gray_opcode, neutral, has_rest = orders[1].index_select(2, number)
    is_done = used != neutral
    if on is not None:
        is_done &= on
    opcode = (gray_opcode if a.channels == 1 else opcode) * is_done
    a.several(torch.stack((opcode, used, (1 - used).mul_(has_rest))))


_JITTER_STEPS = _of_steps(_ORDERS)
_DISTORT_STEPS = _of_steps([(0, 2, 3, 1), (0, 1, 2, 3)])  # contrast last, contrast first


class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue by random amounts, in a random order.

    Args:
        brightness: the range of the factor, (low, high), or a number v for max(0, 1 - v) to 1 + v.
        contrast: in the same way; the image is blended with its mean gray.
        saturation: in the same way; the image is blended with its gray.
        hue: the range of the shift, in turns, within [-0.5, 0.5], or a number v for (-v, v).
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range, or a range is not two numbers in order.
        TypeError: an argument is of another type.

    A range that is None is left out. Columns: brightness, contrast, saturation, hue, and order,
    the number of the permutation of these four among itertools.permutations.

    Source: `torchvision.transforms.v2.ColorJitter`.
    """

    words = 5
    columns = ("brightness", "contrast", "saturation", "hue", "order")

    def __init__(
        self,
        brightness: float | Sequence[float] | None = None,
        contrast: float | Sequence[float] | None = None,
        saturation: float | Sequence[float] | None = None,
        hue: float | Sequence[float] | None = None,
        *,
        p: float = 1.0,
    ) -> None:
        self.brightness = _factors(self, "brightness", brightness)
        self.contrast = _factors(self, "contrast", contrast)
        self.saturation = _factors(self, "saturation", saturation)
        self.hue = _shifts(self, hue)
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor | float]:
        limits = (self.brightness, self.contrast, self.saturation, self.hue)
        drawn = _draws.between_each(
            u[:4], tuple(x or (n, n) for x, n in zip(limits, _NEUTRAL, strict=True))
        )
        return *drawn.unbind(), _draws.integers(u[4], len(_ORDERS))

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(1, 3)
        _jitter(values, values["order"], _JITTER_STEPS, on, assembly)


class RandomPhotometricDistort(Transform):
    """Distorts brightness, contrast, saturation and hue, each with probability `p`, contrast before
    or after the other two by a coin, and permutes the channels with probability `p`.

    Args:
        brightness: the range of the factor.
        contrast: the range of the factor.
        saturation: the range of the factor.
        hue: the range of the shift, in turns.
        p: the probability of each of the five.

    Raises:
        ValueError: an argument is out of its range, or a range is not two numbers in order.
        TypeError: an argument is of another type.

    Columns: brightness, contrast, saturation, hue (1 or 0 where it does not apply), contrast_first,
    permutation: the number of the channels' order among itertools.permutations.

    Source: W. Liu et al., "SSD: single shot multibox detector", ECCV 2016;
    `torchvision.transforms.v2.RandomPhotometricDistort`.
    """

    words = 11
    columns = ("brightness", "contrast", "saturation", "hue", "contrast_first", "permutation")

    def __init__(
        self,
        brightness: Sequence[float] = (0.875, 1.125),
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: Sequence[float] = (-0.05, 0.05),
        p: float = 0.5,
    ) -> None:
        self.brightness = self._range("brightness", brightness, 0.0)
        self.contrast = self._range("contrast", contrast, 0.0)
        self.saturation = self._range("saturation", saturation, 0.0)
        self.hue = self._range("hue", hue, -0.5, 0.5)
        self.each = self._number("p", p, 0.0, 1.0)

    def __repr__(self) -> str:
        ranges = (f"{name}={getattr(self, name)}" for name in self.columns[:4])
        return f"RandomPhotometricDistort({', '.join(ranges)}, p={self.each})"

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        limits = (self.brightness, self.contrast, self.saturation, self.hue)
        neutral = _draws.between_each(u[:4], tuple((n, n) for n in _NEUTRAL))
        drawn = torch.where(u[:4] < self.each, _draws.between_each(u[4:8], limits), neutral)
        order = _draws.integers(u[10], len(_PERMUTATIONS)) * (u[9] < self.each)
        return *drawn.unbind(), (u[8] < 0.5).double(), order

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(1, 3)
        _jitter(values, values["contrast_first"], _DISTORT_STEPS, on, assembly)
        if assembly.channels == 3:
            is_drawn = values["permutation"] > 0
            _permute(values, is_drawn if on is None else on & is_drawn, assembly)


class RandomChannelPermutation(Transform):
    """Puts the three channels into a random order. Columns: permutation, the order's number among
    itertools.permutations.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Source: `torchvision.transforms.v2.RandomChannelPermutation`.
    """

    words = 1
    columns = ("permutation",)

    def __init__(self, *, p: float = 1.0) -> None:
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        return (_draws.integers(u[0], len(_PERMUTATIONS)),)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.check_channels(3)
        _permute(values, on, assembly)


def _permute(values: Values, on: Tensor | None, assembly: Assembly) -> None:
    order = _CHANNEL_ORDERS.index_select(1, values["permutation"].long())
    assembly.colour(Op.PERMUTE, on, *order.unbind())


class _Simple(Transform):
    """One instruction without draws, with probability `p`."""

    op: Op

    def __init__(self, p: float = 0.5) -> None:
        self._set_p(p)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.colour(self.op, on)


class RandomInvert(_Simple):
    """Inverts all values, :math:`1 - x` of x in [0, 1], with probability `p`.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Source: `torchvision.transforms.v2.RandomInvert`.
    """

    op = Op.INVERT


class RandomAutocontrast(_Simple):
    r"""Stretches each channel to the full range, with probability `p`.

    Of x in [0, 1] it makes :math:`(x - \min x) / (\max x - \min x)`.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Source: `torchvision.transforms.v2.RandomAutocontrast`.
    """

    op = Op.AUTOCONTRAST


class RandomEqualize(_Simple):
    """Equalises the histogram of each channel, as Pillow does, with probability `p`.

    Args:
        p: the probability that it applies.

    Raises:
        ValueError: `p` is outside [0, 1].
        TypeError: `p` is no number.

    Source: `torchvision.transforms.v2.RandomEqualize`.
    """

    op = Op.EQUALIZE


class RandomSolarize(Transform):
    """Inverts the values from a threshold on, to :math:`1 - x` of x in [0, 1], with probability
    `p`.

    Args:
        threshold: in the values of the pixels: 0 to 255 of bytes, 0 to 1 of floats.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Source: `torchvision.transforms.v2.RandomSolarize`.
    """

    def __init__(self, threshold: float, p: float = 0.5) -> None:
        self.threshold = self._number("threshold", threshold, 0.0, 255.0)
        self._set_p(p)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        most = assembly.bound / assembly.unit
        if self.threshold > most:
            assembly.refuse("threshold", f"at most {most:g}, the largest value", self.threshold)
        assembly.colour(Op.SOLARIZE, on, self.threshold * assembly.unit)


class RandomPosterize(Transform):
    """Keeps the highest bits of each value, with probability `p`.

    Args:
        bits: how many, from 0 (black) to 8.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Source: `torchvision.transforms.v2.RandomPosterize`.
    """

    def __init__(self, bits: int, p: float = 0.5) -> None:
        self.bits = self._integer("bits", bits, 0, 8)
        self._set_p(p)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.colour(Op.POSTERIZE, on, float(self.bits))


class RandomAdjustSharpness(Transform):
    """Blends the image with a smoothed one, with probability `p`.

    Args:
        sharpness_factor: not negative: 0 smooths, 1 changes nothing, 2 sharpens.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Source: `torchvision.transforms.v2.RandomAdjustSharpness`.
    """

    def __init__(self, sharpness_factor: float, p: float = 0.5) -> None:
        self.sharpness_factor = self._number("sharpness_factor", sharpness_factor, 0.0)
        self._set_p(p)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        factor = self.sharpness_factor
        assembly.colour(Op.SHARPNESS, on, factor, 1 - factor)


class GaussianBlur(Transform):
    r"""Smooths with weights :math:`w_k \propto \exp(-k^2 / 2 \sigma^2)`, reflected at the border.

    Args:
        kernel_size: (width, height) of the kernel, or one number for both; odd, 25 at most.
        sigma: the range of the deviation, or one number.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range, or a range is not two numbers in order.
        TypeError: an argument is of another type.

    Columns: sigma, in pixels.

    Source: `torchvision.transforms.v2.GaussianBlur`.
    """

    words = 1
    columns = ("sigma",)

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        sigma: float | Sequence[float] = (0.1, 2.0),
        *,
        p: float = 1.0,
    ) -> None:
        self.kernel_size = self._size("kernel_size", kernel_size)
        for side in self.kernel_size:
            if side % 2 == 0 or side // 2 > LARGEST_RADIUS:
                most = 2 * LARGEST_RADIUS + 1
                self._refuse("kernel_size", f"odd and at most {most}", self.kernel_size)
        sigma = sigma if isinstance(sigma, Sequence) else (sigma, sigma)
        self.sigma = self._range("sigma", sigma, 1e-3)
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        return (_draws.between(u[0], self.sigma),)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        along_x, along_y = (side // 2 for side in self.kernel_size)
        for radius, side in ((along_x, assembly.width), (along_y, assembly.height)):
            if assembly.mask is None and (side <= radius).any():
                must = "at most twice an image's side less 1, as far as it can be reflected"
                got = f"{2 * radius + 1} for a side of {int(side.min())}"
                assembly.refuse("kernel_size", must, got)
        plans = ((Axes.BOTH, along_x),)
        if along_x != along_y:
            plans = ((Axes.VERTICAL, along_y), (Axes.HORIZONTAL, along_x))  # type: ignore[assignment]
        for axes, radius in plans:
            weights = blur_weights(values["sigma"], radius)
            assembly.colour(Op.BLUR, on, float(axes), float(radius), *weights)


def blur_weights(sigma: Tensor, radius: int) -> Tensor:
    """The weights of distances 0 to radius, (radius + 1, N), whose sum over both sides is 1."""
    distance = torch.arange(radius + 1, dtype=torch.float64).unsqueeze(1)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)
    return weights / (2 * weights.sum(0) - weights[0])
