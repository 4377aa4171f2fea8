"""The `augment` command: the grid that it draws, and what it says of files that are no images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from reg_kernels.cli import augment, main


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two images of different sizes, one of them gray."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "wide.png", tmp_path / "gray.png"]
    for path, shape in zip(paths, ((12, 20, 3), (16, 10)), strict=True):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The pictures, as matplotlib has them."""
    figures: list[Figure] = []
    draw = augment._draw

    def keep(*arguments: object) -> Figure:
        figures.append(draw(*arguments))  # type: ignore[arg-type]
        return figures[-1]

    monkeypatch.setattr(augment, "_draw", keep)
    return figures


def run(*words: object) -> int:
    return main(["augment", *map(str, words)])


def test_a_row_for_each_image_and_the_parameters_under_each(
    photos: list[Path], drawn: list[Figure], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "grid.png"
    text = "RandomResizedCrop(8), RandomHorizontalFlip(0.999), RandAugment, RandomErasing(1.0)"
    assert run(*photos, "--pipeline", text, "--samples", 2, "--out", out) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    axes = drawn[0].axes
    assert len(axes) == 2 * 3
    shapes = [each.images[0].get_array().shape for each in axes]
    assert shapes == [(12, 20, 3), (8, 8, 3), (8, 8, 3), (16, 10, 3), (8, 8, 3), (8, 8, 3)]
    words = [each.get_xlabel() for each in axes]
    assert (words[0], words[3]) == ("wide.png", "gray.png")
    for said in (words[1], words[2], words[4], words[5]):
        lines = said.split("\n")
        assert lines[0].startswith("RandomResizedCrop: top ")
        assert "Identity 0" not in said
        assert "RandomHorizontalFlip" in lines
        assert "RandAugment: 1. " in said and "RandomErasing: top " in said
    assert len(set(words)) == 6
    # The same seed draws the same, another one does not.
    for seed, same in ((0, True), (1, False)):
        run(*photos, "--pipeline", text, "--samples", 2, "--out", out, "--seed", seed)
        assert ([each.get_xlabel() for each in drawn[-1].axes] == words) is same


def test_normalised_images_are_shown_within_what_can_be_seen(
    photos: list[Path], drawn: list[Figure], tmp_path: Path
) -> None:
    text = "CenterCrop(8), Normalize((0.5, 0.5, 0.5), (0.1, 0.1, 0.1))"
    assert run(photos[0], "--pipeline", text, "--samples", 1, "--out", tmp_path / "x.png") == 0
    values = np.asarray(drawn[0].axes[1].images[0].get_array())
    assert values.min() == 0 and values.max() == 1


def test_images_of_16_bits_and_of_few_pixels(drawn: list[Figure], tmp_path: Path) -> None:
    deep, small = tmp_path / "deep.png", tmp_path / "small.png"
    Image.fromarray(np.array([[0, 300], [32896, 65535]], np.uint16)).save(deep)
    Image.fromarray(np.full((1, 1, 3), 9, np.uint8)).save(small)
    text = "Resize((2, 2), interpolation='nearest')"
    assert run(deep, small, "--pipeline", text, "--samples", 1, "--out", tmp_path / "x.png") == 0
    shown = [np.asarray(each.images[0].get_array()) for each in drawn[0].axes]
    assert shown[0][..., 0].tolist() == [[0, 1], [128, 255]]
    assert np.array_equal(shown[1], shown[0] / 255) and shown[3].shape == (2, 2, 3)


def test_broken_files_are_named_and_the_rest_goes_on(
    photos: list[Path], drawn: list[Figure], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole)
    cut, text, absent = (tmp_path / name for name in ("cut.jpg", "text.png", "absent.png"))
    cut.write_bytes(whole.read_bytes()[:-200])
    text.write_text("no image")
    out = tmp_path / "grid.png"
    files = [cut, photos[0], text, absent, tmp_path, whole]
    assert run(*files, "--pipeline", "Resize((8, 8))", "--samples", 1, "--out", out) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    for line, path in zip(said, (cut, text, absent, tmp_path), strict=True):
        assert line.startswith(f"reg-kernels augment: {path}: ")
    assert [each.get_xlabel() for each in drawn[0].axes][::2] == ["wide.png", "whole.jpg"]
    out.unlink()
    assert run(text, "--out", out) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipeline", "Foo"], "--pipeline: from_text: text must be of transforms: "),
        (["--pipeline", "CenterCrop(8), Mixup(0.2)"], "--pipeline: must mix no images with others"),
        (["--pipeline", "RandomCrop(99)"], "{photo}: RandomCrop: size must be "),
        (["--samples", 0], "--samples: must be at least 1, got 0"),
        (["--out", "grid.txt"], "--out: must end in one of .png, "),
        (["--out", "grid"], "--out: must end in one of .png, "),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    words: list[object],
    message: str,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(photos[0], *words) == 2
    error = capsys.readouterr().err
    expected = message.replace("{photo}", str(photos[0]))
    assert error.startswith(f"reg-kernels augment: {expected}") and error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("augmented")]
