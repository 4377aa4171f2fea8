"""The loops of the CPU kernels under ThreadSanitizer: threads that take parts of the same work, as
torch's do, touch no place that another one writes.

The programs of tests/emulation/isas/ and the loops are built for the instruction set with the least
code of its own: the sanitizer sees what the compiler makes of plain loads and stores, not what
instructions by hand do.
"""

import os
import shutil

import pytest
from test_isas import ISAS, OPS

import setup
from bench.sass import compiling

import toolchain

# Instrumented, the compiler vectorises little and takes half the time at -O1.
FLAGS = (*setup.CXX_FLAGS, "-Werror", "-fsanitize=thread", "-O1", "-g1", *toolchain.INCLUDES)
SHORT = ("penalty", "subset", "dropout")  # to compile; the others take a minute together
# The kernel places libraries where this sanitizer of GCC 12 and older has its own memory.
AS_BEFORE = [path, "-R"] if (path := shutil.which("setarch")) else []


def object_of(source, *options):
    target, result = compiling.compile_once(toolchain.gxx(), [*FLAGS, *options, "-c"], source, ".o")
    assert result.code == 0, f"{source.name} does not compile: {result}"
    return target


def run_program(op, tmp_path, *options):
    """Runs the program that calls an op's leaves from threads."""
    compiler = toolchain.gxx()
    isas, _ = setup.instruction_sets(compiler[0])
    isa, flags = next(iter(isas.items()))
    source, of_op = OPS[op]
    objects = [
        object_of(source, *of_op, *flags, f"-DRK_ISA={isa}"),
        object_of(setup.CSRC / "cpu" / "isa.cpp", f"-DRK_BUILT_ISAS={isa}"),
        object_of(ISAS / source.name.replace(".simd", ""), *of_op, *options),
    ]
    program = tmp_path / op
    linked = toolchain.run([compiler[0], "-fsanitize=thread", *objects, "-o", program])
    if linked.code and "tsan" in linked.output:
        pytest.skip("the compiler comes without ThreadSanitizer")
    assert linked.code == 0, str(linked)
    return toolchain.run([*AS_BEFORE, program, isa], TSAN_OPTIONS="halt_on_error=1 exitcode=66")


@pytest.mark.parametrize("op", OPS)
def test_threads_that_share_the_work(op, tmp_path):
    if op not in SHORT and os.environ.get("REG_KERNELS_SANITIZE") != "1":
        pytest.skip("it takes a while to compile: make test-sanitized runs it")
    result = run_program(op, tmp_path)
    assert result.code == 0, str(result)[:4000]
    assert result.output.count("\n") > 50


def test_a_planted_race_is_found(tmp_path):
    """Parts that reach one element into the next one's."""
    result = run_program("subset", tmp_path, "-DRK_PLANT_RACE")
    assert result.code == 66
    assert "WARNING: ThreadSanitizer: data race" in result.output
