"""What `tune` does: the trials of a search, and the retraining of the best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from ._progress import Watch
from ._study import Standing, Study
from ._study_checks import RESULT, check_measures, check_strengths
from ._trial import Setting, loss_of
from ._tune_space import BASE, Space

NAME = "tune"  # of the study
TPE, RANDOM, GRID = SEARCHES = ("tpe", "random", "grid")
MEDIAN, HYPERBAND, NONE = PRUNERS = ("median", "hyperband", "none")
# The share of the epochs before which no trial is ended. Of 67 random recipes on the digits, the
# order after a tenth of the epochs has a rank correlation of 0.67 with that at the end; after a
# third of 0.84, and the third best is only the 41st yet; after a half of 0.93, and the best five
# are among the first 16.
WARMUP = 0.5
# So often a net's loss is told to the storage: SQLite takes 6 ms of processor time for each.
REPORTS = 20


@dataclass(frozen=True)
class Plan:
    """What is searched, and where it is kept."""

    space: Space
    setting: Setting
    storage: str
    seeds: range
    fresh: range  # the seeds of the retraining
    search: str
    points: int
    trials: int
    prune: str

    @property
    def folds(self) -> range:
        return range(max(1, self.setting.folds))

    def about(self) -> dict[str, Any]:
        """What the results of trials depend on, apart from their strengths."""
        return (
            self.setting.about()
            | {"seed": self.seeds[0], "seeds": len(self.seeds)}
            | {"methods": {axis.name: [axis.least, axis.most] for axis in self.space.axes}}
            | dataclasses.asdict(self.space.base)
        )

    def study(self, process: int = 0) -> Study:
        """The search, as a process of this command goes on with it, by its number."""

        def sampler(begun: int) -> optuna.samplers.BaseSampler:
            # Processes that drew the same numbers would try the same recipes.
            state = np.random.SeedSequence((self.seeds[0], begun, process)).generate_state(1)
            if self.search == TPE:
                return optuna.samplers.TPESampler(
                    seed=int(state[0]), multivariate=True, constant_liar=True
                )
            return optuna.samplers.RandomSampler(int(state[0]))

        drawn = None if self.search == GRID else sampler
        return Study(
            *(self.storage, NAME, self.about(), self.space.distributions, drawn, self._pruner()),
            check=self._check,
        )

    def _check(self, trial: FrozenTrial) -> None:
        """Raises ValueError, unless a trial that is done is as the search writes them."""
        check_strengths(trial, self.space.distributions)
        results = trial.user_attrs.get(RESULT, [])
        for result in results if isinstance(results, list) else [results]:
            check_measures(trial, result)

    def _pruner(self) -> optuna.pruners.BasePruner:
        steps = self.space.base.epochs * len(self.seeds) * len(self.folds)
        if self.prune == MEDIAN:
            return optuna.pruners.MedianPruner(n_warmup_steps=int(WARMUP * self.space.base.epochs))
        if self.prune == HYPERBAND:
            return optuna.pruners.HyperbandPruner(max(1, steps // 9), steps)
        return optuna.pruners.NopPruner()

    def to_confirm(self, standing: Standing) -> FrozenTrial | None:
        """The best trial, if it is another than the base and is to be retrained."""
        best = best_of(standing)
        if best is None or not self.fresh or self.space.recipe(best.params) == self.space.base:
            return None
        return best

    def confirmation(self) -> Study:
        """The retraining, of any trials, so that a longer search need not begin it anew."""
        last = 2**31 - 1
        space = {
            "trial": IntDistribution(BASE, last),
            "seed": IntDistribution(0, 2**32 - 1),
            "fold": IntDistribution(0, len(self.folds) - 1),
        }
        return Study(self.storage, f"{NAME} confirmed", self.about(), space, check=check_retrained)

    def train(self, study: Study, trial: Trial, watch: Watch | None) -> float:
        """A trial of the search. One whose recipe was tried before has the same result."""
        recipe = self.space.recipe(trial.params)
        losses: list[float] = []
        results = []
        strengths = {axis.name: getattr(recipe, axis.name) for axis in self.space.axes}
        trial.set_user_attr("strengths", strengths)
        for other in study.trials():
            known = other.user_attrs
            if known.get("strengths") == strengths and RESULT in known and other.value is not None:
                trial.set_user_attr(RESULT, known[RESULT])
                return other.value
        every = max(1, recipe.epochs // REPORTS)
        for seed in self.seeds:
            for fold in self.folds:

                def after_epoch(epoch: int, history: Sequence[float]) -> None:
                    if watch is not None:
                        watch.epoch(epoch, history)
                    if self.prune == NONE or epoch % every:
                        return
                    mean = (sum(losses) + history[-1]) / (len(losses) + 1)
                    trial.report(mean, len(losses) * recipe.epochs + epoch)
                    if trial.should_prune():
                        raise optuna.TrialPruned

                if watch is not None:
                    watch.begins(f"trial {trial.number}", recipe.epochs)
                result = self.setting.train(recipe, seed, fold, after_epoch, tested=False)
                results.append(result)
                losses.append(loss_of(result))
        trial.set_user_attr(RESULT, results)
        return math.fsum(losses) / len(losses)

    def retrain(self, study: Study, best: FrozenTrial, watch: Watch | None) -> Standing:
        """The best trial's recipe and the base, on fresh seeds."""
        recipes = {BASE: self.space.base, best.number: self.space.recipe(best.params)}
        names = {BASE: "base", best.number: "best"}

        def train(trial: Trial) -> float:
            number, seed, fold = (trial.params[name] for name in ("trial", "seed", "fold"))
            if watch is not None:
                watch.begins(f"{names[number]}, seed {seed}", recipes[number].epochs)
            after_epoch = (lambda *_: None) if watch is None else watch.epoch
            result = self.setting.train(recipes[number], seed, fold, after_epoch)
            trial.set_user_attr(RESULT, result)
            return loss_of(result)

        show = (lambda _: None) if watch is None else watch.stands
        return study.work(train, self.retrainings(best), show=show)

    def retrainings(self, best: FrozenTrial) -> list[dict[str, int]]:
        return [
            {"trial": number, "seed": seed, "fold": fold}
            for seed in self.fresh
            for fold in self.folds
            for number in (BASE, best.number)
        ]

    def work(self, study: Study, until: float, watch: Watch | None) -> Standing:
        """Tries recipes until there are enough, or it is time."""

        def objective(trial: Trial) -> float:
            return self.train(study, trial, watch)

        show = (lambda _: None) if watch is None else watch.stands
        space = self.space
        if self.search == GRID:
            tasks = space.grid(self.points, self.trials)
            standing = study.work(objective, tasks, until=until, show=show)
            # What another search of this study has found counts as well.
            return dataclasses.replace(standing, done=study.standing().done)
        # What there is to be better than comes first, and then a guess.
        first = [space.numbers(recipe) for recipe in (space.base, space.usual)][: self.trials]
        study.work(objective, first, until=until, wait=False, show=show)
        return study.work(objective, most=self.trials, until=until, show=show)


def check_retrained(trial: FrozenTrial) -> None:
    """Raises ValueError, unless a trial of the retraining is as it was written."""
    check_measures(trial, trial.user_attrs.get(RESULT))


def ended_well(trial: FrozenTrial) -> bool:
    loss = trial.value
    return trial.state == TrialState.COMPLETE and loss is not None and math.isfinite(loss)


def best_of(standing: Standing) -> FrozenTrial | None:
    """The trial with the least loss, of those that went to the end."""
    there = filter(ended_well, standing.done)
    return min(there, key=lambda trial: (trial.value, trial.number), default=None)
