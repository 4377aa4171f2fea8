"""timm's policies, by the strings that its training scripts take."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .._augment_program import WarpFilter
from .._numbers import refuse
from . import _draws
from ._assemble import Assembly, Fill
from ._policy_ops import NUMBER, add
from ._policy_tables import IMAGENET, V0, Step
from ._transform import Transform, Values, warp_filter
from .policies import _Mixing, _Policy, check_blur

_INF = math.inf


class _Level(NamedTuple):
    """How a level m in [0, 1] becomes a strength: start + step * min(whole(slope m), cap), kept in
    [least, most]; `step` takes a random sign where `signed`."""

    op: str
    slope: float
    start: float = 0.0
    step: float = 1.0
    whole: bool = False
    cap: float = _INF
    signed: bool = False
    least: float = -_INF
    most: float = _INF


def _enhancers() -> dict[str, _Level]:
    levels = {}
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        levels[name] = _Level(name, 1.8, 0.1)
        levels[f"{name}Increasing"] = _Level(name, 0.9, 1.0, signed=True, least=0.1)
    return levels


_BITS: dict[str, Any] = {"whole": True, "least": 1.0, "most": 8.0}  # 0 bits would be black
_LEVELS = {
    **{name: _Level(name, 0.0) for name in ("AutoContrast", "Equalize", "Invert")},
    "Rotate": _Level("Rotate", 30.0, signed=True),
    "ShearX": _Level("ShearX", 0.3, signed=True),
    "ShearY": _Level("ShearY", 0.3, signed=True),
    "TranslateXRel": _Level("TranslateX", 1.0, signed=True),  # times translate_pct and the side
    "TranslateYRel": _Level("TranslateY", 1.0, signed=True),
    "Posterize": _Level("Posterize", 4.0, **_BITS),
    "PosterizeIncreasing": _Level("Posterize", 4.0, 4.0, -1.0, **_BITS),
    "PosterizeOriginal": _Level("Posterize", 4.0, 4.0, **_BITS),
    "Solarize": _Level("Solarize", 256.0, 0.0, 1 / 255, whole=True, cap=256.0),
    "SolarizeIncreasing": _Level("Solarize", 256.0, 256 / 255, -1 / 255, whole=True, cap=256.0),
    "SolarizeAdd": _Level("SolarizeAdd", 110.0, 0.0, 1 / 255, whole=True, cap=128.0),
    **_enhancers(),
    "Desaturate": _Level("Color", 0.5, 0.5, -1.0, cap=0.5),
    "GaussianBlur": _Level("GaussianBlur", 1.9, 0.1, cap=1.9),
    "GaussianBlurRand": _Level("GaussianBlur", 2.0, cap=2.0, least=0.1),  # the most of a range
}

_RAND = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY"),
    *("TranslateXRel", "TranslateYRel"),
)
_INCREASING = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
_AUGMIX = tuple(name for name in _RAND if name not in ("Invert", "SolarizeAdd"))
_3A = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
_WEIGHTS = {
    "weights": {
        **{"Rotate": 3.0, "ShearX": 2.0, "ShearY": 2.0, "TranslateXRel": 1.0},
        **{"TranslateYRel": 1.0, "ColorIncreasing": 0.25, "SharpnessIncreasing": 0.25},
        **{"AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05},
        **{"ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05},
        **{"PosterizeIncreasing": 0.05, "Invert": 0.05},
    },
    "3aw": {
        **dict.fromkeys(_3A, 6.0),
        **{"Rotate": 3.0, "ShearX": 2.0, "ShearY": 2.0, "PosterizeIncreasing": 1.0},
        **{"AutoContrast": 1.0, "ColorIncreasing": 1.0, "SharpnessIncreasing": 1.0},
        **{"ContrastIncreasing": 1.0, "BrightnessIncreasing": 1.0, "Equalize": 1.0, "Invert": 1.0},
    },
}
# Of a policy's pairs of (operation, probability, level); those of one step are done alone.
_PAIRS: dict[str, tuple[Sequence[Sequence[Step]], dict[str, str]]] = {
    "original": (IMAGENET, {"Posterize": "PosterizeOriginal"}),
    "originalr": (IMAGENET, {"Posterize": "PosterizeIncreasing"}),
    "v0": (V0, {}),
    "v0r": (V0, {"Posterize": "PosterizeIncreasing"}),
    "3a": (
        [[(name, 1.0, level)] for name, level in
         (("Solarize", 5.0), ("Desaturate", 10.0), ("GaussianBlurRand", 10.0))],
        {},
    ),
}  # fmt: skip
_WORDS = 6  # of a step: whether it is done, its level (2), its sign, its filter, its blur


def _increasing(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}Increasing" if name in _INCREASING else name for name in names)


@functools.cache
def _level_table(names: tuple[str, ...]) -> Tensor:
    rows = [[NUMBER[_LEVELS[name].op], *map(float, _LEVELS[name][1:])] for name in names]
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


class _Steps(_Policy):
    """What draws levels as timm does, and a filter for each step."""

    step_columns: tuple[str, ...] = ("op", "strength", "filter")
    mstd: float = 0.0
    most: float = 10.0
    translate_pct: float = 0.45

    def _set_common(self, config: str, fill: Fill, interpolation: str) -> None:
        self.config = config
        self.fill = self._fill(fill)
        self.interpolation = interpolation
        if interpolation != "random":
            self.filter = warp_filter(self, interpolation)
        names = {_LEVELS[name].op for name in self.names}
        self.blurs = "GaussianBlur" in names

    def __repr__(self) -> str:
        return f"from_timm({self.config!r}, fill={self.fill}, interpolation={self.interpolation!r})"

    def _step_columns(self, count: int) -> tuple[str, ...]:
        names = ("op", "strength", "filter")
        return tuple(f"{name}{k}" for name in names for k in range(1, count + 1))

    def _draw_steps(
        self, choice: Tensor, p: Tensor | float, level: Tensor | float, u: Tensor, a: Assembly
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Operations, strengths and filters (K, N) of chosen names; `u` is (6, K, N)."""
        done = u[0] < p
        if self.mstd == _INF:
            level = level * u[1]
        elif self.mstd > 0:
            level = level + self.mstd * _draws.normals(u[1], u[2])
        m = torch.as_tensor(level, dtype=torch.float64).clamp(0, self.most) / 10
        table = _level_table(self.names)[:, choice]
        op, slope, start, step, whole, cap, signed, least, most = table
        v = slope * m
        v = torch.minimum(torch.where(whole > 0, v.floor(), v), cap)
        step = torch.where((signed > 0) & (u[3] <= 0.5), -step, step)
        strength = torch.clamp(start + step * v, least, most)
        if "GaussianBlurRand" in self.names:
            is_drawn = choice == self.names.index("GaussianBlurRand")
            strength = torch.where(is_drawn, 0.1 + (strength - 0.1) * u[5], strength)
        for name, side in (("TranslateX", a.width), ("TranslateY", a.height)):
            shift = torch.where(op == NUMBER[name], self.translate_pct * side, 1.0)
            strength = strength * shift
        filters = torch.full_like(strength, float(WarpFilter.BILINEAR))
        if self.interpolation != "random":
            filters.fill_(float(self.filter))
        else:
            filters.masked_fill_(u[4] < 0.5, float(WarpFilter.BICUBIC))
        return op * done, strength, filters

    def _add_steps(
        self,
        parts: Sequence[Tensor],
        on: Tensor | None,
        assembly: Assembly,
        is_seen: bool = True,
    ) -> None:
        assembly.check_channels(1, 3)
        if self.blurs:
            check_blur(assembly)
        ops, strengths, filters = parts
        fill = self.fill
        if fill is not None:  # in values of bytes, whatever the images are
            if assembly.channels == 1:
                fill = (sum(fill) / len(fill),)
            scale = assembly.bound / (255 * assembly.unit)
            fill = tuple(x * scale for x in fill)
        add(assembly, ops, strengths, filters, fill, on, self.blurs, is_seen)


