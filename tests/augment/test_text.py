"""Pipelines from a line of text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reg_kernels import augment


def test_a_line_is_what_one_would_have_written() -> None:
    text = (
        "RandomResizedCrop(8, scale=(0.5, 1.0)), RandomHorizontalFlip, rand-m9-mstd0.5-inc1,"
        "Normalize([0.5, 0.4, 0.3], (0.2, 0.2, 0.2)), RandomErasing(value=0.5),"
    )
    written = augment.Pipeline(
        augment.RandomResizedCrop(8, scale=(0.5, 1.0)),
        augment.RandomHorizontalFlip(),
        augment.from_timm("rand-m9-mstd0.5-inc1"),
        augment.Normalize([0.5, 0.4, 0.3], (0.2, 0.2, 0.2)),
        augment.RandomErasing(value=0.5),
        seed=3,
        backend="reference",
    )
    read = augment.from_text(text, seed=3, backend="reference")
    assert repr(read) == repr(written)
    images = torch.randint(256, (2, 3, 12, 10), dtype=torch.uint8)
    assert torch.equal(read(images), written(images))


def test_a_class_is_no_string_of_timms() -> None:
    (mixing,) = augment.from_text("AugMix").transforms
    (of_timm,) = augment.from_text("augmix-m5").transforms
    assert type(mixing) is augment.AugMix
    assert repr(of_timm) == repr(augment.from_timm("augmix-m5"))


PLAIN = "from_text: text must be transforms with plain arguments, as "


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (3, TypeError, "from_text: text must be a string, got int"),
        ("", ValueError, PLAIN),
        ("RandomCrop(32", ValueError, PLAIN),
        ("RandomCrop(size)", ValueError, PLAIN),
        ("RandomCrop(**{'size': 3})", ValueError, PLAIN),
        ("augment.RandomCrop(3)", ValueError, PLAIN),
        ("RandomCrop(3),,RandomCrop(3)", ValueError, PLAIN),
        ("Pipeline()", ValueError, "from_text: text must be of transforms: AugMix, "),
        ("__import__('os')", ValueError, "from_text: text must be of transforms: AugMix, "),
        ("RandomCrop(3, paddng=1)", TypeError, "RandomCrop got an unexpected keyword"),
        ("RandomErasing(p=2)", ValueError, "RandomErasing: p must be in [0, 1], got 2"),
    ],
)
def test_what_is_no_pipeline_is_refused(text: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        augment.from_text(text)
    assert str(raised.value).startswith(message)
