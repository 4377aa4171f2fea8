"""A folder of a checkpoint, and what is done to it: for hostile_contents.py."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
import pickletools
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from reg_kernels.cli._errors import UsageError
from reg_kernels.distributed import load_checkpoint, save_checkpoint
from reg_kernels.distributed._checkpoint_reader import CHECKSUM, TABLE

VALUES = "__0_0.distcp"
SECRET = 777.0  # stands in a file outside, and may not come in
NAMES, DEEP = ["a", "b"], {"lr": 0.5, "on": True}
_OF_TORCH = "torch.distributed.checkpoint.metadata"
# The classes that a table names, whose attributes stay as they are.
_CLASSES = (
    *(metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata),
    *(metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING),
    *(metadata.MetadataIndex, metadata.StorageMeta, filesystem._StorageInfo),
    *(torch.Size, torch.dtype, torch.layout, pathlib.PosixPath, pathlib.Path, pathlib.PurePath),
)


def _attributes() -> list[dict[str, int]]:
    return [{name: id(value) for name, value in vars(c).items()} for c in _CLASSES]


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _named(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


_NAMED = (
    *(_named("pathlib", "PosixPath"), _named("torch", "Size"), _named("torch", "float32")),
    *(_named(_OF_TORCH, c.__name__) for c in _CLASSES[:8]),
    *(_named("os", "system"), _named("posix", "system"), _named("builtins", "eval")),
    *(_named("builtins", "getattr"), _named(_OF_TORCH, "os.system"), b"cos\nsystem\n"),
)
_STATES = (
    *(b"N}" + _text("_str") + _text("/victim") + b"s\x86b", b"}" + _text("fqn") + b"Nsb"),
    *(b"}" + _text("__class__") + b"Nsb", b"}" + _text("__setstate__") + b"Nsb", b"\x88b"),
)
_USES = (
    *(b")\x81", b")R", _text("touch run") + b"\x85R", b"\x8b\xff\xff\xff\x7f", b"}\x92"),
    *(b"(\x8a\xff" + b"\xff" * 255 + b"t\x81", b"\x85" * 300, b"\x94" * 300, b"Na", b"NNs"),
)
_MORE = (
    *(b"\x82\x01", b"\x84\xff\xff\xff\x7f", b"\x51", b"Pos\n", b"r\xff\xff\xff\x7f", b"0", b"1"),
    *(b"2" * 500, b"X\xff\xff\xff\x7f", b"\x96" + b"\xff" * 7 + b"\x7f", b"]" * 500, b"(" * 500),
    *(b"\x95" + b"\xff" * 8, b"I" + b"9" * 5000 + b"\n", b"h\xff", b"\x8b\x00\x00\x00\x00", b"."),
)
_FILES = (
    *("../secret.pt", "/etc/passwd", "..", ".", "", "link", "pipe", "folder", TABLE, "a\0b"),
    *("\x1b[2J", "x" * 250, "missing", "__1_0.distcp", "./" + VALUES, "\ud800"),
)


class Folder:
    """A whole folder, one of whose two files is changed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder / f".checkpoint {name}"  # no class of images
        values = {"x": torch.arange(6.0), "y": torch.ones(2, 3).bfloat16()}
        save_checkpoint({**values, "names": NAMES, "deep": DEEP}, self.folder)
        self.whole = (self.folder / name).read_bytes()
        torch.save(torch.full((6,), SECRET), folder / "secret.pt")
        self._read()  # copyreg and enum note things on classes when they are first used
        self.before = _attributes()

    def _read(self, folder: Path | None = None) -> dict[str, Any]:
        state = {"x": torch.zeros(6), "y": torch.zeros(2, 3).bfloat16(), "names": [0, 0]}
        state["deep"] = {"lr": 0, "on": 0}
        load_checkpoint(state, self.folder if folder is None else folder)
        return state

    def read(self, path: Path) -> None:
        """Reads the folder of the file, in which the other file is a whole one."""
        for name in {TABLE, VALUES} - {self.name}:
            if not os.path.lexists(path.parent / name):
                shutil.copy(self.folder / name, path.parent / name)
        try:
            state = self._read(path.parent)
            self._check_origin(state)
            if self.name == TABLE:  # which was taken; its checksum tells whether it is the same
                shutil.copy(self.folder / CHECKSUM, path.parent / CHECKSUM)
                state = self._read(path.parent)
        except FileNotFoundError as error:  # of a table that is a link to nothing
            raise UsageError(str(error)) from error
        except RuntimeError as error:
            if not str(error).startswith("load_checkpoint: every rank must be able to use "):
                raise
            raise UsageError(str(error)) from error
        finally:
            if _attributes() != self.before or Path("/a") == Path("/b"):
                raise AssertionError("a class is not what it was")
            if (path.parent / "run").exists() or Path("run").exists():
                raise AssertionError("something was run")
        if not self._is_whole(state):
            raise AssertionError(f"other values than those that were saved: {state}")

    @staticmethod
    def _check_origin(state: dict[str, Any]) -> None:
        if isinstance(x := state["x"], torch.Tensor) and (x == SECRET).any():
            raise AssertionError("a file from outside was read")

    @staticmethod
    def _is_whole(state: dict[str, Any]) -> bool:
        tensors = torch.equal(state["x"], torch.arange(6.0)) and bool((state["y"] == 1).all())
        return tensors and (state["names"], state["deep"]) == (NAMES, DEEP)

    def change(self, r: Random, path: Path) -> str:
        """Opcodes, names of files or links of another's choice."""
        of_table = (self._opcodes, self._opcodes, self._file, self._file, self._exchange)
        kinds = of_table if self.name == TABLE else (self._link, self._trap)
        return r.choice(kinds)(r, path)

    def _opcodes(self, r: Random, path: Path) -> str:
        """Takes away, doubles, moves and adds opcodes."""
        data = path.read_bytes()
        places = [at for _, _, at in pickletools.genops(data) if at is not None]
        pairs = zip(places, [*places[1:], len(data)], strict=True)
        found = [data[begin:end] for begin, end in pairs]
        told = []
        for _ in range(r.choice([1, 1, 2, 4])):
            at = r.randrange(1, len(found))
            how = r.choice(["state", "state", "use", "more", "gone", "twice", "other", "name"])
            if how == "state":
                found[at:at] = [r.choice(_NAMED) + r.choice([b"", b")\x81", b")R"])]
                found[at + 1 : at + 1] = [r.choice(_STATES) + r.choice([b"", b"0"])]
            elif how == "use":
                found[at:at] = [r.choice(_NAMED), r.choice(_USES)]
            elif how == "more":
                found[at:at] = [r.choice(_MORE)]
            elif how == "name":
                named = [i for i, part in enumerate(found) if part == b"\x93"] or [at]
                found[r.choice(named)] = b"00" + r.choice(_NAMED)
            elif how == "gone":
                del found[at]
            else:
                found[at:at] = [found[at if how == "twice" else r.randrange(1, len(found))]]
            told.append(f"{how} at {at}")
        path.write_bytes(b"".join(found))
        return ", ".join(told)

    def _file(self, r: Random, path: Path) -> str:
        """Another file for a value, or another place in it."""
        shutil.copy(self.folder.parent / "secret.pt", path.parent / "__1_0.distcp")
        (path.parent / "link").symlink_to(self.folder.parent / "secret.pt")
        (path.parent / "folder").mkdir()
        os.mkfifo(path.parent / "pipe")
        (path.parent / "__1_0.distcp").unlink()
        (path.parent / "__1_0.distcp").symlink_to("../secret.pt")
        table = pickle.loads(path.read_bytes())
        size = (self.folder.parent / "secret.pt").stat().st_size
        info = r.choice([*table.storage_data.values()])
        for place in [info] if r.random() < 0.5 else table.storage_data.values():
            place.relative_path = r.choice(_FILES)
            place.offset = r.choice([0, place.offset, -1, 2**62, 2**63, 2**200, True, None])
            place.length = r.choice([size, place.length, 0, -1, 2**62, 2**63, "", None])
        with contextlib.suppress(UnicodeEncodeError):  # of half a character
            path.write_bytes(pickle.dumps(table))
        return f"{info}"[:200]

    def _exchange(self, r: Random, path: Path) -> str:
        """Each of two values in the other's place."""
        table = pickle.loads(path.read_bytes())
        one, other = r.sample(list(table.storage_data), 2)
        places = table.storage_data
        places[one], places[other] = places[other], places[one]
        path.write_bytes(pickle.dumps(table))
        return f"{one} for {other}"

    def _link(self, r: Random, path: Path) -> str:
        """A link, a pipe or a folder in the place of the values."""
        path.unlink()
        how = r.choice(["link", "same", "pipe", "folder", "missing"])
        if how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how != "missing":
            path.symlink_to(self.folder / VALUES if how == "same" else "../secret.pt")
        return how

    def _trap(self, r: Random, path: Path) -> str:
        """A value that says what is to be run, in the place of another."""
        data = bytearray(path.read_bytes())
        pickles = [at for at in range(len(data) - 1) if data[at] == 0x80 and data[at + 1] in (2, 4)]
        at = r.choice(pickles)
        trap = b"\x80\x02" + r.choice((b"cos\nsystem\n", b"cbuiltins\neval\n"))
        trap += b"X\x09\x00\x00\x00touch run\x85R."
        data[at : at + len(trap)] = trap
        path.write_bytes(data)
        return f"a trap at {at}"
