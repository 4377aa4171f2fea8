"""The CPU kernels of every instruction set write the same bits: those of this machine, and those of
64-bit Arm in an emulator.

tests/emulation/isas/<op>.cpp calls the leaves of csrc/cpu/<op>.simd.cpp. Linked with an instruction
set's objects it prints a digest of what each call writes; that of a family of ops, once for each.
"""

import functools
import shutil
import sys

import pytest
import torch

import setup
from bench.sass import compiling

import toolchain
from support import isas

ISAS = toolchain.HERE / "isas"
OPS = {
    name.split(".")[1]: (source, of_op)
    for source, name, of_op in setup.compilations("cpu", "*.simd.cpp")
}
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")
FLAGS = (*setup.CXX_FLAGS, "-Werror", *toolchain.INCLUDES)


def compile_object(compiler, source, *options):
    flags = [*FLAGS, *options, "-c"]
    target, result = compiling.compile_once(compiler, flags, source, ".o")
    assert result.code == 0, f"{source.name} does not compile: {result}"
    return target


def program_of(op, compiler, objects, folder, *options):
    """The program that calls an op's leaves, linked with the objects that have them."""
    source, of_op = OPS[op]
    source = ISAS / source.name.replace(".simd", "")
    calls = compile_object(compiler, source, *of_op, "-O1")
    program = folder / op
    result = toolchain.run([compiler[0], calls, *objects, "-o", program, *options])
    assert result.code == 0, str(result)
    return program


def digests(*command):
    result = toolchain.run(command)
    assert result.code == 0, str(result)
    return dict(line.rsplit(": ", 1) for line in result.output.splitlines())


@functools.cache
def objects_here(op):
    """What setup.py made of an op's loops, made again where that is out of date."""
    folder = setup.build_folder(torch)
    if not (folder / "build.ninja").exists():
        pytest.skip(f"{folder} has no objects: `make build` makes them")
    objects = [folder / f"cpu.{op}.simd.{isa}.o" for isa in isas()] + [folder / "cpu.isa.o"]
    result = toolchain.run([sys.executable, "-m", "ninja", "-f", folder / "build.ninja", *objects])
    assert result.code == 0, str(result)
    return objects


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A function: {call: digest} of an op's leaves for an instruction set of this machine."""

    @functools.cache
    def program(op):
        return program_of(op, toolchain.gxx(), objects_here(op), tmp_path_factory.mktemp(op))

    return functools.cache(lambda op, isa: digests(program(op), isa))


def check_same(actual, expected, isa):
    assert len(expected) > 50
    assert list(actual) == list(expected)
    differ = [call for call, digest in actual.items() if digest != expected[call]]
    assert not differ, f"{len(differ)} calls for {isa} wrote other bits:\n" + "\n".join(differ[:20])


@pytest.mark.skipif(not isas(), reason="the native library was not built")
@pytest.mark.parametrize("op", OPS)
def test_this_machine(op, here):
    best, *others = reversed(isas())
    if not others:
        pytest.skip(f"there is {best} alone")
    for isa in others:
        check_same(here(op, isa), here(op, best), isa)


@pytest.mark.skipif(not isas() or "neon" in isas(), reason="there are no kernels for x86")
@pytest.mark.parametrize("op", OPS)
def test_arm(op, here, tmp_path):
    if missing := [name for name in ARM if shutil.which(name) is None]:
        pytest.skip(
            f"{' and '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user"
        )
    compiler = compiling.compiler("CXX_AARCH64", ARM[0])
    (built,), note = setup.instruction_sets(compiler[0])
    assert (built, note) == ("neon", None)
    source, of_op = OPS[op]
    options = setup.ISA_FLAGS["__aarch64__"][built]
    objects = [
        compile_object(compiler, source, *of_op, *options, f"-DRK_ISA={built}"),
        compile_object(compiler, setup.CSRC / "cpu" / "isa.cpp", f"-DRK_BUILT_ISAS={built}"),
    ]
    program = program_of(op, compiler, objects, tmp_path, "-static")
    check_same(digests(ARM[1], program, built), here(op, isas()[-1]), built)
