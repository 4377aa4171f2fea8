"""The trainings behind `train`: one small net, plain and regularised, resumable to the bit.

All start from the same weights and see the same batches in the same order; they differ in dropout,
mixup, label smoothing and weight decay alone and, where asked for, in stochastic depth, noise,
adversarial steps and augmentation. Shapes: N images of C channels, H rows and W columns; K classes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._mixed_target import MixedTarget
from ..nn import drop_path_rates
from ._data import Split

BATCH = 64
EVALUATION_BATCH = 512
LEARNING_RATE = 4e-3
# Taken of both sets at the end of each epoch.
MEASURES = tuple(f"{part}_{name}" for part in ("train", "test") for name in ("loss", "accuracy"))
ATTACKED = "attacked_accuracy"  # on the test set, where trained adversarially
ATTACK_STEPS = 7  # of the attacks that are trained with, and on the test set
FORMAT = "reg_kernels train checkpoint 4"
MODELS = ("conv", "residual")


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one training from the other."""

    name: str
    dropout: float
    mixup: float  # the alpha of Beta(alpha, alpha); 0: none
    label_smoothing: float
    weight_decay: float
    drop_path: float = 0.0  # of the last residual block
    # The deviation of what is added to the images, in theirs. They stay between the least and the
    # greatest pixel, as those of a noisy camera do, and so are images that an attack may begin at.
    # On 300 digits, noise of 0.5, three seeds: 97.60 % of the test set with that, 97.55 without.
    noise: float = 0.0
    adversarial: float = 0.0  # how far an attack moves a pixel, in pixels' units
    augment: bool = False  # whether images are turned, shifted, scaled and partly erased


@dataclass(frozen=True)
class Run:
    """One training of a recipe."""

    name: str
    recipe: Recipe
    seed: int  # of the weights, the order and all that is drawn


# Measured on 300 digits, 60 epochs, seeds 0 to 7: both nets reach 100 % on the training set; on the
# test set the plain one reaches 95.96 % on average and the regularised one 97.51 %, better for
# every seed, by 0.47 to 2.61 points. With BatchNorm in the head, too, dropout gained nothing.
# The mean without mixup and smoothing: 97.38 %; with mixup alone and an alpha of 0.1, 0.2 and 0.4:
# 97.27, 97.15 and 96.91; with smoothing alone: 97.70.
PLAIN = Recipe("plain", dropout=0.0, mixup=0.0, label_smoothing=0.0, weight_decay=0.0)
REGULARISED = Recipe("regularised", dropout=0.5, mixup=0.1, label_smoothing=0.1, weight_decay=2.0)


# (images, labels) -> mixed images and their target
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Any]]
# (scores, target) -> the mean over the images
Loss = Callable[[Tensor, Tensor | MixedTarget], Tensor]
# (images, their numbers in the training set, epoch) -> images that were changed
Augment = Callable[[Tensor, Tensor, int], Tensor]
# (model, images, target, loss) -> images that are harder
Attack = Callable[[nn.Module, Tensor, Any, Loss], Tensor]


@dataclass(frozen=True)
class Kernels:
    """What a net is trained with."""

    convert: Callable[[nn.Module], nn.Module]  # swaps in the layers
    optimizer: Callable[..., torch.optim.Optimizer]  # AdamW, torch's or its twin
    mix: Callable[[float], Mix]  # takes an alpha; draws from torch's generator, which a state keeps
    loss: Callable[[float], Loss]  # cross-entropy; takes a label smoothing
    drop_path: Callable[[float], nn.Module]  # takes a probability
    noise: Callable[[float], nn.Module]  # takes a deviation
    attack: Callable[[float, Split], Attack]  # takes a radius
    augment: Callable[[Split, int], Augment]  # takes a seed


def mix_by_torch(alpha: float) -> Mix:
    """Mixup of the batch with itself reversed, as one writes it with PyTorch alone."""
    beta = torch.distributions.Beta(alpha, alpha)

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, MixedTarget]:
        lam = beta.sample().item()
        mixed = lam * images + (1 - lam) * images.flip(0)
        return mixed, MixedTarget(labels, labels.flip(0), lam)

    return mix