class TimmAugment(_Steps):
    """timm's RandAugment and AutoAugment; `from_timm` makes it."""

    def __init__(
        self,
        config: str,
        names: Sequence[str],
        layers: int,
        *,
        p: float = 0.5,
        magnitude: float = 10.0,
        weights: Sequence[float] | None = None,
        pairs: Sequence[Sequence[Step]] | None = None,
        mstd: float = 0.0,
        most: float = 10.0,
        fill: Fill = None,
        interpolation: str = "random",
    ) -> None:
        self.names = tuple(names)
        self.layers = layers
        self.each, self.magnitude, self.mstd, self.most = p, magnitude, mstd, most
        self.weights = None
        if weights is not None:
            self.weights = torch.tensor(weights, dtype=torch.float64, device="cpu").unsqueeze(1)
        self.pairs = None
        if pairs is not None:
            steps = [[self.names.index(name), p, m] for pair in pairs for name, p, m in pair]
            self.pairs = torch.tensor(steps, dtype=torch.float64, device="cpu").view(-1, layers, 3)
        self._set_common(config, fill, interpolation)
        self.columns = self._step_columns(layers)

    @property
    def needed_words(self) -> int:
        chosen = self.layers if self.weights is None else len(self.names)
        return _WORDS * self.layers + chosen

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        steps = u[: _WORDS * self.layers].view(_WORDS, self.layers, -1)
        words = u[_WORDS * self.layers :]
        p: Tensor | float = self.each
        level: Tensor | float = self.magnitude
        if self.pairs is not None:
            pair = _draws.integers(words[0], len(self.pairs)).long()
            chosen, p, level = self.pairs[pair].permute(2, 1, 0)
            choice = chosen.long()
        elif self.weights is None:
            choice = _draws.integers(words[: self.layers], len(self.names)).long()
        else:
            # Without replacement, by weight: those whose exponential waiting times end first.
            times = -torch.log1p(-words) / self.weights
            choice = times.topk(self.layers, dim=0, largest=False).indices
        drawn = self._draw_steps(choice, p, level, steps, assembly)
        return [row for part in drawn for row in part]

    def write(self, values: Values, on: Tensor | None, assembly: Assembly) -> None:
        parts = [self._stacked(values, name, self.layers) for name in self.step_columns]
        self._add_steps(parts, on, assembly)


