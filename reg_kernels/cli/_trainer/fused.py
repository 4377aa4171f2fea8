"""The fused twins of what a net is trained with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import augment, convert, functional, nn, optim
from ...adversarial import PGD
from ...training import Recipe
from .._data import Split
from .kernels import ATTACK_STEPS, Attack, Augment, Kernels, Loss, Mix, Ranges, background


def fused_kernels(backend: str | None) -> Kernels:
    """Ours, all on one implementation; None leaves each its own choice."""
    return Kernels(
        convert=lambda model: convert(model, inplace=True, fuse=True, backend=backend),
        optimizer=lambda model, recipe: optim.AdamW(
            optim.param_groups(model, recipe.weight_decay, l1=recipe.l1),
            lr=recipe.learning_rate,
            backend=backend,
        ),
        mix=lambda recipe, classes: _mixup(recipe, classes, backend),
        loss=lambda smoothing: nn.CrossEntropyLoss(label_smoothing=smoothing, backend=backend),
        distill=lambda recipe: nn.DistillationLoss(
            recipe.temperature,
            recipe.distillation,
            label_smoothing=recipe.label_smoothing,
            backend=backend,
        ),
        l2=functools.partial(functional.l2_penalty, backend=backend),
        drop_path=lambda p: nn.DropPath(p, backend=backend),
        noise=lambda std: nn.GaussianNoise(std, backend=backend),
        attack=lambda eps, data: fused_attack(eps, data, backend),
        augment=lambda magnitude, data, seed: pipeline(magnitude, data, seed, backend),
    )


def _mixup(recipe: Recipe, classes: int, backend: str | None) -> Mix:
    return augment.Mixup(
        recipe.mixup,
        recipe.cutmix,
        label_smoothing=0.0,
        num_classes=classes,
        backend=backend,
    )


def pipeline(magnitude: float, data: Split, seed: int, backend: str | None) -> Augment:
    """The augmentation in one kernel; an image's draws depend on its number and the epoch alone."""
    ranges, fill = Ranges.of(magnitude), background(data)
    pipeline = augment.Pipeline(
        augment.RandomAffine(
            ranges.degrees,
            translate=(ranges.shift, ranges.shift),
            scale=ranges.scale,
            interpolation="bilinear",
            fill=fill,
        ),
        augment.RandomErasing(
            ranges.erased, scale=ranges.erased_area, ratio=ranges.erased_ratio, value=fill
        ),
        seed=seed,
        backend=backend,
    )

    def run(images: Tensor, numbers: Tensor, epoch: int) -> Tensor:
        pipeline.set_epoch(epoch)
        augmented: Tensor = pipeline(images, indices=numbers)
        return augmented

    return run


def fused_attack(eps: float, data: Split, backend: str | None) -> Attack:
    """The attack by the fused step. BatchNorm's statistics do not follow its batches."""

    def attack(model: torch.nn.Module, images: Tensor, target: Any, loss: Loss) -> Tensor:
        pgd = PGD(
            *(model, eps, 2.5 * eps / ATTACK_STEPS, ATTACK_STEPS),
            loss=loss,
            lower=data.lower,
            upper=data.upper,
            mean=data.mean.to(images.device),
            std=data.std.to(images.device),
            backend=backend,
        )
        return pgd(images, target)

    return attack