def loss_by_torch(label_smoothing: float) -> Loss:
    """The cross-entropy of one label or of two, as one writes it with PyTorch alone."""
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def loss(scores: Tensor, target: Tensor | MixedTarget) -> Tensor:
        if isinstance(target, Tensor):
            return cross_entropy(scores, target)
        labels, partner_labels, lam = target.labels, target.partner_labels, target.lam
        own, partners = (cross_entropy(scores, each) for each in (labels, partner_labels))
        return lam * own + (1 - lam) * partners

    return loss


class DropPathByTorch(nn.Module):
    """Stochastic depth as one writes it with PyTorch alone."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        factors = input.new_empty(len(input), *[1] * (input.dim() - 1)).bernoulli_(1 - self.p)
        return input * factors.div_(1 - self.p)


class NoiseByTorch(nn.Module):
    """Gaussian noise, likewise."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, input: Tensor) -> Tensor:
        return input + self.std * torch.randn_like(input) if self.training else input


# How far images are turned, in degrees, shifted, in shares of their sides, and scaled; how many are
# erased in part, and how much of them. Digits are no others when they are seen so; mirrored they
# would be.
DEGREES, SHIFT, SCALE = 10.0, 0.1, (0.9, 1.1)
ERASED, ERASED_AREA, ERASED_RATIO = 0.25, (0.02, 0.06), (0.5, 2.0)


def background(data: Split) -> float:
    """What lies around an image, standardised: the least pixel, the mean of all channels'."""
    return float(((data.lower - data.mean) / data.std).mean())


def augment_by_torch(data: Split, seed: int) -> Augment:
    """The images turned, shifted, scaled and erased in part, as one writes it with PyTorch."""
    fill = background(data)
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int, low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    def augment(images: Tensor, numbers: Tensor, epoch: int) -> Tensor:
        n, _, h, w = images.shape
        angle = uniform(n, -DEGREES, DEGREES).deg2rad()
        zoom = uniform(n, *SCALE)
        x, y = (2 * (uniform(n, -SHIFT, SHIFT) * side).round() / side for side in (w, h))
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        rows = torch.stack([cos, sin * h / w, x, -sin * w / h, cos, y], 1).view(n, 2, 3)
        grid = F.affine_grid(rows.to(images), list(images.shape), align_corners=False)
        moved = F.grid_sample(images - fill, grid, align_corners=False) + fill
        area, ratio = h * w * uniform(n, *ERASED_AREA), uniform(n, *ERASED_RATIO)
        height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        top, left = (uniform(n, 0, 1) * (h - height + 1), uniform(n, 0, 1) * (w - width + 1))
        row, column = torch.arange(h), torch.arange(w)
        inside = [
            (line >= start.floor()[:, None]) & (line < (start.floor() + length)[:, None])
            for line, start, length in ((row, top, height), (column, left, width))
        ]
        box = inside[0][:, :, None] & inside[1][:, None, :]
        box &= (uniform(n, 0, 1) < ERASED)[:, None, None]
        return moved.masked_fill_(box[:, None].to(images.device), fill)

    return augment


def attack_by_torch(eps: float, data: Split) -> Attack:
    """Projected gradient descent on standardised images, likewise. BatchNorm's statistics follow
    the attack's batches, too."""

    def attack(model: nn.Module, images: Tensor, target: Any, loss: Loss) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, std = (part.to(images.device).view(shape) for part in (data.mean, data.std))
        radius, step = eps / std, 2.5 * eps / ATTACK_STEPS / std
        lower, upper = (data.lower - mean) / std, (data.upper - mean) / std

        def brought_in(adv: Tensor) -> Tensor:
            adv = torch.clamp(adv, images - radius, images + radius)
            return torch.clamp(adv, lower, upper)

        adv = brought_in(images + radius * (2 * torch.rand_like(images) - 1))
        for _ in range(ATTACK_STEPS):
            adv.requires_grad_()
            (grad,) = torch.autograd.grad(loss(model(adv), target), adv)
            adv = brought_in(adv.detach() + step * grad.sign())
        return adv

    return attack


