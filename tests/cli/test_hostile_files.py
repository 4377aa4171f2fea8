"""Files that somebody made to do harm: each is refused in one line, and nothing else happens."""

from __future__ import annotations

import io
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reg_kernels.cli import _data, main
from reg_kernels.cli._data import load_images
from reg_kernels.cli._errors import UsageError, printable, said
from reg_kernels.cli._study import Study
from reg_kernels.cli._trainer import checkpoint as checkpoints

TESTS = Path(__file__).parents[1]


def hostile_files(*options: object) -> tuple[int, str]:
    command = [sys.executable, "-W", "ignore", TESTS / "hostile_files.py", *options]
    done = subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def test_damaged_files_are_taken_or_refused() -> None:
    code, told = hostile_files("--files", 40)
    assert code == 0, told
    assert told.count(" 40 files, ") == 10, told


# A kind of file that does what none may do, and one that is refused in words that are none.
PLANTED = """
import os, pickle, subprocess, sys, tempfile
from pathlib import Path
import hostile_files
from hostile_contents import Kind
from reg_kernels.cli._errors import UsageError

hostile_files.SECONDS = 3
elsewhere = tempfile.mkdtemp() + "/x"

def refuse():
    raise UsageError("a" * 3000)

def spin():
    while True:
        pass

harms = {
    "calls": lambda: subprocess.run(["true"]),
    "shell": lambda: os.system("true"),
    "class": lambda: pickle.loads(pickle.dumps(Path("."))),
    "file": lambda: Path(elsewhere).write_text(""),
    "error": lambda: {}["absent"],
    "spins": spin,
    "dies": lambda: os.abort(),
    "refuses": refuse,
    "nothing": lambda: None,
}
for name, harm in harms.items():
    kind = Kind("f", [b"0123456789"], lambda path: harm(), lambda r, path: "")
    with tempfile.TemporaryDirectory() as folder:
        count = hostile_files.survive(name, kind, 0, range(1), Path(folder))
    print(f"{name}: {count['wrong']} wrong")
assert not Path(elsewhere).exists()
"""


def test_what_a_file_must_not_bring_about_is_seen() -> None:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PLANTED]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--kind 'error' --seed 0 --only 0 raises KeyError: 'absent'" in done.stdout
    assert "--only 0 dies: SIGABRT" in done.stdout and "--only 0 dies: SIGXCPU" in done.stdout
    counts = dict(line.split(": ") for line in done.stdout.splitlines() if line.endswith(" wrong"))
    harmless = ("refuses", "nothing")
    assert counts == {name: f"{0 if name in harmless else 1} wrong" for name in counts}
    assert len(counts) == 9


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) != 0
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


# Images


