"""What a transform is to a pipeline, and what its arguments have to be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .._augment_program import Filter, Pad, WarpFilter
from .._numbers import integer, number, probability, refuse
from ._assemble import Assembly

Values = dict[str, Tensor]  # a transform's columns of the parameters, (N,) float64 each


class Transform:
    """One step of a `Pipeline`: it draws its columns of the parameters for each sample, and writes
    its instructions from them."""

    p: float = 1.0
    always: str | None = None  # why it has to apply to all samples, if it has to
    words: ClassVar[int] = 0  # of 32 bits that a sample draws, beside the one for `p`
    columns: tuple[str, ...] = ()  # of the parameters; `applied` comes before them
    normalizes: ClassVar[bool] = False  # its result has left the range of pixels
    after_normalize: bool = False  # it may come where values have left it

    @property
    def needed_words(self) -> int:
        return self.words

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor | float]:
        """What the columns hold, of (words, N) uniform numbers and the images' sizes so far."""
        return ()

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        """Adds the instructions. `on` says to which samples it applies, (N,); None: to all."""
        raise NotImplementedError

    def for_evaluation(self, share: float) -> Sequence[Transform]:
        """What stands for it where nothing is drawn; `share` is `Pipeline`'s `crop_share`."""
        return ()

    def __repr__(self) -> str:
        names = inspect.signature(type(self).__init__).parameters
        shown = (f"{name}={_plain(getattr(self, name))!r}" for name in names if name != "self")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _refuse(self, argument: str, must: str, got: Any) -> None:
        refuse(type(self).__name__, argument, must, got, ValueError)

    def _set_p(self, p: float) -> None:
        self.p = probability(type(self).__name__, "p", p)
        if self.p < 1 and self.always is not None:
            self._refuse("p", f"1 with {self.always}", p)

    def _number(
        self, argument: str, value: Any, least: float = -math.inf, most: float = math.inf
    ) -> float:
        value = number(type(self).__name__, argument, value)
        if not (least <= value <= most and math.isfinite(value)):
            self._refuse(argument, _limits(least, most), value)
        return value

    def _integer(self, argument: str, value: Any, least: int, most: int = 65535) -> int:
        value = integer(type(self).__name__, argument, value)
        if not least <= value <= most:
            self._refuse(argument, f"from {least} to {most}", value)
        return value

    def _range(
        self, argument: str, value: Any, least: float = -math.inf, most: float = math.inf
    ) -> tuple[float, float]:
        """(low, high) with low <= high, both in [least, most]."""
        low, high = (self._number(argument, x, least, most) for x in self._pair(argument, value))
        if low > high:
            self._refuse(argument, "(low, high) with low <= high", (low, high))
        return low, high

    def _spread(
        self,
        argument: str,
        value: Any,
        centre: float = 0.0,
        least: float = -math.inf,
        most: float = math.inf,
    ) -> tuple[float, float]:
        """A range, or a number v for the range from centre - v to centre + v."""
        if not isinstance(value, Sequence):
            value = self._number(argument, value, 0.0)
            value = (max(centre - value, least), centre + value)
        return self._range(argument, value, least, most)

    def _pair(self, argument: str, value: Any, what: str = "numbers") -> Sequence[Any]:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            self._refuse(argument, f"two {what}", value)
        return value

    def _size(self, argument: str, value: Any, least: int = 1) -> tuple[int, int]:
        """(height, width), of one number for both or of two."""
        if not isinstance(value, Sequence):
            value = (value,)
        if len(value) == 1:
            value = (value[0], value[0])
        height, width = self._pair(argument, value, "whole numbers (height, width)")
        return self._integer(argument, height, least), self._integer(argument, width, least)

    def _fill(self, fill: Any) -> tuple[float, ...] | None:
        """One number, or one of each channel; None stands for 0."""
        if fill is None:
            return None
        if not isinstance(fill, Sequence):
            fill = (fill,)
        if isinstance(fill, str) or not 1 <= len(fill) <= 4:
            self._refuse("fill", "a number, or one for each channel", fill)
        return tuple(self._number("fill", x) for x in fill)

    def _choice(self, argument: str, value: Any, choices: Any) -> Any:
        """What an enumeration calls by this name in small letters, with - for _."""
        value = getattr(value, "value", value)  # of torchvision's own enumerations
        names = {choice.name.lower().replace("_", "-"): choice for choice in choices}
        if value not in names:
            self._refuse(argument, f"one of {', '.join(names)}", repr(value))
        return names[value]


_RESIZES = (Filter.NEAREST, Filter.NEAREST_EXACT, Filter.BILINEAR, Filter.BICUBIC)
_WARPS = (WarpFilter.NEAREST, WarpFilter.BILINEAR, WarpFilter.BICUBIC)
PADS = (Pad.CONSTANT, Pad.EDGE, Pad.REFLECT, Pad.SYMMETRIC)


def resize_filter(transform: Transform, interpolation: Any, antialias: bool | None) -> Filter:
    chosen = transform._choice("interpolation", interpolation, _RESIZES)
    if antialias not in (None, True, False):
        transform._refuse("antialias", "True, False or None", repr(antialias))
    if antialias and chosen == Filter.BILINEAR:
        return Filter.BILINEAR_ANTIALIAS
    if antialias and chosen == Filter.BICUBIC:
        return Filter.BICUBIC_ANTIALIAS
    return chosen


def warp_filter(transform: Transform, interpolation: Any) -> WarpFilter:
    return transform._choice("interpolation", interpolation, _WARPS)


def _limits(least: float, most: float) -> str:
    if math.isfinite(least) and math.isfinite(most):
        return f"in [{least:g}, {most:g}]"
    return f"at least {least:g}" if math.isfinite(least) else "finite"


def _plain(value: Any) -> Any:
    """A value as a repr shows it: of an enumeration, what a caller writes."""
    return getattr(value, "value", value)
