"""What `compare` trains: the nets of a design, over seeds and folds, as trials of a study."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import Trial

from ..training import Recipe
from ._progress import Watch
from ._study import Standing, Study
from ._study_checks import RESULT
from ._trial import Setting, check_done, loss_of

ONE_ON, ONE_OFF, FACTORIAL = DESIGNS = ("one-on", "one-off", "factorial")
NAME = "compare"  # of the study
NONE, ALL = "base", "all"  # of what the other nets are set against


@dataclass(frozen=True)
class Arm:
    """Nets that are trained with the same methods."""

    label: str
    on: frozenset[str]
    recipe: Recipe


@dataclass(frozen=True)
class Plan:
    """What is trained, and where it is kept."""

    recipe: Recipe  # with the methods' strengths, as far as it has some
    methods: tuple[str, ...]
    design: str
    arms: dict[str, Arm]
    seeds: range
    setting: Setting
    storage: str

    def tasks(self) -> list[dict[str, Any]]:
        """The trials, those of a seed together: what is done first can be compared first."""
        folds = range(max(1, self.setting.folds))
        return [
            {"arm": arm, "seed": seed, "fold": fold}
            for seed in self.seeds
            for fold in folds
            for arm in self.arms
        ]

    def study(self) -> Study:
        about = self.setting.about() | {"design": self.design, "methods": self.methods}
        space = {
            "arm": CategoricalDistribution(list(self.arms)),
            "seed": IntDistribution(0, 2**32 - 1),  # so that more of them can come
            "fold": IntDistribution(0, max(0, self.setting.folds - 1)),
        }
        about |= dataclasses.asdict(self.recipe)
        return Study(self.storage, NAME, about, space, check=check_done)

    def work(self, study: Study, watch: Watch | None = None) -> Standing:
        """Trains what is left to train. Without somebody to watch it waits for nobody."""

        def train(trial: Trial) -> float:
            arm, seed, fold = (trial.params[name] for name in ("arm", "seed", "fold"))
            recipe = self.arms[arm].recipe
            if watch is not None:
                part = f", fold {fold}" if self.setting.folds else ""
                watch.begins(f"{arm}, seed {seed}{part}", recipe.epochs)
            after_epoch = (lambda *_: None) if watch is None else watch.epoch
            result = self.setting.train(recipe, seed, fold, after_epoch)
            trial.set_user_attr(RESULT, result)
            return loss_of(result)

        if watch is None:
            return study.work(train, self.tasks(), wait=False)
        return study.work(train, self.tasks(), show=watch.stands)


def arms_of(recipe: Recipe, methods: tuple[str, ...], design: str) -> Iterator[Arm]:
    """The nets of a design, the one that the others are set against first."""

    def arm(label: str, on: tuple[str, ...]) -> Arm:
        return Arm(label, frozenset(on), recipe.with_methods(on, methods))

    if design == ONE_OFF:
        yield arm(ALL, methods)
        for name in methods:
            yield arm(f"without {name}", tuple(other for other in methods if other != name))
        return
    for size in range(len(methods) + 1 if design == FACTORIAL else 2):
        for on in itertools.combinations(methods, size):
            yield arm(" + ".join(on) or NONE, on)
