"""What `tune` searches: the strengths of methods, each of which may as well be left out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ..training import METHODS, Recipe
from ..training.recipe import unknown
from ._errors import UsageError

# The share of a method's axis, below its least strength, that leaves it out. Tried on 30 trials of
# TPE, 30 times for each of 6 to 8 methods, of a model fitted to the losses of 80 random recipes on
# the digits, 30 epochs each: with a half the best has a loss of 0.094 to 0.100 on average, with 0.6
# of 0.094 to 0.097; with a quarter, 12 times, of 0.106. A switch and a strength: 0.098 to 0.104. At
# random, 12 times: 0.111 to 0.116 with a half, 0.129 to 0.130 with a quarter.
OFF_SHARE = 0.5
BASE = -1  # the base in the place of a trial's number
DIGITS = 3  # of a strength, so that it is printed as it was trained with


@dataclass(frozen=True)
class Axis:
    """The strength of one method as a search has it: one number. Below `least` the method is off.

    A switch and a strength beside it would be two numbers, the second without a meaning where the
    first is off, and each with an importance of its own; and being off is next to being weak.
    """

    name: str
    least: float
    most: float

    @property
    def switch(self) -> bool:
        """Whether the method is there or not, without a strength."""
        return METHODS[self.name].kind is bool

    @property
    def log(self) -> bool:
        return METHODS[self.name].log

    @property
    def off(self) -> Any:
        """A number that leaves the method out."""
        return False if self.switch else self._between(-OFF_SHARE / (1 - OFF_SHARE) / 2)

    @property
    def distribution(self) -> BaseDistribution:
        if self.switch:
            return CategoricalDistribution((False, True))
        low = self._between(-OFF_SHARE / (1 - OFF_SHARE))
        if METHODS[self.name].kind is int:
            return IntDistribution(math.floor(low), int(self.most))
        return FloatDistribution(low, self.most, log=self.log)

    def strength(self, number: Any) -> Any:
        """The strength that a number of the distribution stands for."""
        kind = METHODS[self.name].kind
        if kind is bool or kind is int:
            return kind(number) if number >= self.least else kind(0)
        if number < self.least:
            return 0.0
        return min(max(float(f"{number:.{DIGITS}g}"), self.least), self.most)

    def number(self, strength: float | bool) -> Any:
        """The number that stands for a strength, or for the one in the range that is nearest."""
        if self.switch:
            return bool(strength)
        kind = METHODS[self.name].kind
        return kind(min(max(strength, self.least), self.most)) if strength else self.off

    def grid(self, points: int) -> list[Any]:
        """Off, and so many numbers from the least to the greatest strength."""
        if self.switch:
            return [False, True]
        shares = [0.5] if points == 1 else [i / (points - 1) for i in range(points)]
        kind = METHODS[self.name].kind
        numbers = [kind(self.strength(round(self._between(share), 12))) for share in shares]
        return [self.off, *dict.fromkeys(numbers)]

    def _between(self, share: float) -> Any:
        """The number at a share of the way from the least to the greatest strength."""
        if self.log:
            return math.exp(math.log(self.least) + share * math.log(self.most / self.least))
        number = self.least + share * (self.most - self.least)
        return math.floor(number) if METHODS[self.name].kind is int else number


@dataclass(frozen=True)
class Space:
    """The axes of a search around a recipe."""

    base: Recipe  # without the methods
    usual: Recipe  # with all of them, as strong as the recipe has them or as is usual
    axes: tuple[Axis, ...]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {axis.name: axis.distribution for axis in self.axes}

    def recipe(self, numbers: Mapping[str, Any]) -> Recipe:
        """The recipe that the numbers of a trial stand for."""
        strengths: dict[str, Any] = {
            axis.name: axis.strength(numbers[axis.name]) for axis in self.axes
        }
        return dataclasses.replace(self.base, **strengths)

    def numbers(self, recipe: Recipe) -> dict[str, Any]:
        """The numbers of a recipe that differs from the base in the axes alone."""
        return {axis.name: axis.number(getattr(recipe, axis.name)) for axis in self.axes}

    def grid(self, points: int, most: int) -> list[dict[str, Any]]:
        """All combinations. Raises UsageError where there are too many."""
        lists = [axis.grid(points) for axis in self.axes]
        if (count := math.prod(map(len, lists))) > most:
            sizes = ", ".join(
                f"{len(numbers)} of {axis.name}"
                for axis, numbers in zip(self.axes, lists, strict=True)
            )
            raise UsageError(
                f"--search grid: takes {count:,} trials ({sizes}), more than --trials {most}: give "
                "fewer --methods, fewer --points or more --trials"
            )
        names = [axis.name for axis in self.axes]
        return [dict(zip(names, row, strict=True)) for row in itertools.product(*lists)]


def space_from(recipe: Recipe, methods: Sequence[str], ranges: Iterable[str]) -> Space:
    """The space of `--methods` and `--range`s around a recipe. Raises UsageError, one line that
    names the option."""
    given = dict(_range_from(text, methods) for text in ranges)
    axes = tuple(Axis(name, *given.get(name, METHODS[name].search)) for name in methods)
    return Space(
        base=recipe.with_methods((), methods),
        usual=recipe.with_methods(methods, methods),
        axes=axes,
    )


def _range_from(text: str, methods: Sequence[str]) -> tuple[str, tuple[float, float]]:
    name, equals, rest = text.partition("=")
    where = f"--range {text}" if text.isprintable() else f"--range {text!r}"
    low, colon, high = rest.partition(":")
    try:
        least, most = float(low), float(high)
    except ValueError:
        least = most = math.nan
    if not (equals and colon) or math.isnan(least) or math.isnan(most):
        raise UsageError(f"{where}: must be METHOD=LEAST:MOST, as in dropout=0.1:0.8")
    if name not in METHODS:
        raise UsageError(f"{where}: {unknown('method', name, METHODS)}")
    method = METHODS[name]
    if method.kind is bool:
        raise UsageError(f"{where}: {name} is there or not, without a strength")
    if name not in methods:
        raise UsageError(f"{where}: must be of a method that is searched, of {', '.join(methods)}")
    if method.kind is int and not (least.is_integer() and most.is_integer()):
        raise UsageError(f"{where}: must be of whole numbers")
    if not 0 < least < most:
        raise UsageError(f"{where}: must have 0 < LEAST < MOST; that a method is off is tried too")
    if most > method.limits[1] or (most == method.limits[1] and method.open):
        bound = "below" if method.open else "at most"
        limit = "finite" if math.isinf(method.limits[1]) else f"{bound} {method.limits[1]:g}"
        raise UsageError(f"{where}: MOST must be {limit}")
    return name, (least, most)