def png(width: int, height: int) -> bytes:
    """A gray image of zeros, which is small however large its sides are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def picture(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, "PNG")
    return path


def test_no_interpreter_is_started_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An EPS file, which Pillow hands to Ghostscript, whatever its name ends in."""
    (path := tmp_path / "e.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = refusal(capsys, "augment", path, "--out", tmp_path / "o.png")
    assert f"{path}: no whole image: cannot identify" in told
    assert not started.exists()


def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.png")
    told = refusal(capsys, "augment", pipe, "/dev/zero", "--out", tmp_path / "o.png")
    for path in (pipe, "/dev/zero"):
        assert f"{path}: must be a file, got a device, a pipe or a socket\n" in told


NAMES = ("$x^{$.png", "$\\undefined$.png", "[bold]a[].png", "a\nb\x1b[2J.png", "\udcff\udcfe.png")


def test_images_of_any_name_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [picture(tmp_path / name) for name in NAMES]
    words = ["--samples", "1", "--pipeline", "CenterCrop(4)", "--out"]
    assert main(["augment", *map(str, files), *words, str(tmp_path / "o.png")]) == 0
    (tmp_path / NAMES[3]).write_text("none any more")
    told = refusal(capsys, "augment", tmp_path / NAMES[3], "--out", tmp_path / "o.png")
    assert told.replace("\n", "").isprintable()
    assert main(["augment", str(files[0]), *words, str(tmp_path / "\udcff.png")]) == 0


def test_folders_with_odd_names_and_loops(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        picture(root / f"{number} {name}" / name)
    (root / "0 $x^{$.png" / "loop").symlink_to(root)
    os.mkfifo(root / "0 $x^{$.png" / "pipe.png")
    (root / "0 $x^{$.png" / "zero.png").symlink_to("/dev/zero")
    (root / "all").symlink_to(root)
    images = load_images(str(root), 4)
    assert len(images.names) == 6
    assert len(images.y) == 10  # each in its class, and in the one that is a link to all


def test_images_that_unpack_to_more_than_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    for name in ("a", "b"):
        picture(root / name / "1.png")
    # 200 million pixels, of 200 kB; a side that no kernel takes.
    for data, words in (
        (png(20_000, 10_000), "could be decompression bomb"),
        (png(1, 70_000), "65535"),
    ):
        (root / "b" / "2.png").write_bytes(data)
        assert len(data) < 300_000
        with pytest.raises(UsageError, match=r"must hold whole images, got .*2\.png: ") as error:
            load_images(str(root), 4)
        told = refusal(capsys, "augment", root / "b" / "2.png", "--out", tmp_path / "o.png")
        assert words in str(error.value)
        assert words in told


def test_a_large_image_is_drawn_without_most_of_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reg_kernels.cli import augment

    monkeypatch.setattr(augment, "_MOST_PIXELS", 10)
    image = torch.zeros(25, 40, 3)
    figure = augment._draw([("name", image, image[None], ["words"])], 1)
    assert [each.images[0].get_array().shape for each in figure.axes] == [(7, 10, 3)] * 2


# Arrays


def test_labels_that_unpack_to_more_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than of pixels: eight bytes for each image of one."""
    count = 10**6
    x, y = np.zeros((count, 1, 1), "u1"), np.zeros(count, int)
    np.savez_compressed(path := tmp_path / "a.npz", x=x, y=y)
    monkeypatch.setattr(_data, "_memory", lambda: 6 * count)
    assert path.stat().st_size < 20_000
    with pytest.raises(UsageError, match=r"y must fit into memory, got \[1000000\] of int64, "):
        load_images(str(path))


# Checkpoints


def test_checkpoints_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    # Lists that have a list twice, 60 deep.
    value: Any = [0]
    for _ in range(60):
        value = [value, value]
    made = {"format": checkpoints.FORMAT, "sha256": "", "content": {"state": value, "options": {}}}
    torch.save(made, path)
    with pytest.raises(ValueError, match="more values than its file can hold"):
        checkpoints.load_checkpoint(path)
    # The same tensor again and again.
    made["content"]["state"] = [torch.zeros(10**6)] * 100
    torch.save(made, path)
    with pytest.raises(ValueError, match="more values than its file can hold"):
        checkpoints.load_checkpoint(path)
    # Zeros, packed as torch.save does not.
    checkpoints.save_checkpoint(path, {}, {"x": torch.zeros(10**6)})
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(path) as whole,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for member in whole.infolist():
            other.writestr(member.filename, whole.read(member))
    assert len(packed.getvalue()) < 20_000
    path.write_bytes(packed.getvalue())
    with pytest.raises(ValueError, match="compressed"):
        checkpoints.load_checkpoint(path)


# Recipes and pipelines


@pytest.mark.parametrize(
    "text",
    ["model" + ".a" * 8_000 + " = 1", "model = '" + "\\u001b[2J" * 1500 + "'", "x" * 16_000],
)
def test_a_recipe_is_refused_in_one_short_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (path := tmp_path / "r.toml").write_text(text)
    told = refusal(capsys, "train", "--recipe", path)
    assert told.startswith(f"reg-kernels train: --recipe {path}: ")
    assert told.count("\n") == 1 and told[:-1].isprintable() and len(told) < 1100


@pytest.mark.parametrize("sign", ["-", "1+", "(", "[", "not "])
def test_a_pipeline_of_signs(capsys: pytest.CaptureFixture[str], sign: str) -> None:
    told = refusal(capsys, "augment", "x.png", "--pipeline", f"RandomCrop({sign * 50_000}1)")
    assert told.startswith("reg-kernels augment: --pipeline: from_text: text must be transforms")
    assert len(told) < 1100


# Studies


def test_databases_that_would_run_something(tmp_path: Path) -> None:
    for made in (
        "CREATE TRIGGER t AFTER INSERT ON studies BEGIN DELETE FROM studies; END",
        "CREATE VIEW t AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT * "
        "FROM n",
    ):
        where = tmp_path / "study.db"
        where.unlink(missing_ok=True)
        Study(str(where), "compare", {}, {})
        with sqlite3.connect(where) as database:
            database.execute(made)
        database.close()
        with pytest.raises(UsageError, match=r"must be without triggers and views, got t$"):
            Study(str(where), "compare", {}, {})


def test_a_journal_that_ends_within_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reg_kernels.cli._study.WAIT_SECONDS", 0.01)
    where = tmp_path / "study.log"
    Study(str(where), "compare", {}, {})
    whole = where.read_bytes()
    where.write_bytes(whole[:-4])
    with pytest.raises(UsageError, match="must end with a whole line, got a part of one"):
        Study(str(where), "compare", {}, {})
    where.write_bytes(whole)
    Study(str(where), "compare", {}, {})


def test_nobody_waits_for_a_process_of_the_time_to_come(tmp_path: Path) -> None:
    import optuna

    study = Study(str(tmp_path / "study.log"), "compare", {}, {})
    owner = {"host": "another one", "pid": 1, "beat": 1e300}
    state = optuna.trial.TrialState.RUNNING
    study.optuna.add_trial(optuna.trial.create_trial(state=state, user_attrs={"owner": owner}))
    assert not study.standing([{}]).running


def test_an_error_is_one_line_of_what_can_be_printed() -> None:
    error = UsageError("--data a\nb\x1b[2J\udcff: " + "x" * 2000)
    assert said(error).startswith(r"--data a\nb\x1b[2J\udcff: xxx")
    assert len(said(error)) == 1000 and said(error).isprintable()
    assert printable("a b") == "a b"
