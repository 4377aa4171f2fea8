"""A `Recipe` from the command line: an option for each of its fields, over those of a file."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from ..training import METHODS, MODELS, Recipe
from ..training.recipe import unknown
from ._errors import UsageError

# Of a recipe's file; one has less than two thousand. The time to read what somebody made to take
# long grows as its square: five seconds of 60 kB.
MOST_BYTES = 2**14
RECIPE = "recipe.toml"  # as results have it beside them

_HELP = {
    "model": "two convolutions and a wide head, residual blocks, two hidden layers, or small MLPs "
    "that mix patches (default: the first that goes with the methods asked for)",
    "epochs": "epochs of each net",
    "batch_size": "images of a step",
    "learning_rate": "AdamW's, at the start",
    "temperature": "of the teacher's loss",
}


def add_recipe_arguments(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """An option for each field of a `Recipe` but those named, and `--recipe`."""
    group = parser.add_argument_group("recipe", "what is trained with; 0 leaves a method out")
    group.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help=f"a recipe as TOML, as results have it beside them in {RECIPE}; the options here go "
        "before what it says",
    )
    for field in dataclasses.fields(Recipe):
        name, default = field.name, field.default
        if name in without:
            continue
        option = _option(name)
        if name == "model":
            group.add_argument(option, choices=MODELS, help=_HELP[name])
        elif isinstance(default, bool):
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, help=METHODS[name].summary
            )
        else:
            text = METHODS[name].summary if name in METHODS else _HELP[name]
            kind = type(default)
            letter = "N" if kind is int else "X"
            group.add_argument(option, type=kind, metavar=letter, help=text)


def recipe_from(args: argparse.Namespace, base: Recipe) -> Recipe:
    """The recipe of `--recipe`, by default `base`, with what the options say.

    A model is taken that goes with the methods where none was named. Raises UsageError, one line
    that names the option.
    """
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Recipe)
        if getattr(args, field.name, None) is not None
    }
    if args.recipe is None and "model" not in given:
        asked = {name for name, value in given.items() if value}
        asked.update(_named(getattr(args, "methods", None) or ""))
        of_each = [METHODS[name].models for name in METHODS if name in asked]
        fitting = [m for m in MODELS if all(m in models for models in of_each)]
        given |= {"model": fitting[0]} if fitting else {}
    try:
        recipe = base if args.recipe is None else Recipe.from_toml(_read(args.recipe))
    except ValueError as error:
        raise UsageError(f"--recipe {args.recipe}: {_said(error)}") from None
    try:
        return dataclasses.replace(recipe, **given)
    except ValueError as error:
        said = _said(error)
        name, _, rest = said.partition(" ")
        at_fault = (
            f"{_option(name)}: {rest}" if name in given else f"--recipe {args.recipe}: {said}"
        )
        raise UsageError(at_fault) from None


def _said(error: ValueError) -> str:
    return str(error).removeprefix("Recipe: ")


def options_of(recipe: Recipe, base: Recipe) -> list[str]:
    """The options that make `recipe` of `base`."""
    words = []
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if value == getattr(base, field.name):
            continue
        option = _option(field.name)
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, str(value)]
    return words


def methods_from(names: str | None, model: str, default: Iterable[str]) -> tuple[str, ...]:
    """The methods of `--methods`, else those of the default that go with the model, in the order
    that all have. Raises UsageError, one line."""
    if names is None:
        return tuple(name for name in METHODS if name in default and model in METHODS[name].models)
    asked = _named(names)
    if not asked:
        raise UsageError("--methods: must name at least one method, got none")
    for name in asked:
        if name not in METHODS:
            raise UsageError(f"--methods: {unknown('method', name, METHODS)}")
        if model not in (models := METHODS[name].models):
            raise UsageError(
                f"--methods: {name} goes with --model {', '.join(models)}, got {model}"
            )
    return tuple(name for name in METHODS if name in asked)


def _named(names: str) -> list[str]:
    return [name.strip().replace("-", "_") for name in names.split(",") if name.strip()]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(path: Path) -> str:
    where = f"--recipe {path}"
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{where}: must be a file, got a device, a pipe or a socket")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror or error}") from None
    if len(content) > MOST_BYTES:
        raise UsageError(f"{where}: must have at most {MOST_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{where}: must be text, got other bytes") from None
