"""The nets that are trained, for [N, C, H, W] images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor, nn

from ...nn import drop_path_rates
from ...training import Recipe

RESIDUAL_BLOCKS, MIXER_BLOCKS = 6, 4
_DIM = 64  # of a patch in the mixer

# Makes stochastic depth of a probability, by PyTorch or by ours.
DropPaths = Callable[[float], nn.Module]


def build_model(
    recipe: Recipe, shape: tuple[int, ...], classes: int, drop_path: DropPaths
) -> nn.Sequential:
    """The net of a recipe, at its start, for images of `shape`, (C, H, W)."""
    layers = _BUILDERS[recipe.model](recipe, shape, classes, drop_path)
    front = [nn.Dropout(recipe.input_dropout)] if recipe.input_dropout > 0 else []
    return nn.Sequential(*front, *layers)


def _conv_norm(recipe: Recipe, inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not recipe.batch_norm)
    return [conv, nn.BatchNorm2d(outputs)] if recipe.batch_norm else [conv]


def _conv(
    recipe: Recipe, shape: tuple[int, ...], classes: int, drop_path: DropPaths
) -> list[nn.Module]:
    """Two convolutions and a wide head, some 500,000 weights.

    The features are pooled to 8 x 8, which leaves the digits' as they are: a head this wide can
    learn a few hundred images by heart.
    """
    return [
        *_conv_norm(recipe, shape[0], 16),
        nn.ReLU(),
        *_conv_norm(recipe, 16, 32),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(8),
        nn.Dropout(recipe.dropout),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 256),
        nn.ReLU(),
        nn.Dropout(recipe.dropout),
        nn.Linear(256, classes),
    ]


class Residual(nn.Module):
    """A block whose branch stochastic depth drops."""

    def __init__(self, branch: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.drop_path = drop_path

    def forward(self, input: Tensor) -> Tensor:
        return input + self.drop_path(self.branch(input))


def _resnet(
    recipe: Recipe, shape: tuple[int, ...], classes: int, drop_path: DropPaths
) -> list[nn.Module]:
    """Residual blocks of two convolutions."""
    pair = functools.partial(_conv_norm, recipe, 32, 32)
    return [
        *_conv_norm(recipe, shape[0], 32),
        nn.ReLU(),
        *(
            Residual(nn.Sequential(*pair(), nn.ReLU(), *pair()), drop_path(rate))
            for rate in drop_path_rates(recipe.drop_path, RESIDUAL_BLOCKS)
        ),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Dropout(recipe.dropout),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, classes),
    ]


def _mlp(
    recipe: Recipe, shape: tuple[int, ...], classes: int, drop_path: DropPaths
) -> list[nn.Module]:
    """Two hidden layers of 256 units."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (math.prod(shape), 256):
        layers.append(nn.Linear(inputs, 256, bias=not recipe.batch_norm))
        layers += [nn.BatchNorm1d(256)] if recipe.batch_norm else []
        layers += [nn.ReLU(), nn.Dropout(recipe.dropout)]
    return [*layers, nn.Linear(256, classes)]


class _Patches(nn.Module):
    """Images as patches of `side` x `side` pixels: [N, C, H, W] -> [N, P, D]. Images whose sides
    are no multiples of it are padded by zeros."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.embed = nn.Conv2d(channels, _DIM, side, stride=side)

    def forward(self, input: Tensor) -> Tensor:
        h, w = input.shape[-2:]
        padded = nn.functional.pad(input, (0, -w % self.side, 0, -h % self.side))
        patches: Tensor = self.embed(padded)
        return patches.flatten(2).transpose(1, 2)


class _AcrossPatches(nn.Module):
    """A module of the last dimension, on the patches: [N, P, D] -> [N, P, D]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        mixed: Tensor = self.module(input.transpose(1, 2))
        return mixed.transpose(1, 2)


class _Mean(nn.Module):
    """[N, P, D] -> [N, D]."""

    def forward(self, input: Tensor) -> Tensor:
        return input.mean(1)


def _mixer(
    recipe: Recipe, shape: tuple[int, ...], classes: int, drop_path: DropPaths
) -> list[nn.Module]:
    """Patches, mixed by small MLPs across them and within them in turn, with residuals and
    LayerNorm: I. Tolstikhin et al., "MLP-Mixer: an all-MLP architecture for vision", NeurIPS 2021.
    """
    side = max(1, min(shape[1:]) // 4)
    patches = math.prod(-(-length // side) for length in shape[1:])

    def mlp(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    rates = drop_path_rates(recipe.drop_path, MIXER_BLOCKS)
    blocks: list[nn.Module] = []
    for rate in rates:
        across = nn.Sequential(nn.LayerNorm(_DIM), _AcrossPatches(mlp(patches)))
        within = nn.Sequential(nn.LayerNorm(_DIM), mlp(_DIM))
        blocks += [Residual(across, drop_path(rate)), Residual(within, drop_path(rate))]
    head = [nn.LayerNorm(_DIM), _Mean(), nn.Dropout(recipe.dropout), nn.Linear(_DIM, classes)]
    return [_Patches(shape[0], side), *blocks, *head]


_BUILDERS = {"conv": _conv, "resnet": _resnet, "mlp": _mlp, "mixer": _mixer}


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Those that decay: biases and norms have fewer than two dimensions in all of these nets."""
    return [p for p in model.parameters() if p.dim() > 1]
