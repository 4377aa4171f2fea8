"""A pipeline from a line of text, for command lines and configuration files."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from .._numbers import refuse
from ._transform import Transform
from .mixup import Mixup
from .pipeline import Pipeline
from .timm import from_timm

_OF_TIMM = re.compile(r"(rand|augmix|originalr?|v0r?|3a)(-[a-z0-9.]+)*")


def from_text(text: str, **options: Any) -> Pipeline:
    """The pipeline that a line of text describes.

    Args:
        text: transforms as one writes them in Python, with a comma between them, whose arguments
            are numbers, words in quotes, tuples, lists, True, False and None:
            "RandomResizedCrop(224), RandomHorizontalFlip(), RandAugment(2, 9)". One without
            arguments needs no parentheses. Among them may be strings of timm's, as `from_timm`
            takes them: "RandomResizedCrop(224), rand-m9-mstd0.5-inc1". Nothing in it is run.
        options: `Pipeline`'s own keyword arguments.

    Raises:
        ValueError: the text is no list of transforms, or names one that there is not.
        TypeError, ValueError: what a transform says of its arguments.

    Example::

        pipeline = augment.from_text("RandomCrop(32, padding=4), RandomHorizontalFlip", seed=0)
    """
    if not isinstance(text, str):
        refuse("from_text", "text", "a string", type(text).__name__, TypeError)
    return Pipeline(*(_transform(part) for part in _parts(text)), **options)


def _parts(text: str) -> Iterator[str]:
    """What lies between the commas that stand outside of parentheses."""
    depth, begin = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            yield text[begin:place].strip()
            begin = place + 1
    # A comma may come last.
    if (last := text[begin:].strip()) or begin == 0:
        yield last


def _transform(part: str) -> Transform | Mixup:
    if _OF_TIMM.fullmatch(part):
        return from_timm(part)
    try:
        node: Any = ast.parse(part, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # signs in thousands
        _refuse_part(part)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or any(word.arg is None for word in call.keywords):
        _refuse_part(part)
    kinds = _kinds()
    if (kind := kinds.get(call.func.id)) is None:
        refuse("from_text", "text", f"of transforms: {', '.join(sorted(kinds))}", part, ValueError)
    try:
        arguments = [ast.literal_eval(value) for value in call.args]
        named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (ValueError, TypeError, RecursionError):
        _refuse_part(part)
    try:
        made: Transform | Mixup = kind(*arguments, **named)
    except TypeError as error:  # Python's own names the method
        raise TypeError(str(error).replace(f"{kind.__name__}.__init__()", kind.__name__)) from None
    return made


def _kinds() -> dict[str, type[Transform | Mixup]]:
    """The transforms that `augment` has, by their names. It is looked up, not imported, since it
    imports this module."""
    package = sys.modules[str(__package__)]
    found = {name: getattr(package, name) for name in package.__all__}
    kinds = Transform | Mixup
    return {k: v for k, v in found.items() if isinstance(v, type) and issubclass(v, kinds)}


def _refuse_part(part: str) -> NoReturn:
    must = 'transforms with plain arguments, as "RandomCrop(32, padding=4), RandomHorizontalFlip"'
    refuse("from_text", "text", must, repr(part), ValueError)