class TimmAugMix(_Steps, _Mixing):
    """timm's AugMix; `from_timm` makes it."""

    translate_pct = 0.3
    names = _increasing(_AUGMIX)

    def __init__(
        self,
        config: str,
        *,
        width: int = 3,
        depth: int = -1,
        alpha: float = 1.0,
        magnitude: float = 3.0,
        mstd: float = _INF,
        fill: Fill = None,
        interpolation: str = "random",
    ) -> None:
        self.width = self._integer("config", width, 1, 8)
        self._set_depth("config", depth)
        self.alpha = self._number("config", alpha, 1e-6)
        self.magnitude, self.mstd = magnitude, mstd
        self._set_common(config, fill, interpolation)
        count = self.width * self.depth
        filters = (f"filter{k}" for k in range(1, count + 1))
        self.columns = (*self._mix_columns(), *filters)

    @property
    def needed_words(self) -> int:
        return self._weight_words + (_WORDS + 1) * self.width * self.depth

    def draw(self, u: Tensor, assembly: Assembly) -> Sequence[Tensor]:
        count = self.width * self.depth
        drawn = u[: (_WORDS + 1) * count].view(_WORDS + 1, count, -1)
        choice = _draws.integers(drawn[0], len(self.names)).long()
        weights, done = self._draw_weights(u[(_WORDS + 1) * count :])
        ops, *rest = self._draw_steps(choice, 1.0, self.magnitude, drawn[1:], assembly)
        return [*weights, *(ops * done.view(count, -1)), *rest[0], *rest[1]]

    def _add_chain(self, steps: list[Tensor], on: Tensor | None, assembly: Assembly) -> None:
        self._add_steps(steps, on, assembly, is_seen=False)


def _refuse(must: str, got: Any) -> NoReturn:
    refuse("from_timm", "config", must, repr(got), ValueError)


def _sections(config: str, kinds: dict[str, type]) -> dict[str, Any]:
    """What the parts after the first say, each a key and a number."""
    found: dict[str, Any] = {}
    for part in config.split("-")[1:]:
        match = re.fullmatch(r"([a-z]+)(inf|\d+(?:\.\d*)?)", part)
        if part.startswith("t") and "t" in kinds:
            found["t"] = part[1:]
        elif match is None or match[1] not in kinds:
            _refuse(f"made of {', '.join(kinds)} after its first part", config)
        else:
            try:
                found[match[1]] = kinds[match[1]](match[2])
            except ValueError:
                _refuse(f"such that {match[1]} is a whole number", config)
    return found


