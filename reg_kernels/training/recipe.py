"""What a net is trained with: which methods of regularisation, and how strongly."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import reprlib
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# The models that a recipe can have.
MODELS = ("conv", "resnet", "mlp", "mixer")


@dataclass(frozen=True)
class Method:
    """One method of regularisation, as a field of a `Recipe` has it.

    Args:
        on: the strength that it is switched on with where none is given.
        search: (least, most), the strengths that are tried in tuning; by default from practice.
        log: whether they are tried evenly in the logarithm.
        limits: (least, most), the strengths that there are.
        open: whether the greatest of them is none.
        summary: what it does, in a few words.
        page: where the documentation speaks of it.
        models: the models that it goes with.
    """

    on: float | bool
    search: tuple[float, float]
    summary: str
    page: str
    log: bool = False
    limits: tuple[float, float] = (0.0, math.inf)
    open: bool = True
    models: tuple[str, ...] = MODELS

    @property
    def off(self) -> float | bool:
        """The strength at which it is not there."""
        return type(self.on)(0)

    @property
    def kind(self) -> type:
        """bool of what is there or not, int of what is counted, else float."""
        return type(self.on)


_UNIT: Mapping[str, Any] = {"limits": (0.0, 1.0), "open": False}

# What each method is, by its name, which is a field of a `Recipe`.
METHODS: dict[str, Method]

# Dropout's strengths: N. Srivastava et al., JMLR 15 (2014), section A.4; label smoothing's: C.
# Szegedy et al., CVPR 2016, R. Müller et al., NeurIPS 2019; mixup's: H. Zhang et al., ICLR 2018.
METHODS = {
    "dropout": Method(
        *(0.5, (0.2, 0.6), "units dropped before and in the head", "layers.md"), limits=(0.0, 1.0)
    ),
    "input_dropout": Method(
        *(0.1, (0.1, 0.2), "pixels dropped of the images", "layers.md"), limits=(0.0, 1.0)
    ),
    "weight_decay": Method(
        *(2.0, (1e-2, 10.0), "decoupled decay of the weights", "optimizers.md"), log=True
    ),
    "l1": Method(
        *(1e-2, (1e-5, 1e-1), "decoupled L1 of the weights, to exact zeros", "optimizers.md"),
        log=True,
    ),
    "l2": Method(
        *(1e-3, (1e-5, 1e-2), "the weights' squares in the loss", "optimizers.md"), log=True
    ),
    "batch_norm": Method(
        *(True, (0, 1), "BatchNorm in the hidden layers", "layers.md"),
        models=("conv", "resnet", "mlp"),
    ),
    "mixup": Method(0.2, (0.1, 0.4), "blended images, alpha", "mixing_and_losses.md"),
    "cutmix": Method(1.0, (0.2, 1.0), "pasted boxes, alpha", "mixing_and_losses.md"),
    "label_smoothing": Method(0.1, (0.05, 0.1), "softer labels", "mixing_and_losses.md", **_UNIT),
    "drop_path": Method(
        *(0.1, (0.05, 0.3), "stochastic depth, the last block's", "layers.md"),
        models=("resnet", "mixer"),
        **_UNIT,
    ),
    "noise": Method(0.2, (0.05, 0.5), "the deviation of noise on the images", "layers.md"),
    "augment": Method(
        *(1.0, (0.25, 2.0), "images turned, shifted, scaled, erased", "augmentation.md"),
        limits=(0.0, 4.0),
        open=False,
    ),
    "adversarial": Method(
        *(0.05, (0.01, 0.2), "how far an attack moves a pixel", "adversarial.md"), log=True
    ),
    "early_stopping": Method(
        10, (5, 20), "epochs without a better validation loss", "early_stopping.md"
    ),
    "distillation": Method(
        *(0.5, (0.2, 0.8), "the share of a teacher's loss", "mixing_and_losses.md"), **_UNIT
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What a net is trained with. Each method is a number, its strength, and 0 leaves it out.

    Args:
        model: "conv", two convolutions and a wide head; "resnet", residual blocks; "mlp", two
            hidden layers; "mixer", patches mixed by small MLPs.
        epochs: how often each image is seen, at least 1.
        batch_size: images of a step, at least 1.
        learning_rate: AdamW's at the start; it falls to 0 as a cosine.
        batch_norm: False leaves BatchNorm out of "conv", "resnet" and "mlp".
        dropout: the probability that a unit before and in the head is dropped, in [0, 1).
        input_dropout: the probability that a pixel is dropped, in [0, 1).
        weight_decay: AdamW's decoupled decay of the weights; biases and norms have none.
        l1: the decoupled L1 of the same weights, which makes exact zeros of small ones.
        l2: the factor of half the sum of their squares in the loss.
        mixup: Mixup's alpha.
        cutmix: CutMix's alpha; with `mixup` as well, each batch draws one of the two.
        label_smoothing: the labels' smoothing, in [0, 1].
        drop_path: the last block's probability to be dropped, in [0, 1], linear in depth; of
            "resnet" and "mixer".
        noise: the deviation of noise on the images, which have a deviation of 1.
        augment: the magnitude of shifts, turns, scales and erasing; 1 is up to a tenth of the
            sides, 10 degrees and a tenth, and a quarter of the images erased in part.
        adversarial: how far steps of an attack move a pixel, where pixels go from 0 to 1.
        early_stopping: the checks, one an epoch, without a better loss on the validation set after
            which training stops; the best weights are kept. 0 trains to the end.
        distillation: the share of a teacher's loss, in [0, 1]. The teacher is a net of the same
            recipe without distillation.
        temperature: the temperature of that loss, above 0.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of its range, or a method does not go with the model.

    `Recipe.from_toml` and `to_toml` read and write it as a file, a line for each field.
    """

    model: str = "conv"
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 4e-3
    batch_norm: bool = True
    dropout: float = 0.0
    input_dropout: float = 0.0
    weight_decay: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    noise: float = 0.0
    augment: float = 0.0
    adversarial: float = 0.0
    early_stopping: int = 0
    distillation: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, kind = field.name, type(field.default)
            value: Any = getattr(self, name)
            if kind is float and type(value) is int:
                # One beyond all floats is out of every range as well.
                value = float(value) if abs(value) < sys.float_info.max else math.inf
                object.__setattr__(self, name, value)
            if type(value) is not kind:
                # A file may have brackets within brackets, more than can be shown.
                got = f"{reprlib.repr(value)} of type {type(value).__name__}"
                raise TypeError(f"Recipe: {name} must be of type {kind.__name__}, got {got}")
            if name in METHODS:
                _check_strength(name, value)
        if self.model not in MODELS:
            raise ValueError(f"Recipe: model must be one of {_listed(MODELS)}, got {self.model!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recipe: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                got = f"{getattr(self, name):g}"
                raise ValueError(f"Recipe: {name} must be finite and above 0, got {got}")
        for name, method in METHODS.items():
            asked = getattr(self, name) and name != "batch_norm"  # it is on unless told otherwise
            if asked and self.model not in method.models:
                raise ValueError(
                    f"Recipe: {name} goes with the models {_listed(method.models)}, "
                    f"got {self.model}"
                )

    @classmethod
    def from_toml(cls, text: str, base: Recipe | None = None) -> Recipe:
        """Reads of `text` what `to_toml` writes; a field that is not there is `base`'s, by default
        its own default.

        Raises:
            ValueError: it is no TOML, it has a key that is no field, or a value cannot be.
        """
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # brackets in thousands, a number of as many
            said = str(error).split(";")[0]  # digits, and what is no TOML
            raise ValueError(f"Recipe: must be TOML: {said}") from None
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"Recipe: {unknown('key', name, known)}")
        try:
            return dataclasses.replace(base or cls(), **values)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def to_toml(self) -> str:
        """The recipe as TOML, a line for each field; what a method does stands beside it."""
        lines = []
        for name, value in dataclasses.asdict(self).items():
            comment = f"  # {METHODS[name].summary}" if name in METHODS else ""
            # A float, a whole number, a word and a truth value are written in TOML as in JSON.
            lines.append(f"{name} = {json.dumps(value)}{comment}")
        return "\n".join(lines) + "\n"

    def methods(self) -> dict[str, float | bool]:
        """The methods that are on, with their strengths."""
        strengths = {name: getattr(self, name) for name in METHODS}
        return {name: strength for name, strength in strengths.items() if strength}

    def with_methods(self, on: Iterable[str], of: Collection[str]) -> Recipe:
        """The recipe with the methods `on` and without the others of `of`. A method that the
        recipe has keeps its strength; another one takes the strength that `METHODS` has for it."""
        on = set(on)
        strengths: dict[str, Any] = {
            name: (getattr(self, name) or METHODS[name].on) if name in on else METHODS[name].off
            for name in of
        }
        return dataclasses.replace(self, **strengths)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not known: the one that was meant, or else all."""
    close = difflib.get_close_matches(name, known := list(known), n=1)
    remedy = f"did you mean {close[0]}?" if close else f"known are {_listed(known)}"
    return f"there is no {what} {name!r}: {remedy}"


def _check_strength(name: str, value: Any) -> None:
    method = METHODS[name]
    least, most = method.limits
    if least <= value < most or (value == most and not method.open):
        return
    end = ")" if method.open else "]"
    expected = f"in [{least:g}, {most:g}{end}" if math.isfinite(most) else "finite and at least 0"
    raise ValueError(f"Recipe: {name} must be {expected}, got {value:g}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
