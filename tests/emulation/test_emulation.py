"""Every CUDA kernel runs on the CPU, under ASan and UBSan, against a scalar reference.

An op's kernels are csrc/cuda/<op>.cuh, and tests/emulation/<op>.cpp runs them. Those of a family,
<family>.cuh, are run once for each of its ops, csrc/include/reg_kernels/<family>/<op>.h, and once
for each op in tests/emulation/<family>, which use what none of the others does.
"""

import re

import pytest

import toolchain

HEADERS = toolchain.CSRC / "include" / "reg_kernels"
# A family's program runs its loops for the CPU as well, as they are for this one.
LOOPS = ("-march=native", "-fopenmp-simd", "-ffp-contract=off", "-Wno-maybe-uninitialized")
OPS = {}  # -> its program's source and flags
for kernels in sorted((toolchain.CSRC / "cuda").glob("*.cuh")):
    program = toolchain.HERE / f"{kernels.stem}.cpp"
    if family := sorted((HEADERS / kernels.stem).glob("*.h")):
        family += sorted((toolchain.HERE / kernels.stem).glob("*.h"))
        OPS |= {op.stem: (program, *LOOPS, "-include", str(op)) for op in family}
    else:
        OPS[kernels.stem] = (program,)
PROGRAMS = {
    # The emulation itself, with both ways to switch stacks: this CPU's, and that of any other.
    "cuda_on_cpu": (toolchain.HERE / "cuda_on_cpu.cpp",),
    "cuda_on_cpu, ucontext": (toolchain.HERE / "cuda_on_cpu.cpp", "-DCUDA_ON_CPU_UCONTEXT"),
    **OPS,
}


@pytest.fixture(scope="module")
def programs(request):
    """{name: future of the program} for the tests that were selected."""
    selected = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.function is test_passes
    }
    futures = toolchain.compile_programs([PROGRAMS[name] for name in selected])
    return dict(zip(selected, futures, strict=True))


def test_there_are_kernels():
    assert OPS


@pytest.mark.parametrize("op", OPS)
def test_has_a_program(op):
    program = PROGRAMS[op][0]
    assert program.exists(), f"no {program} runs csrc/cuda/{program.stem}.cuh"


# An op's program launches each kernel so often that one run shows it in every order; what each of
# the others finds alone, test_planted.py knows.
RUNS = [
    (name, order)
    for name, (source, *_) in PROGRAMS.items()
    for order in toolchain.ORDERS
    if source.exists() and (order == "mixed") == (name in OPS)
]


@pytest.mark.parametrize(("name", "order"), RUNS)
def test_passes(name, order, programs):
    result = toolchain.run_program(programs[name].result(), order)
    assert result.code == 0, str(result)
    closing = re.search(r"^(\d+) comparisons, 0 failed$", result.output, re.MULTILINE)
    assert closing and int(closing[1]) > 0, str(result)
