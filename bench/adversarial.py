"""Accuracy under attack of a net trained plainly, adversarially, "for free" and by TRADES.

    python -m bench.adversarial [--epochs 12] [--seed 0]

On scikit-learn's digits, 8×8 images with pixels in [0, 1], in a minute. The attack is PGD of 40
steps from 2 random starts in the L-infinity ball of `EPS`, on test images, in evaluation mode.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reg_kernels import adversarial, optim
from reg_kernels import nn as fused

EPS = 0.15  # of pixels in [0, 1]
REPLAYS = 4
BATCH = 64

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]


def digits(seed: int) -> tuple[Tensor, ...]:
    """Images (N, 1, 8, 8) and labels to train on, then to test on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1297], order[1297:]
    labels = torch.tensor(found.target)
    return images[train], labels[train], images[test], labels[test]


def net() -> nn.Module:
    def block(channels: int, width: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, padding=1), fused.BatchNormAct2d(width)]

    return nn.Sequential(
        *block(1, 16), *block(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)
    )


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    _update(optimizer, nn.functional.cross_entropy(model(x), y))


def by_pgd(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    attack = adversarial.PGD(model, EPS, EPS / 4, 7)
    plain(model, optimizer, attack(x, y), y)


def by_trades(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    attack = {"epsilon": EPS, "step_size": EPS / 4, "perturb_steps": 7}
    _update(optimizer, adversarial.trades_loss(model, x, y, **attack, beta=6.0))


def for_free() -> Step:
    free = adversarial.FreeAdversarial(EPS, REPLAYS, EPS / 2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        for adv in free(x):
            plain(model, optimizer, adv, y)

    return step


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def train(step: Step, epochs: int, seed: int) -> tuple[float, float, float]:
    """Accuracy on clean images and under attack, and the seconds of training."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = digits(seed)
    model = net().train()
    optimizer = optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    begin = time.perf_counter()
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(BATCH):
            step(model, optimizer, x[part], y[part])
    seconds = time.perf_counter() - begin
    model.eval()
    attacked = adversarial.PGD(model, EPS, EPS / 10, 40, restarts=2)(x_test, y_test)
    return accuracy(model, x_test, y_test), accuracy(model, attacked, y_test), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    few = max(1, args.epochs // REPLAYS)
    for name, step, epochs in (
        ("plain", plain, args.epochs),
        ("PGD", by_pgd, args.epochs),
        ("free", for_free(), few),
        ("TRADES", by_trades, args.epochs),
    ):
        clean, attacked, seconds = train(step, epochs, args.seed)
        print(f"{name:7} clean {clean:6.1%}  under PGD {attacked:6.1%}  {seconds:5.1f} s")


if __name__ == "__main__":
    main()
