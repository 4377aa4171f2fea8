"""A training's state as a file: written whole, read without running code from it."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "reg_kernels train checkpoint 5"
# What a file may hold beyond its bytes: a value that stands in several places is written once.
SHARED = 16


def save_checkpoint(path: Path, options: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes what `load_checkpoint` reads; `options` are those that shape the result."""
    content = {"options": options, "state": state}
    save({"format": FORMAT, "sha256": digest(content), "content": content}, path)


def save(value: object, path: Path) -> None:
    """As torch.save, but a full disk raises OSError as it does everywhere else."""
    blob = io.BytesIO()
    torch.save(value, blob)
    path.write_bytes(blob.getbuffer())


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options and the state saved at `path`.

    Raises OSError when the file cannot be read and ValueError when it is damaged or something
    else. Never runs code from the file: `weights_only=True`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("a device, a pipe or a socket")
    with path.open("rb") as file:
        try:
            most = SHARED * _size_of(file)
            saved = torch.load(file, weights_only=True, map_location="cpu")
            if saved["format"] != FORMAT or saved["sha256"] != digest(saved["content"], most):
                raise ValueError("another format or other values than were saved")
            return dict(saved["content"]["options"]), dict(saved["content"]["state"])
        except Exception as error:
            # The archive reader and the unpickler raise nearly any type on a damaged file.
            raise ValueError(f"not a whole {FORMAT}: {error}") from error


def _size_of(file: BinaryIO) -> int:
    """The bytes of an archive of torch's. Raises ValueError for one that unpacks to more."""
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed, which torch.save does not do")
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def check_alike(value: Any, like: Any, where: str = "state") -> None:
    """Raises ValueError unless both are made alike: types, keys, lengths, and a tensor's dtype,
    shape and layout."""
    if type(value) is not type(like):
        raise ValueError(f"{where}: {type(value)} where {type(like)} was expected")
    if isinstance(like, dict):
        if value.keys() != like.keys():
            raise ValueError(f"{where}: {list(value)} where {list(like)} were expected")
        for key in like:
            check_alike(value[key], like[key], f"{where}.{key}")
    elif isinstance(like, list | tuple):
        for index, pair in enumerate(zip(value, like, strict=True)):
            check_alike(*pair, f"{where}.{index}")
    elif isinstance(like, Tensor):
        for make in (
            (value.dtype, like.dtype),
            (value.shape, like.shape),
            (value.layout, like.layout),
        ):
            if make[0] != make[1]:
                raise ValueError(f"{where}: {make[0]} where {make[1]} was expected")


def digest(content: dict[str, Any], most: float = math.inf) -> str:
    """The SHA-256 of nested dicts and lists of tensors and primitives.

    torch.load checks no checksum: of 1,500 files with one bit flipped it read 1,234 into other
    values without complaint. Raises ValueError of more than `most` bytes of tensors and values: a
    list that has one list twice, which has another one twice, takes hours after 40 of them.
    """
    digest = hashlib.sha256()
    left = most

    def add(value: Any) -> None:
        nonlocal left
        left -= 1 + (value.numel() * value.itemsize if isinstance(value, Tensor) else 0)
        if left < 0:
            raise ValueError("more values than its file can hold")
        if isinstance(value, dict):
            digest.update(b"{")
            for key, item in value.items():
                add(key)
                add(item)
            digest.update(b"}")
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for item in value:
                add(item)
            digest.update(b"]")
        elif isinstance(value, Tensor):
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError("a tensor that is larger than what it is stored in")
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(f"{value!r};".encode())

    add(content)
    return digest.hexdigest()
