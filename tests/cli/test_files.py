"""Files are written whole, and what a kill left is removed, but never what lives."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reg_kernels.cli import _files
from reg_kernels.cli._errors import UsageError
from reg_kernels.cli._files import output_file, remove_abandoned, write_output, write_whole
from reg_kernels.cli._trainer.checkpoint import save


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_kill_left_is_removed_and_nothing_else(path: Path) -> None:
    code = (
        "import os, pathlib, runpy, signal, sys, types\n"
        # Without the package, whose imports take seconds.
        "package = types.ModuleType('cli'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['cli'] = package\n"
        "from cli._files import write_whole\n"
        "def write(part):\n"
        "    part.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(pathlib.Path(sys.argv[2]), write)\n"
    )
    folder = str(Path(_files.__file__).parent)
    subprocess.run([sys.executable, "-c", code, folder, str(path)])
    (left,) = names(path.parent)
    assert re.fullmatch(r"\.checkpoint-.{8}\.partial\.pt", left)
    # Of another file, of the user, and one that leads elsewhere.
    for other in (".model-abcdefgh.partial.pt", ".checkpoint-mine.pt", "checkpoint-a.partial.pt"):
        (path.parent / other).touch()
    link = path.parent / ".checkpoint-linklink.partial.pt"
    link.symlink_to(path.parent / "checkpoint-a.partial.pt")
    before = set(names(path.parent))
    assert output_file("--json", path) == path
    assert before - set(names(path.parent)) == {left}


def test_what_another_run_is_writing_stays(path: Path) -> None:
    def write(part: Path) -> None:
        remove_abandoned(path)  # as a run that starts meanwhile does
        assert part.exists()
        part.write_text("whole")
        remove_abandoned(path)

    write_whole(path, write)
    assert path.read_text() == "whole"
    assert names(path.parent) == ["checkpoint.pt"]


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, seen = _files.fcntl.flock, []

    def meanwhile(handle: int, how: int) -> None:
        if not seen:
            seen.append(handle)
            remove_abandoned(path)
            assert names(path.parent) == []
        lock(handle, how)

    monkeypatch.setattr(_files.fcntl, "flock", meanwhile)
    write_whole(path, lambda part: part.write_text("whole"))
    assert path.read_text() == "whole"


def test_a_file_system_without_locks_keeps_everything(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(_files.fcntl, "flock", refuse)
    write_whole(path, lambda part: (remove_abandoned(path), part.write_text("whole")))
    assert path.read_text() == "whole"


def test_a_disk_without_room_is_one_line_and_leaves_the_file_that_was_there(path: Path) -> None:
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself refuses the write, as it does where a disk or a quota is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        expected = rf"^--out: cannot write {re.escape(str(path))}: {os.strerror(errno.EFBIG)}$"
        with pytest.raises(UsageError, match=expected):
            write_output("--out", path, lambda part: save(torch.zeros(2**20), part))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before"
    assert names(path.parent) == ["checkpoint.pt"]
