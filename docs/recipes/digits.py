"""What the recipes share: scikit-learn's handwritten digits, a small net of torch's own layers, an
evaluation, and `--steps N` for a short try."""

import argparse
import sys
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, CLASSES = 50, 10
MEAN, STD = 0.305, 0.376  # of the pixels in [0, 1]


class Digits(NamedTuple):
    train: TensorDataset  # of images, bytes [N, 1, 8, 8], and labels [N]
    validation: TensorDataset  # what is chosen is chosen by these
    test: TensorDataset  # for the last line alone
    epochs: int


def load(epochs: int = 30) -> Digits:
    """1,000 digits to train on, 300 and 497; one epoch of N batches where `--steps N` is given."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--steps", type=int, help="train with so many batches, once")
    steps = parser.parse_args().steps
    size = 1000 if steps is None else steps * BATCH
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = order[:size], order[1000:1300], order[1300:]
    parts = (TensorDataset(images[part], labels[part]) for part in rows)
    return Digits(*parts, epochs if steps is None else 1)


def conv_net(width: int = 32) -> nn.Module:
    """A net for images [N, 1, 8, 8]."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * width, CLASSES)),
    )


@torch.no_grad()
def evaluate(model: nn.Module, pipeline, data: TensorDataset) -> tuple[float, float]:
    """(mean loss, accuracy) on images that were not augmented."""
    device = next(model.parameters()).device
    images, labels = (each.to(device) for each in data.tensors)
    model.eval()
    scores = model(pipeline.eval()(images))
    model.train()
    pipeline.train()
    loss = F.cross_entropy(scores.float(), labels)
    return loss.item(), (scores.argmax(1) == labels).float().mean().item()
