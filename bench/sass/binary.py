"""Takes objects and cubins apart with the tools that come with Triton: disassembly, registers,
stack, shared memory and launch bounds of each kernel."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .compiling import Missing
from .disassembly import Instruction, functions

_USAGE = re.compile(r"Function ([\w$]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_BOUNDS = 0x05, 0x10  # EIATTR_MAX_THREADS, EIATTR_REQNTID: three words, x y z
_WITH_SIZE = 4  # the format of an attribute: a size follows, and then so many bytes


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    architecture: int
    registers: int
    stack: int  # bytes a thread: spilled registers, and values that need an address
    shared: int  # bytes, static
    threads: int  # the most of a block, by its launch bounds
    code: list[tuple[str, Instruction | None]]


def tool(name: str) -> Path:
    """cuobjdump, nvdisasm: Triton's, or one on PATH."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return path
    if (found := shutil.which(name)) is None:
        raise Missing(f"{name} was not found: pip install triton, or put a CUDA toolkit on PATH")
    return Path(found)


def _output(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")
    return done.stdout


def resources(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """(registers, stack bytes, static shared bytes) of each kernel by its mangled name."""
    text = _output(tool("cuobjdump"), "-res-usage", cubin)
    return {name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(text)}


def threads_of(image: bytes) -> dict[str, int]:
    """The most threads of a block, for each kernel of a cubin that has launch bounds."""
    start, entry, count, names = struct.unpack_from("<Q10xHHH", image, 40)
    sections = [struct.unpack_from("<IIQQQQ", image, start + i * entry) for i in range(count)]
    strings = sections[names][4]
    result = {}
    for name_at, _, _, _, offset, size in sections:
        name = image[strings + name_at : image.index(b"\0", strings + name_at)].decode()
        if not name.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + size:
            form, attribute, length = struct.unpack_from("<BBH", image, at)
            at += 4
            if form == _WITH_SIZE:
                if attribute in _BOUNDS:
                    x, y, z = struct.unpack_from("<III", image, at)
                    result[name.removeprefix(".nv.info.")] = x * y * z
                at += length
    return result


def kernels(cubin: Path) -> Iterator[Kernel]:
    """The kernels in a cubin, without the functions that they call."""
    text = _output(tool("nvdisasm"), "-c", cubin)
    architecture = int(re.search(r"(?:\.target\s+sm_|EF_CUDA_SM)(\d+)", text)[1])
    used, threads = resources(cubin), threads_of(cubin.read_bytes())
    for name, code in functions(text):
        if name in used:
            yield Kernel(name, architecture, *used[name], threads.get(name, 1024), code)


def kernels_of_object(path: Path) -> Iterator[Kernel]:
    """The kernels of every cubin in an object of nvcc, which may hold several architectures."""
    with tempfile.TemporaryDirectory() as folder:
        _output(tool("cuobjdump"), "-xelf", "all", path.resolve(), cwd=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            yield from kernels(cubin)


def demangled(names: list[str]) -> list[str]:
    """Names as the sources have them, without arguments and our own namespaces."""
    filter_ = shutil.which("c++filt")
    if filter_ is None:
        raise Missing("c++filt was not found: install binutils")
    done = subprocess.run([filter_], input="\n".join(names), capture_output=True, text=True)
    return [_short(name) for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    """`void a::b::f<(a::E)0, T>(X)` as `f<0, T>`."""
    name = re.sub(r"\((?:\w+::)+\w+\)(-?\d+)", r"\1", name)
    name = name.split("(")[0].removeprefix("void ")
    head, bracket, arguments = name.partition("<")
    return head.split("::")[-1] + bracket + re.sub(r"(\w+::)+", "", arguments)
