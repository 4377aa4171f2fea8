"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ._errors import UsageError

# Between what mkstemp draws and the suffix of a temporary file: a file of that name is ours.
_PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it into place.

    A reader sees the old file or the new one, never a part; when `write` raises, the old file
    is left as it was and the temporary one is removed. The temporary file keeps `path`'s suffix,
    since writers such as matplotlib choose their format by it. It is locked while this process
    lives, so that `remove_abandoned` knows what a kill left behind.
    """
    handle, temporary = _locked_temporary(path)
    try:
        write(temporary)
        # mkstemp makes the file private; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.fsync(handle)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    finally:
        os.close(handle)


def remove_abandoned(path: Path) -> None:
    """Removes the temporary files that killed processes left while they wrote `path`."""
    name = rf"\.{re.escape(path.stem)}-[a-z0-9_]+{re.escape(_PARTIAL + path.suffix)}"
    for temporary in path.parent.glob(f".*-*{_PARTIAL}{path.suffix}"):
        if re.fullmatch(name, temporary.name) is None:
            continue
        # Another's file, or one that is gone by now, is none of ours to remove.
        with contextlib.suppress(OSError):
            handle = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(handle)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open and locked."""
    while True:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=_PARTIAL + path.suffix
        )
        # A file system without locks refuses them to `remove_abandoned` as well.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # taken for an abandoned one before it was locked


def output_file(option: str, path: Path) -> Path:
    """`path`, its folder made and found writable: before minutes of work, not after them."""
    if path.is_dir():
        raise UsageError(f"{option}: must be a file, got the directory {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(option, path, error) from error
    remove_abandoned(path)
    return path


def write_output(option: str, path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole`, and says so; what fails is the option's fault."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise _cannot_write(option, path, error) from error
    print(f"wrote {path}")


def _cannot_write(option: str, path: Path, error: OSError) -> UsageError:
    return UsageError(f"{option}: cannot write {path}: {error.strerror or error}")


def make_writable(out: Path, names: Collection[str]) -> None:
    """Creates the folder of --out and makes sure, before minutes of work, that results of these
    names can be put there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise _unwritable(out, error) from None
    for name in names:
        if (out / name).is_dir():
            raise UsageError(f"--out: {out / name} must be a file or free, got a directory")
    for name in names:
        remove_abandoned(out / name)


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(
        f"--out: must be a directory that can be written to, got {out}: {error.strerror or error}"
    )


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole`, of a file in the folder of --out."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def json_text(value: Any) -> str:
    """`value` as a file of JSON has it."""
    return json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """`value` with null for a loss that ran away: JSON has neither NaN nor Infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
