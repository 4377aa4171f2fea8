"""What `load_checkpoint` reads a folder with: torch's own reader runs what a file tells it to.

torch.distributed.checkpoint keeps its table of contents as a pickle, and what is no tensor as
pickles within files. The table is read here by a machine of its own, which knows those opcodes of
pickle that such a table is made of and makes plain records of them: nothing is imported, called or
changed by a name that stands in a file. torch's classes are then made of the records, field by
field. Values are read as `torch.load(..., weights_only=True)` reads them, and their checksums have
to hold, which torch does not look at; so has that of the table, which `save_checkpoint` adds.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint._nested_dict import set_element  # type: ignore[attr-defined]
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

TABLE = ".metadata"  # torch's name of a folder's table of contents
CHECKSUM = ".metadata.sha256"  # of the table, as sha256sum writes and checks it
MOST_BYTES = 1 << 28  # of a table, which takes some 140 for a shard of a tensor
MOST_DIMS = 64  # of a tensor: torch takes no more

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_MEMORY_FORMATS = {
    0: torch.contiguous_format,
    1: torch.channels_last,
    2: torch.preserve_format,
    "TORCH_CONTIGUOUS_FORMAT": torch.contiguous_format,
    "TORCH_CHANNELS_LAST": torch.channels_last,
    "TORCH_PRESERVE_FORMAT": torch.preserve_format,
}
_OF_TORCH = "torch.distributed.checkpoint.metadata"
# What a table may name, by the word that a record keeps of it.
_NAMES = {
    **{("torch", name): f"torch.{name}" for name in _DTYPES},
    ("torch", "Size"): "Size",
    ("torch.serialization", "_get_layout"): "_get_layout",
    ("builtins", "getattr"): "getattr",  # of an enumeration, by Python 3.11.2
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): "_StorageInfo",
    **{
        (_OF_TORCH, name): name
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta"),
        )
    },
    **{
        (module, f"{system}Path"): "Path"
        for module in ("pathlib", "pathlib._local")
        for system in ("", "Posix", "Windows")
    },
}


def _wrong(what: str) -> ValueError:
    return ValueError(f"its table of contents {what}")


# The machine


class _Record:
    """A name of the table, or what the table says is made of one: no object of that class."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.arguments = arguments  # None for the name itself
        self.state: Any = None


