"""Folders of image files as data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reg_kernels.cli import main
from reg_kernels.cli._data import load_images
from reg_kernels.cli._errors import UsageError

Save = Callable[..., None]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(name: str, pixels: np.ndarray) -> None:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    return save


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_classes_files_and_pixels(tmp_path: Path, save: Save) -> None:
    exact = noise(6, 6, 3)
    save("dog/1.png", exact)
    save("dog/more/2.PNG", noise(9, 30, 3))
    save("cat/a.jpg", noise(20, 7, 3))
    save(".hidden/1.png", exact)
    (tmp_path / "photos" / "dog" / "notes.txt").write_text("no image")
    images = load_images(str(tmp_path / "photos"), 6)
    assert images.names == ("cat", "dog")
    assert images.y.tolist() == [0, 1, 1]
    assert images.x.shape == (3, 3, 6, 6)
    assert (images.x[1] == exact.transpose(2, 0, 1).astype(np.float32) / np.float32(255)).all()


def test_gray_images_have_one_channel(tmp_path: Path, save: Save) -> None:
    save("a/1.png", noise(4, 4))
    save("b/1.png", noise(4, 4))
    assert load_images(str(tmp_path / "photos"), 4).x.shape == (2, 1, 4, 4)


def test_workers_decode_many_in_their_order(tmp_path: Path, save: Save) -> None:
    for number in range(130):
        save(f"{'ab'[number // 100]}/{number:03}.png", np.full((2, 2), number, np.uint8))
    images = load_images(str(tmp_path / "photos"), 2)
    assert np.rint(images.x[:, 0, 0, 0] * 255).tolist() == list(range(130))
    assert images.y.tolist() == [0] * 100 + [1] * 30


def test_a_folder_trains(tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        save(f"{'ab'[number % 2]}/{number}.png", noise(5 + number, 8, 3) // (1 + number % 2))
    words = ["--data", str(tmp_path / "photos"), "--image-size", "8", "--out", str(tmp_path / "o")]
    words += ["--train-size", "6", "--epochs", "1", "--time-epochs", "0", "--augment"]
    assert main(["train", *words]) == 0
    assert "6 images to train on, 6 to test on, 2 classes" in capsys.readouterr().out


def test_what_cannot_be_trained_on(tmp_path: Path, save: Save) -> None:
    root = tmp_path / "photos"

    def refusal() -> str:
        with pytest.raises(UsageError) as caught:
            load_images(str(root), 4)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"--data {root}: ")

    root.mkdir()
    assert refusal() == "must have a folder for each of at least 2 classes, got none"
    save("cat/1.png", noise(4, 4))
    assert refusal() == "must have a folder for each of at least 2 classes, got 1 (cat)"
    (root / "dog").mkdir()
    assert refusal().startswith("must have an image in each class, got none in dog; images end in ")
    (root / "dog\ngie").mkdir()
    save("dog/1.png", noise(4, 4))
    assert refusal().startswith("must have an image in each class, got none in 'dog\\ngie'; ")
    (root / "dog\ngie").rmdir()
    (root / "dog" / "1.png").rename(broken := root / "dog" / "1\n.png")
    broken.write_bytes(b"text")
    assert refusal().startswith(f"must hold whole images, got {str(broken)!r}: no whole image")
    broken.unlink()
    whole = (root / "cat" / "1.png").read_bytes()
    (root / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    message = refusal()
    assert message.startswith(f"must hold whole images, got {root / 'dog' / '1.png'}: no whole")
    (root / "dog" / "2.jpg").write_bytes(b"text")
    assert refusal().endswith(" and 1 more")
