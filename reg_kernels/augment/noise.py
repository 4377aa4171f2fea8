"""Noise and erasing, and what makes floats of pixels at the end: normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._augment_program import EraseMode, Op
from . import _draws
from ._assemble import Assembly, Number
from ._transform import Transform, Values

_KEY = ("key0", "key1", "key2", "key3")


class GaussianNoise(Transform):
    r"""Adds :math:`\mathrm{mean} + \mathrm{sigma}\, z` to each element, z normal.

    Args:
        mean: in shares of the full range, as torchvision has it: 0.5 is 127.5 of bytes. After a
            `Normalize` both are in normalised units.
        sigma: likewise, not negative.
        clip: True clamps the result to the range of the pixels.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: key0 to key3, the key of the noise by 16 bits, the lowest first.

    Source: `torchvision.transforms.v2.GaussianNoise`.
    """

    words = 2
    columns = _KEY

    def __init__(
        self, mean: float = 0.0, sigma: float = 0.1, clip: bool = True, *, p: float = 1.0
    ) -> None:
        self.mean = self._number("mean", mean)
        self.sigma = self._number("sigma", sigma, 0.0)
        self.clip = bool(clip)
        self._set_p(p)
        self.after_normalize = not self.clip

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        return _draws.keys(*u)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        bound = 1.0 if assembly.is_normalized else assembly.bound
        key = (values[name] for name in _KEY)
        scaled = (self.mean * bound, self.sigma * bound, float(self.clip))
        assembly.colour(Op.NOISE, on, *scaled, *key)


class SaltAndPepper(Transform):
    """Replaces a share of the elements by the largest and the least value, as
    `functional.salt_and_pepper` does.

    Args:
        amount: the share of the elements, in [0, 1].
        salt_vs_pepper: the share of the largest value among those.
        p: the probability that it applies to an image.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: key0 to key3, as of `GaussianNoise`.

    Source: as for `functional.salt_and_pepper`.
    """

    words = 2
    columns = _KEY

    def __init__(
        self, amount: float = 0.05, salt_vs_pepper: float = 0.5, *, p: float = 1.0
    ) -> None:
        self.amount = self._number("amount", amount, 0.0, 1.0)
        self.salt_vs_pepper = self._number("salt_vs_pepper", salt_vs_pepper, 0.0, 1.0)
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        return _draws.keys(*u)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        key = (values[name] for name in _KEY)
        assembly.colour(Op.SALT_AND_PEPPER, on, self.amount, self.salt_vs_pepper, *key)


class _Erasing(Transform):
    after_normalize = True
    region = ("top", "left", "height", "width")
    words_of_region: int

    def _set_value(self, value: Any) -> None:
        """A number, one for each channel, "channel" or "random"."""
        if value in ("random", "pixel", "channel"):
            self.value: Any = value
        elif isinstance(value, str):
            must = 'a number, one for each channel, "channel" or "random"'
            self._refuse("value", must, repr(value))
        else:
            numbers = value if isinstance(value, Sequence) else (value,)
            self.value = tuple(self._number("value", x) for x in numbers)
        drawn = {"channel": tuple(f"value{c}" for c in range(4)), "random": _KEY, "pixel": _KEY}
        self.drawn = drawn.get(value, ()) if isinstance(value, str) else ()
        self.columns = (*self.region, *self.drawn)

    @property
    def needed_words(self) -> int:
        return self.words_of_region + {(): 0, _KEY: 2}.get(self.drawn, 8)

    def _draw_value(self, u: Tensor) -> Sequence[Tensor]:
        words = u[self.words_of_region :]
        if self.drawn == _KEY:
            return _draws.keys(words[0], words[1])
        return [_draws.normals(*words[2 * c : 2 * c + 2]) for c in range(len(self.drawn))]

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        is_drawn = values["height"] > 0
        on = is_drawn if on is None else on & is_drawn
        numbers: Sequence[Number] = (0.0,) * 4
        key: Sequence[Number] = ()
        mode = EraseMode.CONSTANT
        unit = 1.0 if assembly.is_normalized else assembly.unit
        of_bytes = not assembly.is_normalized and assembly.bound != 1 and assembly.mask is None
        # Normal numbers are black as values of bytes; those of a key have no scale.
        if self.drawn and of_bytes and (self.drawn == _KEY or unit == 1):
            assembly.refuse("value", "numbers where it erases bytes", repr(self.value))
        if not self.drawn:
            numbers = [x * unit for x in assembly.of_channels("value", self.value)]
        elif self.drawn == _KEY:
            mode, key = EraseMode.NORMAL, [values[name] for name in _KEY]
        else:
            numbers = [values[name] * unit for name in self.drawn]
        region = (values[name] for name in self.region)
        assembly.colour(Op.ERASE, on, *region, float(mode), *numbers, *key)


class RandomErasing(_Erasing):
    r"""Erases a rectangle of random area and shape, with probability `p`.

    Up to ten times an area :math:`a H W`, :math:`a` uniform in `scale`, and a ratio :math:`r`,
    whose logarithm is uniform, are drawn: the rectangle is :math:`\sqrt{a H W r}` high and
    :math:`\sqrt{a H W / r}` wide, rounded. The first that is smaller than the image both ways is
    erased, wherever it lies; if there is none, nothing is.

    Args:
        p: the probability that it applies.
        scale: the range of the area's share, in [0, 1].
        ratio: the range of height over width, positive.
        value: what is written: a number, one for each channel, "channel" (a normal number for each
            channel) or "random" (one for each element; "pixel" is the same). After a `Normalize`
            it is in normalised units, before it in the values of the pixels, where bytes take
            numbers alone.
        inplace: taken as torchvision takes it, and without effect.

    Raises:
        ValueError: an argument is out of its range, or a range is not two numbers in order.
        TypeError: an argument is of another type.

    Columns: top, left, height, width, in pixels (a height of 0: nothing), and value0 to value3 of
    "channel", key0 to key3 of "random".

    Source: Z. Zhong et al., "Random erasing data augmentation", AAAI 2020.
    """

    words_of_region = _draws.RECTANGLE_WORDS

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float | Sequence[float] | str = 0.0,
        inplace: bool = False,
    ) -> None:
        self._set_p(p)
        self.scale = self._range("scale", scale, 0.0, 1.0)
        self.ratio = self._range("ratio", ratio, 1e-6, 1e6)
        self._set_value(value)
        self.inplace = inplace

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        drawn, _ = _draws.rectangle(u, assembly.size(), self.scale, self.ratio, is_crop=False)
        return *drawn.unbind(), *self._draw_value(u)


class Cutout(_Erasing):
    r"""Erases a square around a pixel that is drawn from the image, clipped to the image.

    Around pixel :math:`(y, x)` it is rows :math:`y - \lfloor s / 2 \rfloor` to :math:`y - \lfloor
    s / 2 \rfloor + s - 1` for a side :math:`s`, and columns likewise.

    Args:
        size: the square's side.
        value: as in `RandomErasing`.
        p: the probability that it applies.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Columns: as of `RandomErasing`.

    Source: T. DeVries, G. Taylor, "Improved regularization of convolutional neural networks with
    cutout", 2017.
    """

    words_of_region = 2

    def __init__(
        self, size: int, value: float | Sequence[float] | str = 0.0, *, p: float = 1.0
    ) -> None:
        self.size = self._integer("size", size, 1)
        self._set_value(value)
        self._set_p(p)

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        places, sides = [], []
        for word, side in zip(u, (assembly.height, assembly.width), strict=False):
            begin = _draws.integers(word, side) - self.size // 2
            end = torch.minimum(begin + self.size, side)
            places.append(begin.clamp(min=0))
            sides.append(end - places[-1])
        return *places, *sides, *self._draw_value(u)


class Normalize(Transform):
    r""":math:`(x - \mathrm{mean}) / \mathrm{std}` of each channel, x in [0, 1]: bytes are divided
    by 255 first.

    Only erasing and noise without `clip` may follow.

    Args:
        mean: one number, or one for each channel.
        std: likewise, positive.
        inplace: taken as torchvision takes it, and without effect.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Source: `torchvision.transforms.v2.Normalize`.
    """

    normalizes = True

    def __init__(
        self, mean: float | Sequence[float], std: float | Sequence[float], inplace: bool = False
    ) -> None:
        self.mean = self._numbers("mean", mean)
        self.std = self._numbers("std", std, 1e-12)
        self.inplace = inplace

    def _numbers(self, argument: str, value: Any, least: float = -3e38) -> tuple[float, ...]:
        if hasattr(value, "tolist"):  # a tensor, an array
            value = value.tolist()
        numbers = value if isinstance(value, Sequence) else (value,)
        if not 1 <= len(numbers) <= 4:
            self._refuse(argument, "a number, or one for each channel", value)
        return tuple(self._number(argument, x, least) for x in numbers)

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        mean, std = (assembly.of_channels(name, getattr(self, name)) for name in ("mean", "std"))
        scales = [1 / (assembly.bound * s) for s in std]
        shifts = [-m / s for m, s in zip(mean, std, strict=True)]
        assembly.colour(Op.NORMALIZE, None, *scales, *shifts)
        assembly.is_normalized = True

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        return (self,)


class ToDtype(Transform):
    """Says that the numbers of what follows, fills, thresholds and values to erase with, are those
    of images in [0, 1], as after torchvision's transform of this name.

    Args:
        dtype: floating point; the `Pipeline`'s result has it where the pipeline's `dtype` is None.
        scale: True.

    Raises:
        ValueError: `dtype` is no floating-point type, or `scale` is not True.

    Source: `torchvision.transforms.v2.ToDtype`.
    """

    def __init__(self, dtype: torch.dtype, scale: bool = True) -> None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            self._refuse("dtype", "floating point", dtype)
        if scale is not True:
            self._refuse("scale", "True", scale)
        self.dtype = dtype
        self.scale = scale

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        assembly.unit = assembly.bound

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        return (self,)
