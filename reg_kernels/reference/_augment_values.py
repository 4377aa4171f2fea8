"""What the instructions of `augment` share: the range of an image's values, and how they round.

An image is (C, h, w) in the type of computing. Each product, each sum and each quotient is an
operation of its own, and so rounded by itself: `add(alpha=...)` and the division by a number, of
which torch makes other operations on some devices, are not used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)
_ROUNDED_LUMA: tuple[float, ...] = tuple(torch.tensor(_LUMA).tolist())


class Values(NamedTuple):
    """The values of an image lie in [0, bound]. With `exact`, for bytes alone, each instruction
    leaves whole numbers, as torchvision's do."""

    bound: float
    exact: bool

    def clamp(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, self.bound)

    def clamp_bytes(self, x: Tensor) -> Tensor:
        return self.clamp(x) if self.bound != 1.0 else x

    def truncated(self, x: Tensor) -> Tensor:
        x = self.clamp(x)
        return x.trunc() if self.exact else x

    def rounded(self, x: Tensor) -> Tensor:
        return self.clamp(x.round()) if self.exact else self.clamp_bytes(x)

    def product_sum(self, a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
        """a b + c. torchvision has a fused multiply-add here, which rounds once."""
        if not self.exact:
            return c + a * b
        return (a * b.double() + c.double()).to(b.dtype)

    def gray(self, image: Tensor) -> Tensor:
        """The luma of an image's pixels, (1, h, w)."""
        weights = _LUMA if image.dtype == torch.float64 else _ROUNDED_LUMA
        red, green, blue = image.split(1)
        luma = red * weights[0]
        for weight, channel in zip(weights[1:], (green, blue), strict=True):
            luma = self.product_sum(weight, channel, luma)
        return luma.floor() if self.exact else luma

    def blend(self, a: Tensor, b: Tensor, factor: float, rest: float) -> Tensor:
        """factor a + rest b."""
        return self.truncated(self.product_sum(rest, b.expand_as(a), a * factor))


def per_channel(values: tuple[float, ...], image: Tensor) -> Tensor:
    """One number for each channel, (C, 1, 1); the last one counts for those that are left."""
    count = len(image)
    numbers = [values[min(c, len(values) - 1)] for c in range(count)]
    return image.new_tensor(numbers).view(-1, 1, 1)
