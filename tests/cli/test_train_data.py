"""What `train` reads: every image and label as meant, or one line that says what is wrong."""

from __future__ import annotations

import os
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from reg_kernels.cli import _data
from reg_kernels.cli._data import Images, Split, load_images, split
from reg_kernels.cli._errors import UsageError

RNG = np.random.default_rng(0)
Y = np.arange(24) % 3
X = RNG.random((24, 4, 5), dtype=np.float32)


def save(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)
    return str(path)


def refusal(source: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_images(str(source))
    message = str(caught.value)
    assert message.startswith(f"--data {source}: ")
    assert "\n" not in message
    return message.removeprefix(f"--data {source}: ")


def test_digits_are_the_1797_of_scikit_learn_scaled_to_one() -> None:
    images = load_images("digits")
    assert images.x.shape == (1797, 1, 8, 8)
    assert (images.x.min(), images.x.max()) == (0, 1)
    assert images.classes == 10
    assert np.bincount(images.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floating_point_pixels_are_taken_as_they_are(tmp_path: Path, dtype: object) -> None:
    x = (X * 300 - 7).astype(dtype)
    images = load_images(save(tmp_path / "a.npz", x=x, y=Y))
    assert images.x.dtype == np.float32
    assert np.array_equal(images.x[:, 0], x.astype(np.float32))


def test_uint8_pixels_are_divided_by_255(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (24, 2, 4, 5), dtype=np.uint8)
    images = load_images(save(tmp_path / "a.npz", x=x, y=Y.astype(np.uint8)))
    assert images.x.shape == x.shape
    np.testing.assert_allclose(images.x, x / 255, rtol=1e-7)
    assert images.y.dtype == np.int64
    assert np.array_equal(images.y, Y)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = load_images(save(tmp_path / "a.npz", x=X, y=Y)).sha256
    assert load_images(save(tmp_path / "b.npz", x=X, y=Y)).sha256 == first
    assert load_images(save(tmp_path / "c.npz", x=X, y=Y[::-1])).sha256 != first
    assert load_images(save(tmp_path / "d.npz", x=X.swapaxes(1, 2), y=Y)).sha256 != first


def with_value(value: float, dtype: object = np.float32) -> np.ndarray:
    x = X.astype(dtype)
    x[3, 2, 1] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": X, "y": Y}, "must hold arrays x and y, got a, y"),
        ({"x": X}, "must hold arrays x and y, got x"),
        ({}, "must hold arrays x and y, got none"),
        ({"x": X[:20], "y": Y}, "x and y must be of one length, got 20 images and 24 labels"),
        ({"x": X[0], "y": Y}, "x must be of shape [N, H, W] or [N, C, H, W], got [4, 5]"),
        (
            {"x": X[:, :, :0], "y": Y},
            "x must be of shape [N, H, W] or [N, C, H, W], got [24, 4, 0]",
        ),
        ({"x": X[:0], "y": Y[:0]}, "y must hold at least one label, got none"),
        ({"x": X > 0.5, "y": Y}, "x must be uint8 or floating point, got bool"),
        ({"x": X.astype(np.int64), "y": Y}, "x must be uint8 or floating point, got int64"),
        ({"x": X.astype(np.complex64), "y": Y}, "x must be uint8 or floating point, got complex64"),
        ({"x": X, "y": Y.astype(np.float32)}, "y must hold integers, got float32"),
        ({"x": X, "y": Y == 0}, "y must hold integers, got bool"),
        ({"x": X, "y": Y[:, None]}, "y must be of shape [N], got [24, 1]"),
        ({"x": X, "y": np.int64(1)}, "y must be of shape [N], got []"),
        ({"x": X, "y": Y - 1}, "y must hold labels 0..C-1, each at least once, got -1 among 3"),
        ({"x": X, "y": Y + 1}, "y must hold labels 0..C-1, each at least once, got 3 among 3"),
        ({"x": X, "y": Y * 2}, "y must hold labels 0..C-1, each at least once, got 4 among 3"),
        (
            {"x": X, "y": np.where(Y == 2, 2**64 - 1, Y).astype(np.uint64)},
            f"y must hold labels 0..C-1, each at least once, got {2**64 - 1} among 3",
        ),
        ({"x": X, "y": Y * 0}, "y must hold at least 2 classes, got 1"),
        (
            {"x": with_value(np.nan), "y": Y},
            "x must hold finite float32 pixels, got nan at [3, 2, 1]",
        ),
        (
            {"x": with_value(-np.inf), "y": Y},
            "x must hold finite float32 pixels, got -inf at [3, 2, 1]",
        ),
        (
            {"x": with_value(1e300, np.float64), "y": Y},
            "x must hold finite float32 pixels, got 1e+300 at [3, 2, 1]",
        ),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    assert refusal(save(tmp_path / "a.npz", **arrays)).startswith(message)


class Trap:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["x", "y"])
def test_pickled_objects_are_refused(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "sprung"
    arrays = {"x": X, "y": Y} | {name: np.array([Trap(trap)] * len(Y), dtype=object)}
    message = refusal(save(tmp_path / "a.npz", **arrays))
    assert message == f"{name} must be a plain array, got pickled objects, never loaded"
    assert not trap.exists()


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing.npz")
    np.save(tmp_path / "a.npy", X)
    assert "got a single array" in refusal(tmp_path / "a.npy")
    (tmp_path / "text.npz").write_text("not an archive")
    assert "must be an .npz file" in refusal(tmp_path / "text.npz")
    (tmp_path / "empty.npz").touch()
    assert "but the file cannot be read" in refusal(tmp_path / "empty.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    assert refusal(tmp_path / "pipe.npz") == "must be a file, got a device, a pipe or a socket"
    assert refusal("/dev/zero") == "must be a file, got a device, a pipe or a socket"


def npy_header(shape: object, dtype: str = "<f4", pad: int = 0, version: int = 1) -> bytes:
    """The beginning of an .npy file, `pad` blanks longer than it has to be."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}) + " " * pad + "\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode()


def save_raw(path: Path, x: bytes, y: np.ndarray = Y, compression: int = zipfile.ZIP_STORED) -> str:
    """An .npz file whose member x.npy has these bytes."""
    np.savez(path, y=y)
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("x.npy", x)
    return str(path)


RAW = X.tobytes()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (b"no array", "x must be an array as numpy.save writes it, got b'no array'"),
        (b"", "x must be an array as numpy.save writes it, got b''"),
        (b"\x80\x05N.", r"x must be an array as numpy.save writes it, got b'\x80\x05N.'"),
        (b"a\n" * 9999, r"x must be an array as numpy.save writes it, got b'a\na\na\n"),
        (b"\x93NUMPY", "x must be of version 1.0, 2.0 or 3.0 of its format, got ()"),
        (b"\x93NUMPY\x01\x00\x40\x00{'descr'", "must be a whole .npz file, but x cannot be read: "),
        (
            b"\x93NUMPY\x09\x00" + RAW,
            "x must be of version 1.0, 2.0 or 3.0 of its format, got (9, 0)",
        ),
        (
            npy_header((24, 4, 5), pad=20_000) + RAW,
            "x must have a header of at most 10000 bytes, got 20062",
        ),
        (
            npy_header((24, 4, 5), pad=2**20, version=2) + RAW,
            "x must have a header of at most 10000 bytes, got 1048638",
        ),
        (
            npy_header((24, 4, 5)) + RAW[:-1],
            "x must be a whole array, got 1919 bytes for [24, 4, 5] of float32",
        ),
        (
            npy_header((24, 4, 5)) + RAW + b"z",
            "x must be a whole array, got 1921 bytes for [24, 4, 5] of float32",
        ),
        (
            npy_header((-24, -4, 5)) + RAW,
            "x must be a whole array, got 1920 bytes for [-24, -4, 5] of float32",
        ),
        (
            npy_header((2**40, 2**40, 2**40)) + RAW,
            "x must be a whole array, got 1920 bytes for ",
        ),
        (npy_header((24, "4", 5)) + RAW, "must be a whole .npz file, but x cannot be read: shape"),
        (npy_header((24, 4, 5), "what") + RAW, "must be a whole .npz file, but x cannot be read: "),
        (
            npy_header((24, 4, 5), "|S4") + RAW,
            "x must be uint8 or floating point, got |S4",
        ),
        (
            npy_header((24, 4, 5), "<M8[s]") + RAW * 2,
            "x must be uint8 or floating point, got datetime64[s]",
        ),
        (
            npy_header((24, 4), [("many", "<f4", (5,))]) + RAW,
            "x must be of shape [N, H, W] or [N, C, H, W], got [24, 4]",
        ),
        (
            npy_header((24, 4, 1), [(f"field {i}", "<f4") for i in range(5)]) + RAW,
            "x must be uint8 or floating point, got [('field 0', '<f4'), ('field 1', '<f4')",
        ),
    ],
)
def test_a_member_that_is_no_array_is_told_for_what_it_is(
    tmp_path: Path, x: bytes, message: str
) -> None:
    said = refusal(save_raw(tmp_path / "a.npz", x))
    assert message in said
    assert len(said) < 250


def test_headers_of_every_version_are_read(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        x = npy_header((24, 4, 5), pad=200, version=version) + RAW
        assert np.array_equal(load_images(save_raw(tmp_path / "a.npz", x)).x[:, 0], X)


def test_nothing_of_a_large_array_is_read_before_its_header_is_found_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("values are read"))
    x = np.zeros((30, 4, 5), np.float32)
    assert "30 images and 24 labels" in refusal(save(tmp_path / "a.npz", x=x, y=Y))
    # A small file that unpacks to more than the machine has.
    path = save_raw(
        tmp_path / "b.npz",
        npy_header((24, 1000, 1000), "|u1") + bytes(24 * 10**6),
        compression=zipfile.ZIP_DEFLATED,
    )
    monkeypatch.setattr(_data, "_memory", lambda: 10**8)
    assert Path(path).stat().st_size < 10**5
    assert refusal(path) == (
        "x must fit into memory, got [24, 1000, 1000] of uint8, which takes 0.1 GiB of 0.1"
    )


def test_archives_that_cannot_be_unpacked_are_refused(tmp_path: Path) -> None:
    for code, reason in ((97, "compression method"), (None, "encrypted")):
        path = Path(save(tmp_path / "a.npz", x=X, y=Y))
        blob = bytearray(path.read_bytes())
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = blob.index(signature) + flags
            blob[at if code is None else at + 2] = 1 if code is None else code
        path.write_bytes(blob)
        said = refusal(path)
        assert said.startswith("must be a whole .npz file, but x cannot be read: ")
        assert reason in said
    np.savez(path, y=Y, **{"a\nb": X}, **{f"array {i}": Y for i in range(50)})
    assert len(refusal(path)) < 200


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, savez: object) -> None:
    savez(tmp_path / "whole.npz", x=X, y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(0, len(whole), 23):
        cut.write_bytes(whole[:length])
        refusal(cut)


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, savez: object) -> None:
    savez(tmp_path / "whole.npz", x=X, y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    sha256 = load_images(str(tmp_path / "whole.npz")).sha256
    flips = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[flips.randrange(len(damaged))] ^= 1 << flips.randrange(8)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            # Dates and flags in the archive's directory are of no matter; pixels are.
            assert load_images(str(tmp_path / "damaged.npz")).sha256 == sha256
        except UsageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def of(x: np.ndarray, y: np.ndarray) -> Images:
    return Images("made", x, y, int(y.max()) + 1, "")


def test_the_split_is_disjoint_stratified_and_standardised_by_the_training_set() -> None:
    total = 120
    # Each image is told apart by its first pixel; channel 1 is far away from channel 0, channel 2
    # is constant.
    x = RNG.normal(size=(total, 3, 4, 4)).astype(np.float32)
    x[:, 1] = 1000 + 50 * x[:, 1]
    x[:, 2] = 7
    y = np.arange(total) % 3
    data = split(of(x, y), train_size=60, seed=1)
    assert np.bincount(data.train_y).tolist() == [20, 20, 20]
    assert np.bincount(data.test_y).tolist() == [20, 20, 20]
    firsts = np.concatenate([data.train_x[:, 0, 0, 0], data.test_x[:, 0, 0, 0]])
    assert len(np.unique(firsts)) == total
    for channel, spread in ((0, 1), (1, 1), (2, 0)):
        assert data.train_x[:, channel].mean().item() == pytest.approx(0, abs=1e-5)
        assert data.train_x[:, channel].std(correction=0).item() == pytest.approx(spread, abs=1e-5)
    # The test set's own statistics must play no part.
    assert abs(data.test_x[:, 0].mean().item()) > 1e-5


def test_folds_validate_on_what_they_do_not_train_on() -> None:
    x = RNG.normal(size=(120, 1, 2, 2)).astype(np.float32)
    images = of(x, np.arange(120) % 3)

    def found(data: Split) -> list[set[float]]:
        """By part, the images, told apart by their first pixel."""
        parts = (data.train_x, data.validation_x, data.test_x)
        firsts = [part[:, 0, 0, 0] * data.std + data.mean for part in parts]
        return [{round(pixel, 4) for pixel in part.tolist()} for part in firsts]

    train, none, test = found(split(images, 60, seed=1))
    assert (len(train), len(none), len(test)) == (60, 0, 60)
    parts = [found(split(images, 60, 1, fold=(k, 4))) for k in range(4)]
    assert set.union(*(validated for _, validated, _ in parts)) == train
    assert parts == [found(split(images, 60, 1, fold=(k, 4))) for k in range(4)]  # for each net
    for trained, validated, tested in parts:
        assert (len(trained), len(validated)) == (45, 15)
        assert trained | validated == train
        assert tested == test
    trained, validated, tested = found(split(images, 60, seed=1, validation_size=20))
    assert (len(trained), len(validated), len(tested)) == (60, 20, 40)
    assert len(trained | validated | tested) == 120


def test_labels_stay_with_their_images() -> None:
    y = np.arange(90) % 5
    x = np.repeat(y, 4).reshape(90, 1, 2, 2).astype(np.float32)
    data = split(of(x, y), train_size=40, seed=0)
    for images, labels in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        order = images[:, 0, 0, 0].argsort()
        assert (labels[order].diff() >= 0).all()


def test_the_seed_draws_the_split() -> None:
    images = of(X[:, None], Y)
    first, again, other = (split(images, 12, seed).train_x for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("size", [2, 22, 24, 1000])
def test_a_training_set_that_cannot_be_drawn_is_refused(size: int) -> None:
    expected = rf"^--train-size: must be in 3..21 for 24 images of 3 classes, got {size}$"
    with pytest.raises(UsageError, match=expected):
        split(of(X[:, None], Y), size, 0)


@pytest.mark.parametrize("size", [3, 21])
def test_the_smallest_and_largest_training_sets_are_drawn(size: int) -> None:
    data = split(of(X[:, None], Y), size, 0)
    assert (len(data.train_y), len(data.test_y)) == (size, 24 - size)


def test_a_class_of_one_image_is_refused() -> None:
    y = np.array([0, 1] * 11 + [2, 0])
    with pytest.raises(UsageError, match=r"^--data made: each class needs .* class 2 has 1$"):
        split(of(X[:, None], y), 12, 0)