@dataclass
class _Net:
    """A net in training, with all that trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mix: Mix | None
    noise: nn.Module | None
    augment: Augment | None
    attack: Attack | None
    loss: Loss
    shuffle: torch.Generator


class Residual(nn.Module):
    """A block of two convolutions, whose branch stochastic depth drops."""

    def __init__(self, channels: int, drop_path: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.drop_path = drop_path

    def forward(self, input: Tensor) -> Tensor:
        return input + self.drop_path(self.branch(input))


def build_residual_net(
    channels: int, classes: int, dropout: float, drop_paths: Sequence[nn.Module]
) -> nn.Sequential:
    """A net of residual blocks for [N, C, H, W] images of any size, as many as `drop_paths`."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(Residual(32, drop_path) for drop_path in drop_paths),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, classes),
    )


RESIDUAL_BLOCKS = 6


def build_net(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """A conv net for [N, C, H, W] images of any size, with some 500,000 weights.

    The features are pooled to 8 x 8, which leaves the digits' as they are: a head this wide can
    learn a few hundred images by heart.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(8),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 256),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(256, classes),
    )


class Training:
    """Trains the recipes one after the other, epoch by epoch, for one seed after the other.

    `state()` after an epoch is all that `restore()` needs to go on as if never interrupted: on
    the CPU the results are then equal to the bit.
    """

    def __init__(
        self,
        data: Split,
        classes: int,
        epochs: int,
        seed: int,
        device: torch.device,
        kernels: Kernels,
        regularised: Recipe = REGULARISED,
        model: str = MODELS[0],
        augment: bool = False,
        seeds: int = 1,
    ) -> None:
        self.epochs = epochs
        more = (dataclasses.replace(regularised, name="augmented", augment=True),) * augment
        self.recipes = (PLAIN, regularised, *more)
        self.runs = tuple(
            Run(recipe.name + (f", seed {s}" if seeds > 1 else ""), recipe, s)
            for s in range(seed, seed + seeds)
            for recipe in self.recipes
        )
        self.measures = MEASURES + ((ATTACKED,) if regularised.adversarial > 0 else ())
        self.history: dict[str, list[dict[str, float]]] = {run.name: [] for run in self.runs}
        self._data, self._model = data, model
        self._classes = classes
        self._seed = seed
        self._device = device
        self._kernels = kernels
        # Cloned: torch's own allocations are aligned alike in every process and numpy's are not,
        # and a vectorised sum may round differently for it.
        self._train_x, self._train_y, self._test_x, self._test_y = (
            part.clone().to(device)
            for part in (data.train_x, data.train_y, data.test_x, data.test_y)
        )
        shape = (1, -1, 1, 1)
        self._bounds = [  # of standardised images
            ((bound - data.mean) / data.std).view(shape).to(device)
            for bound in (data.lower, data.upper)
        ]
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
            while self._epoch < self.epochs:
                self._train_epoch(self._net, self._epoch)
                self.history[self.training.name].append(self._evaluate())
                self._epoch += 1
                after_epoch()
            if self._phase + 1 == len(self.runs):
                return
            self._begin(self._phase + 1)

    def state(self) -> dict[str, Any]:
        """A copy of everything that the rest of the training depends on: tensors and primitives."""
        on_cuda = self._device.type == "cuda"
        return copy.deepcopy(
            {
                "phase": self._phase,
                "epoch": self._epoch,
                "model": dict(self._net.model.state_dict()),
                "optimizer": self._net.optimizer.state_dict(),
                "shuffle": self._net.shuffle.get_state(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self._device) if on_cuda else None,
                "history": self.history,
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state()` was taken. Raises any type of exception if `state` is wrong.

        Everything is compared with what this training would have there, and so is each value of
        which only one is possible: a wrong state must not come to light when all is trained.
        """
        phase, epoch = state["phase"], state["epoch"]
        if type(phase) is not int or phase not in range(len(self.runs)):
            raise ValueError(f"phase {phase}")
        if type(epoch) is not int or epoch not in range(self.epochs + 1):
            raise ValueError(f"epoch {epoch} of {self.epochs}")
        steps = epoch * math.ceil(len(self._train_y) / BATCH)
        self._begin(phase)
        row = dict.fromkeys(self.measures, 0.0)
        done = [self.epochs] * phase + [epoch] + [0] * (len(self.runs) - phase - 1)
        moments = {
            index: {
                "step": torch.tensor(float(steps)),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for index, parameter in enumerate(self._net.model.parameters())
        }
        like = self.state()
        like["optimizer"]["state"] = moments if steps > 0 else {}
        like["history"] = {r.name: [row] * n for r, n in zip(self.runs, done, strict=True)}
        _check_alike(state, like)
        for group, ours in zip(
            *(s["optimizer"]["param_groups"] for s in (state, like)), strict=True
        ):
            if group | {"lr": ours["lr"]} != ours:  # each batch sets the rate anew
                raise ValueError("the optimizer is another one")
        counts = [e["step"] for e in state["optimizer"]["state"].values()]
        counts += [v for n, v in state["model"].items() if n.endswith("num_batches_tracked")]
        if any(count != steps for count in counts):
            raise ValueError(f"not {steps} steps")
        for row in itertools.chain.from_iterable(state["history"].values()):
            for name, value in row.items():
                # A loss may have run away; an accuracy is a share.
                if value < 0 or (name.endswith("accuracy") and not value <= 1):
                    raise ValueError(f"{name} {value}")

        self._begin(phase)
        self._net.model.load_state_dict(state["model"])
        self._net.optimizer.load_state_dict(state["optimizer"])
        self._net.shuffle.set_state(state["shuffle"])
        torch.set_rng_state(state["rng"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self._device)
        self._epoch = epoch
        self.history = copy.deepcopy(state["history"])

    def time_epochs(
        self, rounds: int, kinds: dict[str, Kernels], after_round: Callable[[], None]
    ) -> dict[str, dict[str, float]]:
        """The median seconds of an epoch, by recipe and by kind of kernels.

        Runs on nets and generators of its own. The contenders take turns epoch by epoch, so that
        whatever else the machine does meets all of them alike; a first round warms up.
        """
        contenders = {
            (recipe.name, kind): self._start(kernels, recipe, self._seed)
            for recipe in self.recipes
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
            recipe.name: {kind: statistics.median(seconds[recipe.name, kind]) for kind in kinds}
            for recipe in self.recipes
        }

    def _start(self, kernels: Kernels, recipe: Recipe, seed: int) -> _Net:
        """A net at its start; its random numbers do not depend on what ran before."""
        torch.manual_seed(seed)
        shape = (self._train_x.shape[1], self._classes, recipe.dropout)
        if self._model == "residual":
            rates = drop_path_rates(recipe.drop_path, RESIDUAL_BLOCKS)
            net = build_residual_net(*shape, [kernels.drop_path(rate) for rate in rates])
        else:
            net = build_net(*shape)
        model = kernels.convert(net).to(self._device)
        return _Net(
            model=model,
            optimizer=kernels.optimizer(
                model.parameters(), lr=LEARNING_RATE, weight_decay=recipe.weight_decay
            ),
            mix=kernels.mix(recipe.mixup) if recipe.mixup > 0 else None,
            noise=kernels.noise(recipe.noise) if recipe.noise > 0 else None,
            augment=kernels.augment(self._data, seed) if recipe.augment else None,
            attack=(
                kernels.attack(recipe.adversarial, self._data) if recipe.adversarial > 0 else None
            ),
            loss=kernels.loss(recipe.label_smoothing),
            shuffle=torch.Generator().manual_seed(seed),
        )

    def _begin(self, phase: int) -> None:
        """Starts a run from scratch."""
        self._phase, self._epoch = phase, 0
        self._net: _Net = self._start(self._kernels, self.training.recipe, self.training.seed)

    def _train_epoch(self, net: _Net, epoch: int) -> None:
        net.model.train()
        order = torch.randperm(len(self._train_y), generator=net.shuffle)
        # Batches of nearly one size: a last one of a single image would count as much as the
        # others, and BatchNorm cannot train on a single image of one pixel.
        batches = order.tensor_split(math.ceil(len(order) / BATCH))
        for index, batch in enumerate(batches):
            done = (epoch + index / len(batches)) / self.epochs
            for group in net.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * done))
            rows = batch.to(self._device)
            images = self._train_x[rows]
            target: Any = self._train_y[rows]
            if net.augment is not None:
                images = net.augment(images, batch, epoch)
            if net.mix is not None:
                images, target = net.mix(images, target)
            if net.noise is not None:
                images = torch.clamp(net.noise(images), *self._bounds)
            if net.attack is not None:
                images = net.attack(net.model, images, target, net.loss)
            net.optimizer.zero_grad()
            net.loss(net.model(images), target).backward()
            net.optimizer.step()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Mean loss and accuracy on both sets, in evaluation mode, which is alike for all nets."""
        self._net.model.eval()
        row = {}
        for name, x, y in (
            ("train", self._train_x, self._train_y),
            ("test", self._test_x, self._test_y),
        ):
            loss = torch.zeros((), dtype=torch.float64, device=self._device)
            correct = torch.zeros((), dtype=torch.int64, device=self._device)
            for images, labels in zip(
                x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True
            ):
                scores: Tensor = self._net.model(images)
                loss += F.cross_entropy(scores, labels, reduction="sum")
                correct += (scores.argmax(1) == labels).sum()
            row[f"{name}_loss"] = loss.item() / len(y)
            row[f"{name}_accuracy"] = correct.item() / len(y)
        if ATTACKED in self.measures:
            row[ATTACKED] = self._attacked_accuracy()
        return row

    def _attacked_accuracy(self) -> float:
        """The share of the test set that is still told right under the regularised recipe's attack.
        What is drawn for it does not change what training draws."""
        attack = self._kernels.attack(self.recipes[1].adversarial, self._data)
        loss, correct = self._kernels.loss(0.0), 0
        parts = (x.split(EVALUATION_BATCH) for x in (self._test_x, self._test_y))
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            for images, labels in zip(*parts, strict=True):
                with torch.enable_grad():
                    images = attack(self._net.model, images, labels, loss)
                scores: Tensor = self._net.model(images)
                correct += int((scores.argmax(1) == labels).sum())
        return correct / len(self._test_y)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def save_checkpoint(path: Path, options: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes what `load_checkpoint` reads; `options` are those that shape the result."""
    content = {"options": options, "state": state}
    save({"format": FORMAT, "sha256": _digest(content), "content": content}, path)


def save(value: object, path: Path) -> None:
    """As torch.save, but a full disk raises OSError as it does everywhere else."""
    blob = io.BytesIO()
    torch.save(value, blob)
    path.write_bytes(blob.getbuffer())


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options and the state saved at `path`.

    Raises OSError when the file cannot be read and ValueError when it is damaged or something
    else. Never runs code from the file: `weights_only=True`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("a device, a pipe or a socket")
    with path.open("rb") as file:
        try:
            saved = torch.load(file, weights_only=True, map_location="cpu")
            if saved["format"] != FORMAT or saved["sha256"] != _digest(saved["content"]):
                raise ValueError("another format or other values than were saved")
            return dict(saved["content"]["options"]), dict(saved["content"]["state"])
        except Exception as error:
            # The archive reader and the unpickler raise nearly any type on a damaged file.
            raise ValueError(f"not a whole {FORMAT}: {error}") from error


def _check_alike(value: Any, like: Any, where: str = "state") -> None:
    """Raises ValueError unless both are made alike: types, keys, lengths, and a tensor's dtype,
    shape and layout."""
    if type(value) is not type(like):
        raise ValueError(f"{where}: {type(value)} where {type(like)} was expected")
    if isinstance(like, dict):
        if value.keys() != like.keys():
            raise ValueError(f"{where}: {list(value)} where {list(like)} were expected")
        for key in like:
            _check_alike(value[key], like[key], f"{where}.{key}")
    elif isinstance(like, list | tuple):
        for index, pair in enumerate(zip(value, like, strict=True)):
            _check_alike(*pair, f"{where}.{index}")
    elif isinstance(like, Tensor):
        for make in (
            (value.dtype, like.dtype),
            (value.shape, like.shape),
            (value.layout, like.layout),
        ):
            if make[0] != make[1]:
                raise ValueError(f"{where}: {make[0]} where {make[1]} was expected")


def _digest(content: dict[str, Any]) -> str:
    """The SHA-256 of nested dicts and lists of tensors and primitives.

    torch.load checks no checksum: of 1,500 files with one bit flipped it read 1,234 into other
    values without complaint.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            digest.update(b"{")
            for key, item in value.items():
                add(key)
                add(item)
            digest.update(b"}")
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for item in value:
                add(item)
            digest.update(b"]")
        elif isinstance(value, Tensor):
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError("a tensor that is larger than what it is stored in")
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(f"{value!r};".encode())

    add(content)
    return digest.hexdigest()
