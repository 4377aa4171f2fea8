"""What differences between paired seeds tell: effects, with intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
# So many seeds are resampled in every way that there is instead of at random: 6**6 ways.
ALL_WAYS = 6


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """What something changed, by seed."""

    seeds: dict[int, float]
    interval: Interval | None  # None of fewer than two seeds

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.seeds.values())))


def bootstrap(differences: Sequence[float]) -> Interval:
    """The mean of paired differences, with its expanded percentile interval of 95 %.

    A percentile interval of n resampled values is too narrow by a factor of about
    sqrt((n - 1) / n) times the normal quantile over Student's. Its percentiles are moved outwards
    for it; with three seeds that ends at the least and the greatest difference, where a bootstrap
    has no more to say.

    Source: T. Hesterberg, "What teachers should know about the bootstrap", The American
    Statistician 69 (2015), which names it so.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n <= ALL_WAYS:
        rows = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        rows = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    means = values[rows].mean(axis=1)
    wider = math.sqrt(n / (n - 1)) * stats.t.ppf((1 - LEVEL) / 2, n - 1)
    tail = float(stats.norm.cdf(wider))
    # Resampled means as they are, none between two of them: what is 0 stays 0.
    low, high = (s * np.quantile(s * means, tail, method="inverted_cdf") for s in (1, -1))
    return Interval(float(values.mean()), float(low), float(high))


def effect(differences: Mapping[int, float]) -> Effect:
    """The effect of differences by seed."""
    values = list(differences.values())
    return Effect(dict(differences), bootstrap(values) if len(values) > 1 else None)


def mean_difference(
    values: Mapping[str, Mapping[int, float]], pairs: Iterable[tuple[str, str]]
) -> dict[int, float]:
    """By seed, the mean over pairs (without, with) of arms of how much more the latter has.

    Args:
        values: by arm and seed. A seed that one of the arms lacks is left out.
        pairs: of arms.
    """
    pairs = list(pairs)
    arms = {arm for pair in pairs for arm in pair}
    seeds = sorted(set.intersection(*(set(values[arm]) for arm in arms))) if arms else []
    return {
        seed: float(np.mean([values[b][seed] - values[a][seed] for a, b in pairs]))
        for seed in seeds
    }


def interaction(
    values: Mapping[str, Mapping[int, float]], fours: Iterable[tuple[str, str, str, str]]
) -> dict[int, float]:
    """By seed, the mean over (neither, first, second, both) of how much more the first method has
    where the second is on."""
    fours = list(fours)
    with_second = mean_difference(values, [(second, both) for _, _, second, both in fours])
    alone = mean_difference(values, [(neither, first) for neither, first, _, _ in fours])
    return {seed: with_second[seed] - alone[seed] for seed in with_second.keys() & alone.keys()}
