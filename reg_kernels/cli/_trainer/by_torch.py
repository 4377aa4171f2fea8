"""What a net is trained with, as one writes it with PyTorch alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._mixed_target import MixedTarget
from ...optim import param_groups
from ...training import Recipe
from .._data import Split
from .kernels import ATTACK_STEPS, Attack, Augment, Distill, Kernels, Loss, Mix, Ranges, background


class ProximalAdamW(torch.optim.AdamW):
    """AdamW, and then the soft threshold of decoupled L1 by each group's "l1"."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            if group["l1"] > 0:
                for p in group["params"]:
                    p.copy_(p.sign() * (p.abs() - group["lr"] * group["l1"]).clamp_(min=0))
        return loss


def mix_by_torch(mixup: float, cutmix: float = 0.0) -> Mix:
    """Mixup or CutMix of the batch with itself reversed."""
    alphas = [alpha for alpha in (mixup, cutmix) if alpha > 0]
    betas = [torch.distributions.Beta(alpha, alpha) for alpha in alphas]

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, MixedTarget]:
        pastes = cutmix > 0 and (mixup == 0 or torch.rand(()).item() < 0.5)
        lam = betas[-1 if pastes else 0].sample().item()
        partners = images.flip(0)
        if not pastes:
            mixed = lam * images + (1 - lam) * partners
        else:
            sides = images.shape[-2:]
            cuts = []
            for side in sides:
                half, at = int(side * (1 - lam) ** 0.5) // 2, int(torch.randint(side, ()))
                cuts.append(slice(max(0, at - half), min(side, at + half)))
            mixed = images.clone()
            mixed[..., cuts[0], cuts[1]] = partners[..., cuts[0], cuts[1]]
            pasted = math.prod(cut.stop - cut.start for cut in cuts)
            lam = 1 - pasted / math.prod(sides)
        return mixed, MixedTarget(labels, labels.flip(0), lam)

    return mix


def loss_by_torch(label_smoothing: float) -> Loss:
    """The cross-entropy of one label or of two."""
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def loss(scores: Tensor, target: Tensor | MixedTarget) -> Tensor:
        if isinstance(target, Tensor):
            return cross_entropy(scores, target)
        labels, partner_labels, lam = target.labels, target.partner_labels, target.lam
        own, partners = (cross_entropy(scores, each) for each in (labels, partner_labels))
        return lam * own + (1 - lam) * partners

    return loss


class DropPathByTorch(nn.Module):
    """Stochastic depth."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        factors = input.new_empty(len(input), *[1] * (input.dim() - 1)).bernoulli_(1 - self.p)
        return input * factors.div_(1 - self.p)


class NoiseByTorch(nn.Module):
    """Gaussian noise in training."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, input: Tensor) -> Tensor:
        return input + self.std * torch.randn_like(input) if self.training else input


def distill_by_torch(recipe: Recipe) -> Distill:
    """The labels' loss and, at a temperature, the divergence from the teacher."""
    of_labels, share = loss_by_torch(recipe.label_smoothing), recipe.distillation
    temperature = recipe.temperature

    def loss(scores: Tensor, teacher: Tensor, target: Tensor | MixedTarget) -> Tensor:
        soft = F.kl_div(
            F.log_softmax(scores / temperature, 1),
            F.log_softmax(teacher / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - share) * of_labels(scores, target) + share * temperature**2 * soft

    return loss


def augment_by_torch(magnitude: float, data: Split, seed: int) -> Augment:
    """The images turned, shifted, scaled and erased in part."""
    ranges, fill = Ranges.of(magnitude), background(data)
    generator, started = torch.Generator(), -1

    def uniform(n: int, low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    def augment(images: Tensor, numbers: Tensor, epoch: int) -> Tensor:
        nonlocal started
        if epoch != started:  # so that a resumed training draws alike
            generator.manual_seed(1_000_003 * seed + epoch)
            started = epoch
        n, _, h, w = images.shape
        angle = uniform(n, -ranges.degrees, ranges.degrees).deg2rad()
        zoom = uniform(n, *ranges.scale)
        x, y = (
            2 * (uniform(n, -ranges.shift, ranges.shift) * side).round() / side for side in (w, h)
        )
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        rows = torch.stack([cos, sin * h / w, x, -sin * w / h, cos, y], 1).view(n, 2, 3)
        grid = F.affine_grid(rows.to(images), list(images.shape), align_corners=False)
        moved = F.grid_sample(images - fill, grid, align_corners=False) + fill
        area = h * w * uniform(n, *ranges.erased_area)
        ratio = uniform(n, *ranges.erased_ratio)
        height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        top, left = (uniform(n, 0, 1) * (h - height + 1), uniform(n, 0, 1) * (w - width + 1))
        row, column = torch.arange(h), torch.arange(w)
        inside = [
            (line >= start.floor()[:, None]) & (line < (start.floor() + length)[:, None])
            for line, start, length in ((row, top, height), (column, left, width))
        ]
        box = inside[0][:, :, None] & inside[1][:, None, :]
        box &= (uniform(n, 0, 1) < ranges.erased)[:, None, None]
        return moved.masked_fill_(box[:, None].to(images.device), fill)

    return augment


def attack_by_torch(eps: float, data: Split) -> Attack:
    """Projected gradient descent on standardised images. BatchNorm's statistics follow
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


BY_TORCH = Kernels(
    convert=lambda model: model,
    optimizer=lambda model, recipe: ProximalAdamW(
        param_groups(model, recipe.weight_decay, l1=recipe.l1), lr=recipe.learning_rate
    ),
    mix=lambda recipe, classes: mix_by_torch(recipe.mixup, recipe.cutmix),
    loss=loss_by_torch,
    distill=distill_by_torch,
    l2=lambda params: torch.stack([p.square().sum() for p in params]).sum(),
    drop_path=DropPathByTorch,
    noise=NoiseByTorch,
    attack=attack_by_torch,
    augment=augment_by_torch,
)
