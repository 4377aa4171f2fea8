"""Compiles a source only if something that goes into it has changed. The tests of the CUDA sources
and the report on their machine code share the results."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from .. import watchdog

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"


def _cuda_sources():
    """The CUDA sources. That of a family, <family>.cu, comes once for each op of the family and
    includes the op's header first, as setup.py compiles it."""
    for source in (CSRC / "cuda").glob("*.cu"):
        ops = list((CSRC / "include" / "reg_kernels" / source.stem).glob("*.h"))
        for op in ops:
            path = BUILD / "sources" / f"{op.stem}.cu"
            path.parent.mkdir(parents=True, exist_ok=True)
            header = op.relative_to(CSRC / "include")
            path.write_text(f'#include "{header}"\n#include "cuda/{source.name}"\n')
            yield path
        if not ops:
            yield source


CUDA_SOURCES = sorted(_cuda_sources(), key=lambda path: path.stem)

INCLUDES = [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
CUDA_ARCHITECTURES = (80, 90, 100)
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--threads", "2"),
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES),
    # Registers spilled, or anything else that lives in local memory, is an error.
    *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"),
    *("-Xcompiler", "-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas"),
]


class Missing(Exception):
    """A tool that is not installed here; says which, and what to do."""


@dataclass(frozen=True)
class Result:
    code: int
    output: str  # stdout and stderr together

    def __str__(self):
        return f"exit code {self.code}\n{self.output}"


def run(command, **environment):
    """Runs a command; one that never ends is a TimeoutError."""
    done = watchdog.run(command, together=True, env=os.environ | environment)
    return Result(done.returncode, done.stdout)


@functools.cache
def compiler(variable, default):
    """Path and version of a compiler."""
    name = os.environ.get(variable, default)
    path = shutil.which(name)
    if path is None:
        raise Missing(f"{name} was not found: install it, or name another one in {variable}")
    return path, run([path, "--version"]).output


def torch_flags():
    """As setup.py sets them. A CPU build of torch has all the headers that are needed."""
    torch = importlib.util.find_spec("torch")  # not imported: that takes seconds
    if torch is None:
        raise Missing("torch, whose headers the CUDA sources include, is not installed")
    include = Path(torch.origin).parent / "include"
    return ["-isystem", str(include), "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]


def digest(*parts):
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def digest_of_files(dependencies):
    """A digest of the contents of all files that a compiler's dependency file names."""
    rule = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1]
    paths = [Path(word.replace("\\ ", " ")) for word in re.split(r"(?<!\\)\s+", rule.strip())]
    contents = [path.read_bytes() if path.exists() else b"" for path in paths]
    return digest(*paths, *contents)


def digest_of_source(source, folders=(CSRC / "include", CSRC)):
    """A digest of all that decides what a CUDA source compiles to, except nvcc: the flags, torch,
    and our files that it includes, even those that a condition leaves out."""
    texts = {}

    def read(path):
        if path in texts:
            return
        texts[path] = path.read_text()
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', texts[path], re.MULTILINE):
            found = [folder / name for folder in (path.parent, *folders)]
            for included in [each.resolve() for each in found if each.is_file()][:1]:
                read(included)

    read(source)
    torch = importlib.metadata.version("torch").split("+")[0]
    files = (f"{os.path.relpath(path, folders[-1])}\0{texts[path]}" for path in sorted(texts))
    return digest(*NVCC_FLAGS, torch, *files)


def compile_once(toolchain, flags, source, suffix):
    """Returns the file that a compiler makes of `source`, and its output. The file is made anew
    when the command, the compiler or any file that it read has changed. A failure is never
    remembered. If another process is making the same file, this one waits for it."""
    path, version = toolchain
    command = [path, *flags, source]
    target = BUILD / f"{source.stem}-{digest(version, *command)[:16]}{suffix}"
    dependencies, stamp = target.with_suffix(".d"), target.with_suffix(".stamp")
    BUILD.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = stamp.read_text() if target.exists() and stamp.exists() else None
        if known is not None and known == digest_of_files(dependencies):
            return target, Result(0, "")
        stamp.unlink(missing_ok=True)
        fresh = target.with_suffix(".new")  # moved into place when whole
        result = run([*command, "-MMD", "-MF", dependencies, "-o", fresh])
        if result.code == 0:
            fresh.replace(target)
            stamp.write_text(digest_of_files(dependencies))
        return target, result


def compile_cuda(source, *flags):
    """Returns the object made of a .cu file for every architecture, and what nvcc and ptxas print.
    Warnings are errors."""
    return compile_once(
        compiler("NVCC", "nvcc"), [*NVCC_FLAGS, *flags, *INCLUDES, "-c"], source, ".o"
    )
