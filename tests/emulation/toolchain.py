"""Compiles and runs the programs of this directory, and CUDA sources on machines with no GPU."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.sass import compiling, table
from bench.sass.compiling import CSRC, CUDA_ARCHITECTURES, CUDA_SOURCES, Missing, run  # noqa: F401

HERE = Path(__file__).parent.resolve()

ORDERS = ("forward", "reversed", "mixed")

INCLUDES = [*compiling.INCLUDES, f"-I{HERE}"]
CXX_FLAGS = [
    *("-std=c++20", "-Wall", "-Wextra", "-Werror", "-DRK_CUDA_ON_CPU"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    # Null pointers are ASan's to find, and nothing here has a virtual table: a fifth of the time.
    "-fno-sanitize=null,object-size,vptr",
    # Compiling takes longer than running: -O1 with all of -g takes more than twice the time, -O0
    # halves it once more and takes twice as long to run. Backtraces need lines, not variables.
    *("-Og", "-g1"),
]


def skip_without(function):
    """A test of what is missing here is skipped."""

    @functools.wraps(function)
    def wrapped(*arguments):
        try:
            return function(*arguments)
        except Missing as missing:
            pytest.skip(str(missing))

    return wrapped


@skip_without
def gxx():
    return compiling.compiler("CXX", "g++")


def compile_program(source, *flags):
    """The program made of a .cpp file, sanitizers included."""
    target, result = compiling.compile_once(gxx(), [*CXX_FLAGS, *flags, *INCLUDES], source, ".exe")
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
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


@skip_without
def compile_cuda(source, *flags):
    """What nvcc and ptxas said of a .cu file, for every architecture, warnings as errors."""
    return compiling.compile_cuda(source, *flags)[1]


@skip_without
def skip_if_compiled_for(report, source):
    """Skips what `make sass-report` has compiled, as minutes of nvcc would give the same again."""
    if table.is_current(report, source):
        pytest.skip(f"{source.name} and nvcc are those that bench/results/sass.json was made with")


@skip_without
def torch_flags():
    return compiling.torch_flags()
