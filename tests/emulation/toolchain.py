"""Compiles and runs the programs of this directory, and CUDA sources on machines with no GPU."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
ORDERS = ("forward", "reversed")

INCLUDES = [f"-I{CSRC / 'include'}", f"-I{CSRC}", f"-I{HERE}"]
CXX_FLAGS = [
    *("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DRK_CUDA_ON_CPU"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "-fno-var-tracking",  # backtraces need lines, not variables: a third of the compile time
]
CUDA_ARCHITECTURES = (80, 90, 100)
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--threads", "2"),
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES),
    # Registers spilled, or anything else that lives in local memory, is an error.
    *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"),
    *("-Xcompiler", "-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas"),
]
COMPILE_SECONDS = 300
RUN_SECONDS = 60


@dataclass(frozen=True)
class Result:
    code: int
    output: str  # stdout and stderr together

    def __str__(self):
        return f"exit code {self.code}\n{self.output}"


def run(command, seconds, **environment):
    """Runs a command; one that outlives its time is a failed test."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            env=os.environ | environment,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{command[0]} still ran after {seconds} s: {error.output}")
    return Result(done.returncode, done.stdout)


@functools.cache
def compiler(variable, default):
    """Path and version of a compiler; without one the test is skipped."""
    name = os.environ.get(variable, default)
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} was not found: install it, or name another one in {variable}")
    return path, run([path, "--version"], 60).output


def gxx():
    return compiler("CXX", "g++")


def nvcc():
    return compiler("NVCC", "nvcc")


def digest(*parts):
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def digest_of_files(dependencies):
    """Of the contents of all that a compiler's dependency file names."""
    rule = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1]
    paths = [Path(word.replace("\\ ", " ")) for word in re.split(r"(?<!\\)\s+", rule.strip())]
    contents = [path.read_bytes() if path.exists() else b"" for path in paths]
    return digest(*paths, *contents)


def compile_once(toolchain, flags, source, suffix):
    """The file that a compiler makes of `source`, and what it said. Made anew when the command, the
    compiler or any file that it read has changed; a failure is never remembered."""
    path, version = toolchain
    command = [path, *flags, source]
    target = BUILD / f"{source.stem}-{digest(version, *command)[:16]}{suffix}"
    dependencies, stamp = target.with_suffix(".d"), target.with_suffix(".stamp")
    if target.exists() and stamp.exists() and stamp.read_text() == digest_of_files(dependencies):
        return target, Result(0, "")
    BUILD.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    # Moved into place when whole: another process may be building the same.
    fresh = target.with_suffix(f".{os.getpid()}.new")
    result = run([*command, "-MMD", "-MF", dependencies, "-o", fresh], COMPILE_SECONDS)
    if result.code == 0:
        fresh.replace(target)
        stamp.write_text(digest_of_files(dependencies))
    return target, result


def compile_program(source, *flags):
    """The program made of a .cpp file, sanitizers included."""
    target, result = compile_once(gxx(), [*CXX_FLAGS, *flags, *INCLUDES], source, ".exe")
    assert result.code == 0, f"{source.name} does not compile: {result}"
    return target


def compile_programs(requests):
    """A future of the program for each (source, *flags), made side by side."""
    gxx()  # skips here, not in a thread
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        return [pool.submit(compile_program, *request) for request in requests]


def run_program(program, *arguments):
    # Leaks are not looked for: nothing here runs long, and the search fails under a debugger.
    return run(
        [program, *arguments],
        RUN_SECONDS,
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


def compile_cuda(source, *flags):
    """What nvcc and ptxas said of a .cu file, for every architecture, warnings as errors."""
    return compile_once(nvcc(), [*NVCC_FLAGS, *flags, *INCLUDES, "-c"], source, ".o")[1]