_PLAIN = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("SHORT_BINUNICODE", "BINUNICODE"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Runs the opcodes of a table over a stack of plain values and records.

    All that it makes are None, bool, int, str, tuple, list, dict and `_Record`: at
    most one that holds others for two bytes, as each has an opcode for its place in the memo, too.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self, data: bytes) -> Any:
        containers = len(data) // 2
        stack, memo = self.stack, self.memo
        for opcode, value, _ in pickletools.genops(data):
            argument: Any = value
            name = opcode.name
            if name == "MEMOIZE":
                memo.append(stack[-1])
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _PLAIN:
                stack.append(_CONSTANTS.get(name, argument))
            elif name == "MARK":
                self.marks.append(len(stack))
            elif name == "STOP":
                return stack[-1]
            elif name not in ("PROTO", "FRAME"):
                self._combine(name)
                containers -= 1
                if containers < 0:
                    raise _wrong("has more containers than content")
        raise _wrong("has no end")

    def _combine(self, name: str) -> None:
        """One of the opcodes that make something of what lies on the stack."""
        stack = self.stack
        if name in _TUPLES:
            stack.append(tuple(self._popped(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._above_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "STACK_GLOBAL":
            stack.append(self._named(*self._popped(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            what, arguments = self._popped(2)
            if not _is_name(what) or type(arguments) is not tuple:
                raise _wrong(f"calls a {type(what).__name__}")
            stack.append(_Record(what.name, arguments))
        elif name == "BUILD":
            what, state = self._popped(2)
            if type(what) is not _Record or what.arguments is None or what.state is not None:
                raise _wrong("sets the state of what it did not make")
            what.state = state
            stack.append(what)
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(1) if name == "APPEND" else self._above_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2) if name == "SETITEM" else self._above_mark()
            keys = items[::2]
            if not all(type(key) in (str, _Record) for key in keys):
                raise _wrong("has keys that are neither texts nor indices")
            self._top(dict).update(zip(keys, items[1::2], strict=True))
        else:
            raise _wrong(f"holds the opcode {name}")

    def _named(self, module: Any, name: Any) -> _Record:
        if type(module) is not str or type(name) is not str:
            raise _wrong(f"names a {type(name).__name__} of a {type(module).__name__}")
        if (known := _NAMES.get((module, name))) is None:
            raise _wrong(f"names {f'{module[:50]}.{name[:50]}'!a}")
        return _Record(known)

    def _popped(self, count: int) -> list[Any]:
        """The last values, none of which is below the last mark."""
        begin = len(self.stack) - count
        if begin < (self.marks[-1] if self.marks else 0):
            raise _wrong("takes more from its stack than there is")
        return self._cut(begin)

    def _above_mark(self) -> list[Any]:
        return self._cut(self.marks.pop())

    def _cut(self, begin: int) -> list[Any]:
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _wrong(f"adds to a {type(self.stack[-1]).__name__}")
        return self.stack[-1]


def _is_name(value: Any) -> bool:
    return type(value) is _Record and value.arguments is None


# torch's classes, of records


def _checked(value: Any, kind: type, what: str) -> Any:
    """`value`, which is of that very type."""
    if type(value) is not kind:
        raise _wrong(f"has a {type(value).__name__} for {what}")
    return value


def _count(value: Any, what: str) -> int:
    if not 0 <= _checked(value, int, what) < 2**63:
        raise _wrong(f"has a number out of range for {what}")
    return cast(int, value)


def _made(value: Any, name: str) -> _Record:
    """A record that was made of that name."""
    if type(value) is not _Record or value.name != name or value.arguments is None:
        found = value.name if type(value) is _Record else type(value).__name__
        raise _wrong(f"has a {found} for a {name}")
    return value


def _fields(value: Any, name: str, known: set[str]) -> dict[str, Any]:
    """The fields of a record of one of torch's dataclasses; what is missing is None."""
    record = _made(value, name)
    state = {} if record.state is None else _checked(record.state, dict, f"a {name}")
    if record.arguments or not state.keys() <= known:
        raise _wrong(f"has other fields in a {name} than torch has")
    return dict.fromkeys(known) | state


class _Maker:
    """Makes torch's classes. A table may name one list from many places: what is gone through may
    not be more than its bytes could have held."""

    def __init__(self, size: int) -> None:
        self.left = size

    def _through(self, values: Any) -> Any:
        self.left -= len(values)
        if self.left < 0:
            raise _wrong("says more than its bytes hold")
        return values

    def metadata(self, value: Any) -> Metadata:
        """The table, but for what torch's planner and writer kept there for themselves."""
        known = {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
        fields = _fields(value, "Metadata", known)
        entries = _checked(fields["state_dict_metadata"], dict, "its entries")
        places = _checked(fields["storage_data"], dict, "its places")
        return Metadata(
            {_checked(key, str, "a key"): self.entry(entry) for key, entry in entries.items()},
            storage_data={self.index(key): self.place(place) for key, place in places.items()},
        )

    def entry(self, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if type(value) is _Record and value.name == "BytesStorageMetadata":
            _fields(value, "BytesStorageMetadata", set())
            return BytesStorageMetadata()
        fields = _fields(value, "TensorStorageMetadata", {"properties", "size", "chunks"})
        size = self.size(fields["size"])
        chunks = self._through(_checked(fields["chunks"], list, "chunks"))
        made = [self.chunk(chunk, len(size)) for chunk in chunks]
        return TensorStorageMetadata(_properties(fields["properties"]), size, made)

    def chunk(self, value: Any, dims: int) -> ChunkStorageMetadata:
        fields = _fields(value, "ChunkStorageMetadata", {"offsets", "sizes"})
        offsets, sizes = self.size(fields["offsets"]), self.size(fields["sizes"])
        if not len(offsets) == len(sizes) == dims:
            raise _wrong("has a chunk with other dimensions than its tensor")
        return ChunkStorageMetadata(offsets, sizes)

    def index(self, value: Any) -> MetadataIndex:
        fields = _fields(value, "MetadataIndex", {"fqn", "offset", "index"})
        offset, index = fields["offset"], fields["index"]
        return MetadataIndex(
            _checked(fields["fqn"], str, "a key"),
            None if offset is None else self.size(offset),
            None if index is None else _count(index, "the number of a chunk"),
        )

    def place(self, value: Any) -> _StorageInfo:
        known = {"relative_path", "offset", "length", "transform_descriptors"}
        fields = _fields(value, "_StorageInfo", known)
        file = _checked(fields["relative_path"], str, "the name of a file")
        if PurePath(file).name != file or file in ("", "..") or "\0" in file:
            raise _wrong(f"names the file {file[:100]!a}")
        if fields["transform_descriptors"]:
            raise _wrong("has values that are packed")
        offset, length = fields["offset"], fields["length"]
        return _StorageInfo(file, _count(offset, "an offset"), _count(length, "a length"))

    def size(self, value: Any) -> torch.Size:
        arguments = _made(value, "Size").arguments or ((),)
        if len(arguments) != 1 or len(_checked(arguments[0], tuple, "a size")) > MOST_DIMS:
            raise _wrong("has a size that is none")
        return torch.Size([_count(side, "a side") for side in self._through(arguments[0])])


def _properties(value: Any) -> TensorProperties:
    record = _made(value, "TensorProperties")
    state = _checked(record.state, tuple, "properties")
    if record.arguments or len(state) != 5:
        raise _wrong("has other properties of a tensor than torch has")
    dtype, layout, requires_grad, memory_format, pin_memory = state
    name = dtype.name.removeprefix("torch.") if _is_name(dtype) else ""
    layouts = _made(layout, "_get_layout")
    try:
        return TensorProperties(
            _DTYPES[name],
            _LAYOUTS[_only(layouts, str)],
            _checked(requires_grad, bool, "requires_grad"),
            _MEMORY_FORMATS[_memory_format(memory_format)],
            _checked(pin_memory, bool, "pin_memory"),
        )
    except KeyError:
        raise _wrong("has properties of a tensor that torch has not") from None


def _memory_format(value: Any) -> int | str:
    """The number of an enumeration's member, or its name, as Python 3.11.2 keeps it."""
    if type(value) is _Record and value.name == "getattr":
        enumeration, *names = value.arguments or (None,)
        known = _is_name(enumeration) and enumeration.name == "_MEM_FORMAT_ENCODING"
        if not known or len(names) != 1:
            raise _wrong("takes an attribute of another thing than a memory format")
        return cast(str, _checked(names[0], str, "a memory format"))
    return cast(int, _only(_made(value, "_MEM_FORMAT_ENCODING"), int))


def _only(record: _Record, kind: type) -> Any:
    """What a record was made of, which is one value."""
    arguments = record.arguments or ()
    if len(arguments) != 1:
        raise _wrong(f"makes a {record.name} of {len(arguments)} values")
    return _checked(arguments[0], kind, f"what {record.name} takes")


# Reading


def checksum(table: bytes) -> str:
    """What stands in the file CHECKSUM of a folder with that table."""
    return f"{hashlib.sha256(table).hexdigest()}  {TABLE}\n"


def _table(data: bytes) -> Metadata:
    """The table of contents of a folder."""
    try:
        value = _Machine().run(data)
    except (LookupError, EOFError) as error:
        raise _wrong(f"is damaged: {error}") from None
    return _Maker(len(data)).metadata(value)


class _Stretch(io.RawIOBase):
    """A part of a file, read as a file. torch's own cannot be read from its end."""

    def __init__(self, file: Any, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = (0, self._at, self._length)[whence] + offset
        if at < 0:
            raise OSError("before the begin")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        count: int = self._file.readinto(memoryview(buffer)[: max(self._length - self._at, 0)])
        self._at += count
        return count


def _check_value(file: Any, place: _StorageInfo) -> None:
    """Raises ValueError where a value is not as it was written: torch keeps each as an archive with
    checksums, and does not look at them itself."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        is_plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        # Members that overlap would be read again and again.
        if not is_plain or sum(member.file_size for member in members) > place.length:
            raise ValueError(f"{place.relative_path} has a value that is packed")
        if archive.testzip() is not None:
            raise ValueError(f"{place.relative_path} has a value that is damaged")


class _RegularFiles(FileSystem):
    """Opens a folder's own files to be read: a link may lead out of it, and a pipe has no end."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ValueError(f"{Path(path).name} is no regular file")
        with os.fdopen(handle, mode) as stream:
            yield cast(io.IOBase, stream)


class SafeReader(FileSystemReader):
    """torch's reader of a folder, which takes nothing from elsewhere and runs nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = _RegularFiles()
        self.table: Metadata | None = None

    def read_table(self) -> None:
        """Reads the table of contents; raises what is wrong with it, which torch might not pass
        on."""
        with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
            data = cast(IO[bytes], file).read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise _wrong(f"has more than {MOST_BYTES} bytes")
        table = _table(data)
        if self._says_otherwise(checksum(data).encode()):
            raise _wrong(
                f"is not the one that {CHECKSUM} was written for; remove that file if another "
                "program than save_checkpoint wrote the folder"
            )
        self.table = table

    def _says_otherwise(self, sum_: bytes) -> bool:
        """Whether the folder has another checksum; one that torch alone wrote has none."""
        try:
            with self.fs.create_stream(Path(self.path) / CHECKSUM, "rb") as file:
                return cast(IO[bytes], file).read(len(sum_) + 1) != sum_
        except FileNotFoundError:
            return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.table is None:
            self.read_table()
        return cast(Metadata, self.table)

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        if sinfo.offset + sinfo.length > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{sinfo.relative_path} is shorter than its table of contents says")
        _check_value(_Stretch(file, sinfo.offset, sinfo.length), sinfo)
        return super()._slice_file(file, sinfo)


class SafePlanner(DefaultLoadPlanner):
    """torch's way to put values in their place, which makes no objects of the file's choice."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))
