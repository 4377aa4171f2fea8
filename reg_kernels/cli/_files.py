"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ._errors import UsageError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it into place.

    A reader sees the old file or the new one, never a part; when `write` raises, the old file
    is left as it was and the temporary one is removed. The temporary file keeps `path`'s suffix,
    since writers such as matplotlib choose their format by it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes the file private; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


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
