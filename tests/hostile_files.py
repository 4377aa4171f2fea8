"""Damages files that the commands read, and says which of them did more than be refused.

    python tests/hostile_files.py --seed 0 --files 1000 [--kind journal] [--only 17]

A file is drawn from (kind, seed, number) alone: a whole one, of which bytes are changed or, by what
the format says, a value. It may be taken or refused by a UsageError, which is one line. Files are
read in forked processes, each of which reads many: one that dies or spins is named, and the next
ones are still read. What a file must not bring about is an error: a process or a connection, a
pickle's class, code, a library, a file written elsewhere. --only reads one file again, in this
process. Exit code 1 where one did more than be refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hostile_contents import Kind, damage, kinds

from reg_kernels.cli._errors import UsageError, said

BATCH = 100  # files of one process
SECONDS = 20  # of processor time for a file
MEMORY = 4 << 30  # addresses beyond those of the start
# What Python tells of, and none of these files may bring about.
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork"),
    *("socket.connect", "socket.bind", "pickle.find_class", "ctypes.dlopen"),
    *("sqlite3.enable_load_extension", "sqlite3.load_extension", "os.kill", "shutil.rmtree"),
)
MUST_NOT = "a file must not bring about"


# Reading them


_watched: Path | None = None  # the folder that may be written to, while a file is read


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook."""
    if _watched is None:
        return
    if event in FORBIDDEN and not (event == "os.kill" and arguments[1] == 0):
        raise RuntimeError(f"{MUST_NOT}: {event} {arguments!r}"[:300])
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and not os.fsdecode(path).startswith((str(_watched), "/dev/")):
            raise RuntimeError(f"{MUST_NOT}: {path!r} opened to be written")


def read(kind: Kind, seed: str, number: int, folder: Path) -> tuple[str, str | None]:
    """Reads one file. Returns what was done to it, and what is wrong with how that ended."""
    global _watched
    r = random.Random(f"{seed}:{number}")
    place = Path(tempfile.mkdtemp(dir=folder))
    path = place / kind.name
    path.write_bytes(r.choice(kind.whole))
    if r.random() < 0.5:
        told = kind.change(r, path)
    else:
        changed, told = damage(r, path.read_bytes())
        path.write_bytes(changed)
    _current(number, told)
    wrong = None
    try:
        _watched = folder
        with warnings.catch_warnings(action="ignore"):
            kind.read(path)
    except UsageError as error:
        if not said(error).isprintable() or len(said(error)) > 1000 or MUST_NOT in str(error):
            wrong = f"is refused by {str(error)[:500]!r}"
        told = f"refused: {told}"
    except BaseException:
        lines = traceback.format_exc().strip().splitlines()
        wrong = f"raises {lines[-1][:300]}\n" + "\n".join(lines[-7:-1])
    finally:
        _watched = None
    for left in sorted(place.rglob("*"), reverse=True):
        left.rmdir() if left.is_dir() and not left.is_symlink() else left.unlink()
    place.rmdir()
    return told, wrong


_place = mmap.mmap(-1, 4096)


def _current(number: int, told: str) -> None:
    _place.seek(0)
    _place.write(struct.pack("q", number) + told.encode(errors="replace")[:4000] + b"\0")
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def child(name: str, kind: Kind, seed: int, numbers: range, folder: Path, report: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff speaks there by itself
    sys.addaudithook(_watch)
    refused = wrong = 0
    quiet = io.StringIO()
    for number in numbers:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            told, what = read(kind, f"{name}:{seed}", number, folder)
        refused += told.startswith("refused")
        if what is not None:
            wrong += 1
            print(f"--kind '{name}' --seed {seed} --only {number} {what}\n  {told}", flush=True)
    os.write(report, struct.pack("qq", refused, wrong))
    os._exit(0)


def survive(name: str, kind: Kind, seed: int, numbers: range, folder: Path) -> Counter[str]:
    """Reads the files; how many were read, refused and wrong."""
    count = Counter(files=len(numbers), refused=0, wrong=0)
    while numbers:
        sys.stdout.flush()
        answer, report = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                child(name, kind, seed, numbers[:BATCH], folder, report)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
            os._exit(101)
        os.close(report)
        result = os.read(answer, 16)  # nothing from one that died
        os.close(answer)
        _, status = os.waitpid(pid, 0)
        if len(result) == 16:
            refused, wrong = struct.unpack("qq", result)
            count.update(refused=refused, wrong=wrong)
            numbers = numbers[BATCH:]
            continue
        (number,) = struct.unpack("q", _place[:8])
        told = _place[8:].split(b"\0")[0].decode(errors="replace")
        how = (
            signal.Signals(os.WTERMSIG(status)).name
            if os.WIFSIGNALED(status)
            else f"exit code {os.WEXITSTATUS(status)}"
        )
        count.update(wrong=1)
        print(f"--kind '{name}' --seed {seed} --only {number} dies: {how}\n  {told}")
        numbers = numbers[numbers.index(number) + 1 :]
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=1000, help="of each kind")
    parser.add_argument("--kind", help="this kind alone")
    parser.add_argument("--only", type=int, help="the number of one file, read in this process")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with contextlib.redirect_stdout(io.StringIO()):
            found = kinds(folder, args.kind)
        for name, kind in found.items():
            if args.only is not None:
                told, what = read(kind, f"{name}:{args.seed}", args.only, folder)
                print(f"{told}: {what or 'ended well'}")
                wrong += what is not None
                continue
            for whole in kind.whole:
                (folder / kind.name).write_bytes(whole)
                with contextlib.redirect_stdout(io.StringIO()):
                    kind.read(folder / kind.name)  # is taken
            begun = time.monotonic()
            count = survive(name, kind, args.seed, range(args.files), folder)
            wrong += count["wrong"]
            seconds = time.monotonic() - begun
            print(
                f"{name}: {count['files']} files, {count['refused']} refused, "
                f"{count['wrong']} wrong, {seconds:.1f} s",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
