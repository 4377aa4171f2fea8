"""Trains recipes one after the other, each for some seeds, resumable to the bit.

All of a seed start from the same weights, as far as they have the same parameters (without
BatchNorm there are biases, after which other weights are drawn), and see the same batches in the
same order. Shapes: N images of C channels, H rows and W columns; K classes.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...training import Conflict, EarlyStopping, Recipe, conflicts
from .._data import Split
from .checkpoint import check_alike
from .kernels import ATTACK_STEPS, Attack, Augment, Distill, Kernels, Loss, Mix
from .measures import EVALUATION_BATCH, evaluate
from .models import build_model, weights_of
from .parallel import ALONE, Ranks

ATTACKED = "attacked_accuracy"  # on the test set, where trained adversarially


@dataclass(frozen=True)
class Run:
    """One training of a recipe."""

    name: str
    label: str  # of the recipe
    recipe: Recipe
    seed: int  # of the weights, the order and all that is drawn
    teaches: bool = False  # whether it is there to teach the next one alone


@dataclass
class _Net:
    """A net in training, with all that trains it."""

    recipe: Recipe
    model: nn.Module
    trained: nn.Module  # the model, or what has a gradient of its parameters from all ranks
    optimizer: torch.optim.Optimizer
    mix: Mix | None
    noise: nn.Module | None
    augment: Augment | None
    attack: Attack | None
    loss: Loss
    penalty: Callable[[], Tensor] | None
    stop: EarlyStopping | None
    distill: Distill | None
    teacher: nn.Module | None
    shuffle: torch.Generator


class Training:
    """Trains the recipes one after the other, epoch by epoch, for one seed after the other.

    `state()` after an epoch is all that `restore()` needs to go on as if never interrupted: on
    the CPU the results are then equal to the bit.

    Args:
        data: the images, standardised. Early stopping goes by its validation set, which has to be
            watched then.
        classes: how many there are.
        recipes: what is trained, by its label. One that distils is preceded by its teacher.
        seeds: each recipe is trained for each of these.
        device: where.
        kernels: PyTorch's own, or ours.
        watch: the parts of the data that are looked at after each epoch.
        attacked_by: how far the attack goes that the test set is put under, if it is more than 0.
        ranks: who trains it together. Each calls the same methods; `state()` is the same on all,
            and `restore()` takes one of any number of ranks.
    """

    def __init__(
        self,
        data: Split,
        classes: int,
        recipes: Mapping[str, Recipe],
        seeds: range,
        device: torch.device,
        kernels: Kernels,
        watch: tuple[str, ...] = ("train", "test"),
        attacked_by: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipes = dict(recipes)
        self.runs = tuple(run for seed in seeds for run in _runs(self.recipes, seed, len(seeds)))
        self._watch = watch
        self._attacked_by = attacked_by
        self.measures = tuple(f"{part}_{name}" for part in watch for name in ("loss", "accuracy"))
        if attacked_by > 0 and "test" in watch:
            self.measures += (ATTACKED,)
        self.history: dict[str, list[dict[str, float]]] = {run.name: [] for run in self.runs}
        # Of each run that is done: what it ended with, on all parts of the data.
        self.results: dict[str, dict[str, float]] = {}
        # Of each run, since this process began: no part of the state.
        self.seconds: dict[str, list[float]] = {run.name: [] for run in self.runs}
        self._data = data
        self._classes = classes
        self._seeds = seeds
        self._device = device
        self._kernels = kernels
        self._ranks = ranks
        # Cloned: torch's own allocations are aligned alike in every process and numpy's are not,
        # and a vectorised sum may round differently for it.
        self._parts = {
            name: (x.clone().to(device), y.clone().to(device))
            for name, (x, y) in data.parts().items()
        }
        shape = (1, -1, 1, 1)
        self._bounds = [  # of standardised images
            ((bound - data.mean) / data.std).view(shape).to(device)
            for bound in (data.lower, data.upper)
        ]
        self._teacher: nn.Module | None = None
        self._begin(0)

    @property
    def training(self) -> Run:
        """What is in training."""
        return self.runs[self._phase]

    @property
    def epoch(self) -> int:
        """How many epochs of what is in training are done."""
        return self._epoch

    @property
    def model(self) -> nn.Module:
        """The net in training; when all is done, that of the last run."""
        return self._net.model

    def run(self, after_epoch: Callable[[], None]) -> None:
        """Trains what is left to train and calls `after_epoch` at the end of each epoch."""
        while True:
            while not self._is_trained():
                self._wait()
                start = time.perf_counter()
                self._train_epoch(self._net, self._epoch)
                self._wait()
                self.seconds[self.training.name].append(time.perf_counter() - start)
                self._ranks.compare_losses(f"epoch {self._epoch + 1} of {self.training.name}")
                self._look()
                self._epoch += 1
                after_epoch()
            self._finish()
            if self._phase + 1 == len(self.runs):
                return
            self._begin(self._phase + 1)

    def _is_trained(self) -> bool:
        stop = self._net.stop
        return self._epoch >= self.training.recipe.epochs or (stop is not None and stop.stopped)

    def _look(self) -> None:
        """Notes how the net does after an epoch, and whether it does better than before."""
        seen = {part: self._evaluate(part) for part in self._watch}
        row = {name: seen[name.split("_")[0]][name] for name in self.measures if name != ATTACKED}
        if ATTACKED in self.measures:
            row[ATTACKED] = self._attacked_accuracy()
        self.history[self.training.name].append(row)
        if self._net.stop is not None:
            self._net.stop(seen["validation"]["validation_loss"])

    def _finish(self) -> None:
        """Ends a run: with its best weights where it stops early, and with all measures."""
        run, stop = self.training, self._net.stop
        if stop is not None:
            stop.restore()
        found = {k: v for part in self._parts for k, v in self._evaluate(part).items()}
        if self._attacked_by > 0:
            found[ATTACKED] = self._attacked_accuracy()
        found["epochs"] = float(self._epoch)
        found["best_epoch"] = float(self._epoch if stop is None else stop.best_check or self._epoch)
        weights = self._ranks.whole(weights_of(self.model))
        found["zeros"] = float(sum(int((p == 0).sum()) for p in weights))  # what L1 leaves out
        found["weights"] = float(sum(p.numel() for p in weights))
        self.results[run.name] = found
        self._teacher = self.model if run.teaches else None  # in evaluation mode by now

    def weights(self) -> dict[str, Tensor]:
        """The model's state_dict, on the CPU."""
        state = self._ranks.whole(dict(self.model.state_dict()))
        return {name: value.cpu() for name, value in state.items()}

    def conflicts(self) -> list[Conflict]:
        """What of the last recipe is at odds, in the net that was trained last."""
        *_, recipe = self.recipes.values()
        return conflicts(self.model, self._net.optimizer, recipe)

    def step_bytes(self, follow: Callable[..., tuple[Any, int, int]]) -> int:
        """The memory at the peak of one more epoch, as `follow` finds it. It trains: call it when
        nothing else is asked of the net."""
        # Whether what was there before counts as freed is a matter of chance on the CPU.
        self._net.optimizer.zero_grad()
        return follow(lambda _: self._train_epoch(self._net, 0), self._device)[1]

    def state(self) -> dict[str, Any]:
        """A copy of everything that the rest of the training depends on: tensors and primitives."""
        stop, teacher = self._net.stop, self._net.teacher
        on_cuda = self._device.type == "cuda"
        state = {
            "phase": self._phase,
            "epoch": self._epoch,
            "model": dict(self._net.model.state_dict()),
            "optimizer": self._net.optimizer.state_dict(),
            "early_stopping": None if stop is None else stop.state_dict(),
            "teacher": None if teacher is None else dict(teacher.state_dict()),
            "shuffle": self._net.shuffle.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self._device) if on_cuda else None,
            "history": self.history,
            "results": self.results,
        }
        return copy.deepcopy(self._ranks.whole(state))

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state()` was taken. Raises any type of exception if `state` is wrong.

        Everything is compared with what this training would have there, and so is each value of
        which only one is possible: a wrong state must not come to light when all is trained.
        """
        phase, epoch = state["phase"], state["epoch"]
        if type(phase) is not int or phase not in range(len(self.runs)):
            raise ValueError(f"phase {phase}")
        run = self.runs[phase]
        if type(epoch) is not int or epoch not in range(run.recipe.epochs + 1):
            raise ValueError(f"epoch {epoch} of {run.recipe.epochs}")
        taught = phase > 0 and self.runs[phase - 1].teaches
        self._teacher = self._start(self.runs[phase - 1]).model if taught else None
        self._begin(phase)
        train_y = self._parts["train"][1]
        steps = epoch * math.ceil(len(train_y) / run.recipe.batch_size)
        row = dict.fromkeys(self.measures, 0.0)
        done = {r.name: r.recipe.epochs for r in self.runs[:phase]} | {run.name: epoch}
        for other in self.runs[:phase]:
            if other.recipe.early_stopping > 0:
                done[other.name] = _length(state["history"], other)
        groups = self._net.optimizer.param_groups
        moments = {
            index: {
                "step": torch.tensor(float(steps)),
                "exp_avg": torch.zeros(parameter.shape, dtype=parameter.dtype),
                "exp_avg_sq": torch.zeros(parameter.shape, dtype=parameter.dtype),
            }
            for index, parameter in enumerate(p for group in groups for p in group["params"])
        }
        like = self.state()
        like["optimizer"]["state"] = moments if steps > 0 else {}
        like["history"] = {r.name: [row] * done.get(r.name, 0) for r in self.runs}
        like["results"] = {
            r.name: dict.fromkeys(self._result_names(), 0.0) for r in self.runs[:phase]
        }
        if self._net.stop is not None:
            # It knows what a state of its own is made of, and refuses another.
            self._load_stop(state["early_stopping"])
            like["early_stopping"] = state["early_stopping"]
        check_alike(state, like)
        for group, ours in zip(
            *(s["optimizer"]["param_groups"] for s in (state, like)), strict=True
        ):
            if group | {"lr": ours["lr"]} != ours:  # each batch sets the rate anew
                raise ValueError("the optimizer is another one")
        counts = [e["step"] for e in state["optimizer"]["state"].values()]
        seen = [v for n, v in state["model"].items() if n.endswith("num_batches_tracked")]
        # PyTorch's own BatchNorm counts the batches of an attack as well.
        batches = steps * (1 + ATTACK_STEPS) if run.recipe.adversarial > 0 else steps
        if any(count != steps for count in counts) or any(n not in (steps, batches) for n in seen):
            raise ValueError(f"not {steps} steps")
        rows = itertools.chain(*state["history"].values(), state["results"].values())
        for name, value in (pair for row in rows for pair in row.items()):
            # A loss may have run away; an accuracy is a share.
            if value < 0 or (name.endswith("accuracy") and not value <= 1):
                raise ValueError(f"{name} {value}")

        if self._teacher is not None:
            self._load(self._teacher, state["teacher"])
            self._teacher.eval()
        self._begin(phase)
        self._load(self._net.model, state["model"])
        self._load_optimizer(state["optimizer"])
        if self._net.stop is not None:
            self._load_stop(state["early_stopping"])
        self._net.shuffle.set_state(state["shuffle"])
        torch.set_rng_state(state["rng"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self._device)
        self._epoch = epoch
        self.history = copy.deepcopy(state["history"])
        self.results = copy.deepcopy(state["results"])

    def _load(self, model: nn.Module, state: dict[str, Any]) -> None:
        model.load_state_dict(self._ranks.split(state, model.state_dict()))

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        groups = self._net.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        moments = {
            index: self._ranks.split(of, dict.fromkeys(of, parameters[index]))
            for index, of in state["state"].items()
        }
        self._net.optimizer.load_state_dict(state | {"state": moments})

    def _load_stop(self, state: dict[str, Any]) -> None:
        assert self._net.stop is not None
        weights = self._ranks.split(state["weights"], self._net.model.state_dict())
        self._net.stop.load_state_dict(state | {"weights": weights})

    def _result_names(self) -> list[str]:
        names = [f"{part}_{name}" for part in self._parts for name in ("loss", "accuracy", "ece")]
        names += [ATTACKED] if self._attacked_by > 0 else []
        return [*names, "epochs", "best_epoch", "zeros", "weights"]

    def time_epochs(
        self, rounds: int, kinds: dict[str, Kernels], after_round: Callable[[], None]
    ) -> dict[str, dict[str, float]]:
        """The median seconds of an epoch, by recipe and by kind of kernels.

        Runs on nets and generators of its own. The contenders take turns epoch by epoch, so that
        whatever else the machine does meets all of them alike; a first round warms up.
        """
        runs = [run for run in self.runs if run.seed == self._seeds[0] and not run.teaches]
        self._teacher = None  # what a teacher adds is no matter of kernels
        contenders = {
            (run.label, kind): self._start(run, kernels)
            for run in runs
            for kind, kernels in kinds.items()
        }
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
        for round_ in range(rounds + 1):
            # Every other round goes backwards: none always follows the same neighbour.
            order = list(contenders)[:: 1 if round_ % 2 else -1]
            for key in order:
                self._wait()
                start = time.perf_counter()
                self._train_epoch(contenders[key], epoch=0)
                self._wait()
                if round_ > 0:
                    seconds[key].append(time.perf_counter() - start)
            after_round()
        return {
            run.label: {kind: statistics.median(seconds[run.label, kind]) for kind in kinds}
            for run in runs
        }

    def _start(self, run: Run, kernels: Kernels | None = None) -> _Net:
        """A net at its start; its random numbers do not depend on what ran before."""
        kernels, recipe = kernels or self._kernels, run.recipe
        torch.manual_seed(run.seed)
        shape = tuple(self._parts["train"][0].shape[1:])
        net = build_model(recipe, shape, self._classes, kernels.drop_path)
        model, trained = self._ranks.spread(kernels.convert(net).to(self._device))
        teacher = self._teacher if recipe.distillation > 0 else None
        return _Net(
            recipe=recipe,
            model=model,
            trained=trained,
            optimizer=kernels.optimizer(model, recipe),
            mix=kernels.mix(recipe, self._classes) if recipe.mixup or recipe.cutmix else None,
            noise=kernels.noise(recipe.noise) if recipe.noise > 0 else None,
            augment=(
                kernels.augment(recipe.augment, self._data, run.seed)
                if recipe.augment > 0
                else None
            ),
            attack=(
                kernels.attack(recipe.adversarial, self._data) if recipe.adversarial > 0 else None
            ),
            loss=self._ranks.share(kernels.loss(recipe.label_smoothing)),
            penalty=_l2(recipe.l2, model, kernels) if recipe.l2 > 0 else None,
            stop=(
                EarlyStopping(model, patience=recipe.early_stopping)
                if recipe.early_stopping > 0
                else None
            ),
            distill=self._ranks.share(kernels.distill(recipe)) if teacher is not None else None,
            teacher=teacher,
            shuffle=torch.Generator().manual_seed(run.seed),
        )

    def _begin(self, phase: int) -> None:
        """Starts a run from scratch."""
        self._phase, self._epoch = phase, 0
        self._net: _Net = self._start(self.training)

    def _train_epoch(self, net: _Net, epoch: int) -> None:
        net.trained.train()
        recipe = net.recipe
        order = torch.randperm(len(self._parts["train"][1]), generator=net.shuffle)
        # Batches of nearly one size: a last one of a single image would count as much as the
        # others, and BatchNorm cannot train on a single image of one pixel.
        batches = order.tensor_split(math.ceil(len(order) / recipe.batch_size))
        for index, batch in enumerate(batches):
            done = (epoch + index / len(batches)) / recipe.epochs
            for group in net.optimizer.param_groups:
                group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            with self._ranks.part(len(batch)) as own:
                self._step(net, batch[own], epoch)

    def _step(self, net: _Net, batch: Tensor, epoch: int) -> None:
        """A step by the images of these numbers."""
        x, y = self._parts["train"]
        rows = batch.to(self._device)
        images = x[rows]
        target: Any = y[rows]
        if net.augment is not None:
            images = net.augment(images, batch, epoch)
        if net.mix is not None:
            images, target = net.mix(images, target)
        if net.noise is not None:
            # They stay between the least and the greatest pixel, as those of a noisy camera
            # do, and so are images that an attack may begin at.
            images = torch.clamp(net.noise(images), *self._bounds)
        if net.attack is not None:
            images = net.attack(net.model, images, target, net.loss)
        net.optimizer.zero_grad()
        scores = net.trained(images)
        if net.teacher is None or net.distill is None:
            loss = net.loss(scores, target)
        else:
            loss = net.distill(scores, _scores_of(net.teacher, images), target)
        if net.penalty is not None:
            loss = loss + net.penalty()
        loss.backward()
        net.optimizer.step()
        self._ranks.watch(loss)

    def _evaluate(self, part: str) -> dict[str, float]:
        """The measures of a part of the data, by its name and theirs."""
        seen = evaluate(self.model, *self._parts[part], self._ranks)
        return {f"{part}_{name}": value for name, value in seen.items()}

    @torch.no_grad()
    def _attacked_accuracy(self) -> float:
        """The share of the test set that is still told right under attack. What is drawn for it
        does not change what training draws."""
        attack = self._kernels.attack(self._attacked_by, self._data)
        loss, correct = self._ranks.share(self._kernels.loss(0.0)), 0
        x, y = self._parts["test"]
        batches = (part.split(EVALUATION_BATCH) for part in (x, y))
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._seeds[0])
            for images, labels in zip(*batches, strict=True):
                with self._ranks.part(len(labels)) as own:
                    with torch.enable_grad():
                        attacked = attack(self.model, images[own], labels[own], loss)
                    scores: Tensor = self.model(attacked)
                correct += int((scores.argmax(1) == labels[own]).sum())
        return self._ranks.total(correct) / len(y)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _runs(recipes: Mapping[str, Recipe], seed: int, seeds: int) -> list[Run]:
    """The runs of one seed. A recipe that distils comes after its teacher."""
    runs = []
    for label, recipe in recipes.items():
        name = label + (f", seed {seed}" if seeds > 1 else "")
        if recipe.distillation > 0:
            taught = dataclasses.replace(recipe, distillation=0.0)
            runs.append(Run(f"teacher of {name}", label, taught, seed, teaches=True))
        runs.append(Run(name, label, recipe, seed))
    return runs


def _l2(factor: float, model: nn.Module, kernels: Kernels) -> Callable[[], Tensor]:
    """Half the factor times the weights' squares; biases and norms have none."""
    decaying = weights_of(model)
    return lambda: 0.5 * factor * kernels.l2(decaying)


@torch.no_grad()
def _scores_of(teacher: nn.Module, images: Tensor) -> Tensor:
    scores: Tensor = teacher(images)
    return scores


def _length(history: Any, run: Run) -> int:
    """How many epochs a run had that may have stopped early."""
    rows = history[run.name]
    if type(rows) is not list or len(rows) not in range(1, run.recipe.epochs + 1):
        raise ValueError(f"history of {run.name}")
    return len(rows)