def from_timm(
    config: str,
    *,
    fill: float | Sequence[float] | None = (124.0, 116.0, 104.0),
    interpolation: str = "random",
) -> Transform:
    """The transform that timm's `auto_augment` string stands for.

    - "rand-m9-mstd0.5-inc1": RandAugment with magnitude `m` (10 where it is not given) of 10, `n`
      operations (2), each done with probability `p` (0.5); the magnitude's deviation `mstd` (0; inf
      and above 100: uniform from 0 to `m`), its most `mmax` (10), `inc1` for the operations that
      grow with it, `tweights`, `t3a` or `t3aw` for other sets, the weighted ones without
      replacement.
    - "augmix-m5-w4-d2": AugMix with severity `m` (3), `w` chains (3) of `d` operations (-1: one to
      three), `a` for alpha (1), `mstd` (inf).
    - "original", "originalr", "v0", "v0r", "3a": AutoAugment's policies, with `mstd`.

    Posterize keeps a bit at least, where timm at times asks for 0, which Pillow refuses. A blur is
    of Gaussian weights, where Pillow's is of boxes. Otherwise operations are those of the other
    policies here, as torchvision has them.

    Args:
        config: the string.
        fill: what is seen outside of the image, of bytes, whatever the images are: timm has the
            mean colour of its data set.
        interpolation: "random" draws bilinear or bicubic for each operation.

    Raises:
        ValueError: the string is none of these.

    Columns: op1, ..., strength1, ... as of `RandAugment`, and filter1, ..., 2 for bilinear and 3
    for bicubic; of AugMix the weights as of `AugMix` before them.
    """
    if not isinstance(config, str):
        refuse("from_timm", "config", "a string", type(config).__name__, TypeError)
    name = config.split("-")[0]
    common: dict[str, Any] = {"fill": fill, "interpolation": interpolation}
    if name == "rand":
        return _rand(config, common)
    if name == "augmix":
        kinds = {"m": int, "w": int, "d": int, "a": float, "b": int, "mstd": float}
        got = _sections(config, kinds)
        _check_level(config, got.get("m", 3), 10)
        return TimmAugMix(
            config,
            width=got.get("w", 3),
            depth=got.get("d", -1),
            alpha=got.get("a", 1.0),
            magnitude=got.get("m", 3),
            mstd=got.get("mstd", _INF),
            **common,
        )
    if name not in _PAIRS:
        known = ("rand", "augmix", *_PAIRS)
        _refuse(f"one that begins with {', '.join(known)}", config)
    mstd = _sections(config, {"mstd": float}).get("mstd", 0.0)
    pairs, renamed = _PAIRS[name]
    pairs = [[(renamed.get(op, op), p, m) for op, p, m in pair] for pair in pairs]
    names = sorted({op for pair in pairs for op, _, _ in pair})
    return TimmAugment(config, names, len(pairs[0]), pairs=pairs, mstd=mstd, **common)


def _rand(config: str, common: dict[str, Any]) -> Transform:
    kinds = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int, "t": str}
    got = _sections(config, kinds)
    names = _increasing(_RAND) if got.get("inc") else _RAND
    weights = None
    if (choice := got.get("t")) in _WEIGHTS:
        names, weights = tuple(_WEIGHTS[choice]), list(_WEIGHTS[choice].values())
    elif choice == "3a":
        names = _3A
    elif choice is not None:
        _refuse(f"of one of the sets {', '.join(('3a', *_WEIGHTS))}", config)
    layers, p, most = got.get("n", 2), got.get("p", 0.5), got.get("mmax", 10)
    if not 1 <= layers <= (len(names) if weights else 64):
        _refuse(f"of n from 1 to {len(names) if weights else 64}", config)
    if not 0 <= p <= 1:
        _refuse("of p in [0, 1]", config)
    _check_level(config, got.get("m", 10), most)
    mstd = got.get("mstd", 0.0)
    return TimmAugment(
        config,
        names,
        layers,
        p=p,
        magnitude=got.get("m", 10),
        weights=weights,
        mstd=_INF if mstd > 100 else mstd,
        most=most,
        **common,
    )


def _check_level(config: str, level: float, most: float) -> None:
    if not 0 <= level <= most:
        _refuse(f"of m from 0 to {most}", config)
