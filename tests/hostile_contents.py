"""Whole files of each kind that commands read, and what is done to them: for hostile_files.py."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import sqlite3
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from hostile_folders import TABLE, VALUES, Folder
from PIL import Image

from reg_kernels.augment import from_text
from reg_kernels.cli import _study, _trial, build_parser, compare, train, tune
from reg_kernels.cli._compare_results import summary as compared
from reg_kernels.cli._data import load_images
from reg_kernels.cli._files import json_text
from reg_kernels.cli._folder import read_image
from reg_kernels.cli._recipe import recipe_from
from reg_kernels.cli._train_checkpoint import resume
from reg_kernels.cli._trainer import checkpoint as checkpoints
from reg_kernels.cli._trainer.parallel import ALONE
from reg_kernels.cli._trainer.training import Training
from reg_kernels.cli._tune_plan import best_of
from reg_kernels.cli._tune_results import summary as tuned
from reg_kernels.training import Recipe

ODD = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 1e308, math.nan, math.inf, -0.5),
    *("", "x", "base", "\x1b[2J", "a\nb", "\ud800", "$x^{$", "[/bold]", "a" * 5000, "nan"),
    *([], {}, [1], {"a": 1}, [[]] * 3, {"host": 1, "pid": "x", "beat": None}),
)


class Kind(NamedTuple):
    """A kind of file."""

    name: str  # of the file
    whole: list[bytes]  # right ones
    read: Callable[[Path], object]  # as the commands read it
    change: Callable[[Random, Path], str]  # changes a value of the file, and says what


# Bytes


def damage(r: Random, data: bytes) -> tuple[bytes, str]:
    """The bytes with a damage or two, and what that is."""
    changed, told = bytearray(data), []
    for _ in range(r.choice([1, 1, 2])):
        at = r.randrange(len(changed)) if changed else 0
        how = r.choice(["bit", "bit", "cut", "gap", "twice", "noise", "number", "zeros"])
        if how == "bit" and changed:
            changed[at] ^= 1 << r.randrange(8)
        elif how == "cut":
            del changed[at:]
        elif how == "gap":
            del changed[at : at + r.choice([1, 4, 64])]
        elif how == "twice":
            changed[at:at] = changed[max(0, at - 64) : at]
        elif how == "noise":
            changed[at : at + 16] = r.randbytes(r.choice([1, 16, 300]))
        elif how == "number":
            number = r.choice([0, 0x7F, 0xFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
            size = 8 if number >= 2**32 else r.choice([4, 8])
            changed[at : at + size] = number.to_bytes(size, r.choice(["little", "big"]))
        else:
            changed[at : at + 32] = bytes(32)
        told.append(f"{how} at {at}")
    return bytes(changed), ", ".join(told)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from _places(item, (*path, key))


def replaced(r: Random, value: Any, odd: Any) -> str:
    """Puts something odd in one of the places of nested values, or takes that away."""
    places = list(_places(value))
    if not places:
        return "nothing"
    *path, last = place = r.choice(places)
    for key in path:
        value = value[key]
    if r.random() < 0.15:
        del value[last]
        return f"{place} is gone"
    value[last] = copy.deepcopy(odd)
    return f"{place} is {str(odd)[:40]!r}"


# Arrays


def _npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _arrays() -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(60) % 3
    x = np.random.default_rng(0).normal(size=(60, 4, 4)).astype(np.float32)
    x[np.arange(60), y] += 1
    return x, y


def _change_npz(r: Random, path: Path) -> str:
    """Headers that say something else, and members that are packed, doubled or named otherwise."""
    x, y = _arrays()
    dtype = r.choice(
        ["<f4", "|O", "|V0", "<U0", "|S0", ">f2", "<f8", "<c16", "<M8[s]", "|u1", "O8"]
    )
    sides = [0, 1, 4, 60, -1, 2**31, 2**62, 2**63, 10**30]
    shape = tuple(r.choice(sides) for _ in range(r.choice([0, 1, 3, 4, 40])))
    text = repr({"descr": dtype, "fortran_order": r.random() < 0.5, "shape": shape})
    text = r.choice([text, "(" * 9000, "[" * 90 + "]" * 90, text.replace("'", ""), "1" * 5000])
    blob = b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(text), 65535)) + text.encode()
    member = r.choice(["x.npy", "x", "../x.npy", "/x.npy", "y.npy", "x\n.npy"])
    how = r.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("y.npy", _member(y))
        archive.writestr("x.npy", _member(x))
        archive.writestr(member, blob + r.choice([x.tobytes(), b"", bytes(10**6)]), how)
    return f"{member} by {how}: {text[:60]}"


def _member(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# Recipes and pipelines


def _change_recipe(r: Random, path: Path) -> str:
    names = [field.name for field in dataclasses.fields(Recipe)]
    depth = r.choice([2, 50, 900, 4000, 20000])
    value = r.choice(
        [
            *("1" * depth, "[" * depth, "[" * depth + "]" * depth, "{a=" * depth, "'" * depth),
            *(
                "nan",
                "-inf",
                "1e400",
                "0x" + "f" * depth,
                '"\\ud800"',
                '"\\u001b[2J"',
                "1979-05-27",
            ),
            *("'''\n" + "x" * depth, "true", "''", "9" * 400, "1_" * depth + "1", "[[[1]]]"),
        ]
    )
    name = r.choice([*names, "x" * depth, f"{r.choice(names)}" + ".a" * depth, '"\\n"', "[a]\nb"])
    path.write_text(f"{name} = {value}\n")
    return f"{name[:40]} = {value[:40]}"


_TEXTS = (
    "RandomResizedCrop(224), RandomHorizontalFlip(), RandAugment(2, 9), RandomErasing(0.25)",
    "rand-m9-mstd0.5-inc1, Normalize((0.5, 0.5, 0.5), (0.1, 0.1, 0.1)), ColorJitter(0.4)",
)


def _change_pipeline(r: Random, path: Path) -> str:
    text, depth = r.choice(_TEXTS), r.choice([2, 100, 5000, 40000])
    odd = r.choice(
        [
            *("(" * depth, "-" * depth, "[" * depth, "1+" * depth, "9" * depth, "'" * depth),
            *("\0", "\ud800", "__import__('os')", "lambda: 0", "*", "**{}", "1e999", "None", ","),
            *("RandomCrop", "f'{1}'", "{1: 2}", "-inf", "1j", "b''", "...", "await x", "a.b"),
        ]
    )
    at = r.randrange(len(text))
    path.write_text(text[:at] + odd + text[at + r.randrange(3) :], errors="surrogatepass")
    return f"{odd[:20]!r} at {at}"


# Images


def _pictures() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    found = []
    for name in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        Image.fromarray(pixels).save(file := io.BytesIO(), name)
        found.append(file.getvalue())
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file := io.BytesIO(), "PNG")
    Image.fromarray(pixels).save(packed := io.BytesIO(), "TIFF", compression="tiff_lzw")
    return [*found, file.getvalue(), packed.getvalue()]


def _read_picture(path: Path) -> None:
    for number, name in enumerate("ab"):
        (path.parent / name).mkdir(exist_ok=True)
        there = path.parent / name / "1.png"
        there.write_bytes(path.read_bytes() if number else _PICTURES[0])
    load_images(str(path.parent), 4)
    with contextlib.suppress(OSError):
        read_image(path)


_PICTURES = _pictures()


def _change_picture(r: Random, path: Path) -> str:
    """Sides that are another number, by the place where the first bytes have them."""
    data = bytearray(path.read_bytes())
    at = r.randrange(8, min(60, len(data) - 4))
    side = r.choice([0, 1, 13, 70_000, 2**16 - 1, 2**31 - 1, 2**32 - 1])
    order: Any = r.choice(["little", "big"])
    data[at : at + 4] = side.to_bytes(4, order)
    path.write_bytes(data)
    return f"{side} at {at}"


# Trainings


def _words(data: Path, *more: object) -> list[str]:
    given = ["--data", data, "--train-size", 30, "--epochs", 2, "--device", "cpu", *more]
    return [*map(str, given), "--model", "mlp"]


class _Checkpoint:
    """A checkpoint of `train`, and what is brought to its state."""

    def __init__(self, folder: Path) -> None:
        out = folder / "out"
        words = ["train", *_words(folder / "whole.npz", "--out", out, "--time-epochs", 0)]
        self.job = train._job(build_parser(["train"]).parse_args(words))
        self.training = Training(
            self.job.data,
            classes=self.job.images.classes,
            recipes=self.job.recipes,
            seeds=range(1),
            device=self.job.device,
            kernels=self.job.kinds["fused"],
            watch=tuple(self.job.data.parts()),
        )
        self.whole = folder / "whole.pt"
        self.training.run(self._keep)

    def _keep(self) -> None:
        if self.training.epoch == 1 and not self.whole.exists():
            checkpoints.save_checkpoint(self.whole, self.job.options, self.training.state())

    def read(self, path: Path) -> None:
        resume(self.training, path, self.job.options, ALONE)

    def change(self, r: Random, path: Path) -> str:
        options, state = checkpoints.load_checkpoint(path)
        content = {"options": options, "state": state}
        told = replaced(r, content, r.choice([*ODD, torch.zeros(2), torch.zeros(0).bool()]))
        made = {"format": checkpoints.FORMAT, "content": content}
        with contextlib.suppress(Exception):  # of what has no digest
            made["sha256"] = checkpoints.digest(content)
        torch.save(made, path)
        return told


class _StudyFile:
    """A study of `compare` or of `tune`, with all of its trials."""

    def __init__(self, command: Any, folder: Path, name: str) -> None:
        self._module = command
        self.whole = folder / f"{command.NAME} {name}"
        words = _words(folder / "whole.npz", "--storage", self.whole, "--out", folder / "out")
        words += ["--validation-size", "15", "--workers", "1", "--methods", "l1,l2"]
        more = {"compare": ["--seeds", "2"], "tune": ["--trials", "4", "--confirm", "1"]}
        parser = build_parser([command.NAME])
        self.plan = command._plan(parser.parse_args([command.NAME, *words, *more[command.NAME]]))
        self.read(self.whole)

    def read(self, path: Path) -> None:
        """Reads the study, does what it leaves to be done, and tells of it."""
        plan = dataclasses.replace(self.plan, storage=str(path))
        study = plan.study()
        if self._module is compare:
            compare.print_results(results := compared(plan, plan.work(study)))
        else:
            standing = plan.work(study, math.inf, None)
            best, confirmed = best_of(standing), None
            if (found := plan.to_confirm(standing)) is not None:
                confirmed = plan.retrain(plan.confirmation(), found, None)
            results = tuned(plan, standing, best, confirmed)
            if best is not None:
                results["best"]["command"] = ""
            tune.print_results(results)
        json_text(results)

    def change_journal(self, r: Random, path: Path) -> str:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        told = replaced(r, lines, r.choice(ODD))
        lines = lines if r.random() < 0.9 else r.sample(lines, len(lines))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return told

    def change_database(self, r: Random, path: Path) -> str:
        with contextlib.closing(sqlite3.connect(path)) as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            name = r.choice([table for (table,) in tables])
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({name})")]
            column, odd = r.choice(columns), r.choice(ODD)
            rows = database.execute(f"SELECT rowid, {column} FROM {name}").fetchall()
            if not rows:
                return "nothing"
            row, value = r.choice(rows)
            if isinstance(value, str) and value[:1] in "{[" and r.random() < 0.8:
                inner = json.loads(value)
                told = replaced(r, [inner], odd) if not inner else replaced(r, inner, odd)
                odd = json.dumps(inner)
            elif isinstance(odd, list | dict):
                odd = told = json.dumps(odd)
            else:
                told = str(odd)
            if isinstance(odd, str):
                odd = odd.encode("utf-8", "replace").decode()
            if isinstance(odd, int) and abs(odd) >= 2**63:
                odd = 2**63 - 1
            with contextlib.suppress(sqlite3.Error):
                change = f"UPDATE {name} SET {column} = ? WHERE rowid = ?"
                database.execute(change, (odd, row))
                if r.random() < 0.1:
                    database.execute(f"CREATE TRIGGER t AFTER INSERT ON {name} BEGIN SELECT 1; END")
                database.commit()
        return f"{name}.{column}: {told[:60]}"


def _trained(
    self: Any, recipe: Recipe, seed: int, fold: int = 0, after_epoch: Any = None, tested: Any = True
) -> dict[str, Any]:
    """In the place of a training: what it returns."""
    loss = 0.5 + recipe.l1 + recipe.l2 + seed / 100
    measures = {"validation_loss": loss, "test_accuracy": 0.5, "gap": 0.1, "test_loss": loss}
    measures |= {"test_ece": 0.1, "seconds_per_epoch": 0.1, "peak_bytes": 100.0}
    measures |= {"zeros": 7, "weights": 90, "epochs": 2, "best_epoch": 2}
    return {
        "measures": measures,
        "history": {"train_loss": [1.0, 0.9], "validation_loss": [1.1, loss]},
        "teacher": {"epochs": 2, "seconds": 0.2},
    }


def kinds(folder: Path, only: str | None = None) -> dict[str, Kind]:
    """All kinds of files; `folder` is for the whole ones."""
    x, y = _arrays()
    (folder / "whole.npz").write_bytes(_npz(x=x, y=y))
    _trial.Setting.train = _trained  # type: ignore[method-assign]
    _study.LOCK_SECONDS, _study.WAIT_SECONDS, _study.SILENT_SECONDS = 0.1, 0.01, 1.0

    def recipe_of(path: Path) -> None:
        recipe_from(build_parser(["train"]).parse_args(["train", "--recipe", str(path)]), Recipe())

    def pipeline_of(path: Path) -> None:
        with contextlib.suppress(TypeError, ValueError):  # of which the command makes a UsageError
            from_text(path.read_text(errors="surrogatepass"))

    def npz() -> Kind:
        packed = io.BytesIO()
        np.savez_compressed(packed, x=x, y=y)
        whole = [_npz(x=x, y=y), packed.getvalue(), _npz(x=np.zeros((9, 3, 2, 2), "u1"), y=y[:9])]
        return Kind("data.npz", whole, lambda path: load_images(str(path)), _change_npz)

    def checkpoint() -> Kind:
        made = _Checkpoint(folder)
        return Kind("c.pt", [made.whole.read_bytes()], made.read, made.change)

    def study(command: Any, name: str) -> Kind:
        made = _StudyFile(command, folder, name)
        change = made.change_journal if name.endswith(".log") else made.change_database
        return Kind(name, [made.whole.read_bytes()], made.read, change)

    def folder_of(name: str) -> Kind:
        made = Folder(folder, name)
        return Kind(name, [made.whole], made.read, made.change)

    recipe = Recipe().to_toml().encode()
    makers: dict[str, Callable[[], Kind]] = {
        "npz": npz,
        "image": lambda: Kind("i.png", _PICTURES, _read_picture, _change_picture),
        "recipe": lambda: Kind("recipe.toml", [recipe], recipe_of, _change_recipe),
        "pipeline": lambda: Kind(
            "line.txt", [text.encode() for text in _TEXTS], pipeline_of, _change_pipeline
        ),
        "checkpoint": checkpoint,
        "journal": lambda: study(compare, "study.log"),
        "database": lambda: study(compare, "study.db"),
        "tune journal": lambda: study(tune, "study.log"),
        "folder's table": lambda: folder_of(TABLE),
        "folder's values": lambda: folder_of(VALUES),
    }
    return {name: make() for name, make in makers.items() if only in (None, name)}
