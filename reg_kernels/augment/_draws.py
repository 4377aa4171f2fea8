"""What each sample draws: Philox words keyed by (seed, epoch, sample index, slot), on the host.

The key is the pipeline's seed xor the tag "augdraws". The counter, of four words, is the sample's
index (two words, the low one first), the slot of the transform << 8 | the number of the group in
it, and the epoch. A group is four words. So what a sample draws depends on nothing else: not on the
batch that it is in, nor on the worker, the rank or the device.

A word w stands for the number w * 2^-32 in [0, 1), and a whole number below n is floor(n w 2^-32).
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .._rng import tag
from ..ops._host_draws import draw_words, first_rectangle

TAG = tag("augdraws")
MOST_GROUPS = 256  # of a slot
SLOTS = 1 << 24


def uniform(seed: int, epoch: int, indices: Tensor, groups: Tensor) -> Tensor:
    """All that N samples draw: float64 (4 * len(groups), N), in [0, 1).

    `groups` are slot << 8 | number, (G,)."""
    return draw_words((seed ^ TAG) & (2**64 - 1), epoch, indices.contiguous(), groups)


TRIES = 10
RECTANGLE_WORDS = 2 * TRIES + 2


def rectangle(
    u: Tensor, size: Tensor, scale: Sequence[float], ratio: Sequence[float], is_crop: bool
) -> tuple[Tensor, int]:
    """The first of ten rectangles that fits, (4, N), and how many samples have one; of a share of
    the area in `scale`, and of sides with a ratio whose logarithm is uniform."""
    stretches = between(u[TRIES : 2 * TRIES], [math.log(x) for x in ratio]).exp_()
    low, high = scale
    return first_rectangle(u, stretches, size, low, high - low, is_crop)


def integers(u: Tensor, count: Tensor | float) -> Tensor:
    """Whole numbers in [0, count)."""
    return (u * count).floor_()


def between(u: Tensor, limits: Sequence[float]) -> Tensor:
    """Numbers in [limits[0], limits[1])."""
    low, high = limits
    return (u * (high - low)).add_(low)


def between_each(u: Tensor, limits: tuple[Sequence[float], ...]) -> Tensor:
    """Numbers in the k-th of K limits, (K, ..., N)."""
    low, span = _low_and_span(limits, u.dim())
    return (u * span).add_(low)


@functools.lru_cache
def _low_and_span(limits: tuple[Sequence[float], ...], dims: int) -> tuple[Tensor, ...]:
    numbers = [(low, high - low) for low, high in limits]
    table = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return table.T.view(2, -1, *(1,) * (dims - 1)).unbind()


def normals(u: Tensor, v: Tensor) -> Tensor:
    """Normal numbers, one of each two uniform ones (G. Box, M. Muller, 1958)."""
    return (-2 * torch.log1p(-u)).sqrt_() * torch.cos(2 * math.pi * v)


def keys(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A 64-bit key by 16 bits, the lowest first, of two words."""
    parts = []
    for word in (u * 2.0**32, v * 2.0**32):
        upper = (word * 2.0**-16).floor_()
        parts += [word - upper * 2.0**16, upper]
    return tuple(parts)  # type: ignore[return-value]


GAMMA_TRIES = 8
GAMMA_WORDS = 3 * GAMMA_TRIES + 1


def log_gammas(alpha: float | Tensor, u: Tensor) -> Tensor:
    """Logarithms of numbers of Gamma(alpha), (N,), of (GAMMA_WORDS, N) uniform ones.

    G. Marsaglia, W. Tsang, "A simple method for generating gamma variables", 2000, for alpha + 1,
    then times U^(1 / alpha); by logarithms, since for a small alpha the number itself underflows.
    One try in twenty is rejected at most; if all eight were, it is the distribution's middle.
    """
    d = alpha + 2 / 3
    tries = u[:-1].view(3, GAMMA_TRIES, -1)
    x = normals(tries[0], tries[1])
    v = (1 + x / (9 * d) ** 0.5).clamp_(min=0) ** 3
    log_v = v.log()
    accepted = torch.log1p(-tries[2]) < x * x / 2 + d - d * v + d * log_v
    first = accepted.to(torch.int8).argmax(0, keepdim=True)
    chosen = log_v.gather(0, first).masked_fill_(~accepted.any(0, keepdim=True), 0.0)
    log_d = d.log() if isinstance(d, Tensor) else math.log(d)
    return chosen[0] + log_d + torch.log1p(-u[-1]) / alpha


def slot_of(name: str) -> int:
    return zlib.crc32(name.encode()) % SLOTS


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, without waiting for what is under way there."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class MixDraws:
    """What `Mixup` draws in a pipeline: for each sample that has a draw of its own, by its key; for
    a batch by that of its first sample, for a pair by that of its first one."""

    device = torch.device("cpu")

    def __init__(self, seed: int, epoch: int, indices: Tensor) -> None:
        self._key = (seed, epoch)
        self._indices = indices
        self._words: Tensor | None = None

    def _drawn(self, alpha: Tensor) -> Tensor:
        if self._words is None:
            groups = torch.arange(2 + GAMMA_WORDS // 2) + (slot_of("Mixup") << 8)
            self._words = uniform(*self._key, self._indices[: len(alpha)], groups)
        return self._words

    def uniform(self, alpha: Tensor) -> Tensor:
        return self._drawn(alpha)[:6]

    def beta(self, alpha: Tensor) -> Tensor:
        words = self._drawn(alpha)[6:]
        gammas = words[: 2 * GAMMA_WORDS].view(2, GAMMA_WORDS, -1)
        return (log_gammas(alpha, gammas[0]) - log_gammas(alpha, gammas[1])).sigmoid()
