"""A pipeline from a line of text, for command lines and configuration files."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from . import _timm
from .pipeline import Pipeline
from .transform import Transform


def from_text(text: str, **options: Any) -> Pipeline:
    """The pipeline that a line of text describes.

    Args:
        text: transforms as one writes them in Python, with numbers, words, tuples and None as
            arguments and a comma between them: "RandomResizedCrop(224), RandomHorizontalFlip(),
            RandAugment(2, 9)". Or a string of timm's, as `from_timm` takes it: "rand-m9-mstd0.5".
            Nothing in it is run.
        options: the pipeline's own keyword arguments.

    Raises:
        ValueError: the text is no list of transforms, or names one that there is none of; what a
            transform says of its arguments.
    """
