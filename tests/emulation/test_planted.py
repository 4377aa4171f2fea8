"""Faults planted in kernels are found, and the same kernels without them pass.

-DPLANTED puts the faults in; a program compiled without it is the sound twin.
"""

import re

import pytest

import toolchain

PLANTED = toolchain.HERE / "planted"
SOURCE = PLANTED / "faults.cpp"


def at(operation, marker, occurrence=0):
    """How a report names a call on the line of faults.cpp that `marker` is a comment on."""
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1):
        if line.endswith(f"// {marker}"):
            column = [match.end() for match in re.finditer(operation, line)][occurrence] + 1
            return f"at {operation}, {SOURCE}:{number}:{column}"
    raise AssertionError(f"faults.cpp marks no {marker}")


# What is said of each fault, and in which orders it shows.
ALL = toolchain.ORDERS
FAULTS = {
    "global_out_of_bounds": (["AddressSanitizer: heap-buffer-overflow"], ALL),
    "shared_out_of_bounds": (["AddressSanitizer: heap-buffer-overflow"], ALL),
    "missing_barrier": (["FAILED element"], ("reversed", "mixed")),
    "skipped_shuffle": (
        [
            at("__shfl_xor_sync", "skipped_shuffle") + ", mask 0xffffffff: threads 32-39\n",
            ": threads 0-31 40-63\n",
        ],
        ALL,
    ),
    "shuffle_from_exited_lane": (["thread 19 reads lane 20, which takes no part"], ALL),
    "lane_outside_its_mask": (["thread 31 is not in its own mask 0x7fffffff"], ALL),
    "skipped_barrier": (
        [
            at("__syncthreads", "skipped_barrier, first") + ": threads 0-39\n",
            at("__syncthreads", "skipped_barrier, second") + ": threads 40-63\n",
        ],
        ALL,
    ),
    "barriers_on_one_line": (
        [
            at("__syncthreads", "barriers_on_one_line", 0) + ": threads 0-31\n",
            at("__syncthreads", "barriers_on_one_line", 1) + ": threads 32-63\n",
        ],
        ALL,
    ),
    "missing_grid_barrier": (["FAILED element"], ("reversed", "mixed")),
    "skipped_grid_barrier": (
        [
            "block (0, 0, 0) at __nanosleep, ",
            "block (0, 0, 0) at __syncthreads, ",
            "block (1, 0, 0) at __nanosleep, ",
        ],
        ALL,
    ),
    "blocks_not_together": (["deadlock: ", ") at __nanosleep, "], ALL),
    "missing_wait_for_copy": (["FAILED element 4 ", "FAILED element 12 "], ALL),
    "signed_overflow": (["runtime error: signed integer overflow: 65536 * 65536"], ALL),
}
CUDA_FAULTS = {
    "spill": "Registers are spilled to local memory",
    "local_memory": "Local memory used",
}


@pytest.fixture(scope="module")
def twins():
    """The programs without and with the faults."""
    futures = toolchain.compile_programs([(SOURCE,), (SOURCE, "-DPLANTED")])
    return [future.result() for future in futures]


@pytest.mark.parametrize("order", toolchain.ORDERS)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name, order, twins):
    sound, faulty = twins
    result = toolchain.run_program(sound, order, name)
    assert result.code == 0, str(result)

    messages, orders = FAULTS[name]
    result = toolchain.run_program(faulty, order, name)
    assert (result.code != 0) == (order in orders), str(result)
    if order in orders:
        for message in messages:
            assert message in result.output, str(result)


@pytest.mark.parametrize("name", CUDA_FAULTS)
def test_nvcc_finds_fault(name):
    source = PLANTED / f"{name}.cu"
    result = toolchain.compile_cuda(source)
    assert result.code == 0, str(result)
    result = toolchain.compile_cuda(source, "-DPLANTED")
    assert result.code != 0, str(result)
    assert CUDA_FAULTS[name] in result.output, str(result)
