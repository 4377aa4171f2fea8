"""GPUs by their published figures, and predictions from these for a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from .disassembly import Hot

WARP = 32
ISSUE = 4  # warp instructions a multiprocessor and clock: one from each of its four schedulers


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: int
    bandwidth: float  # bytes/s
    multiprocessors: int
    clock: float  # Hz, boost


# NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (HGX).
GPUS = (
    Gpu("A100", 80, 2.039e12, 108, 1.41e9),
    Gpu("H100", 90, 3.35e12, 132, 1.98e9),
    Gpu("H200", 90, 4.8e12, 132, 1.98e9),
    Gpu("B200", 100, 8.0e12, 148, 1.965e9),
)

# Results a multiprocessor and clock. sm_80 and sm_90: the table of the throughput of native
# arithmetic instructions in the CUDA C++ Programming Guide; load/store units: the architectures'
# white papers. sm_100: units of a B200's multiprocessor as the Cornell Virtual Workshop counts
# them (128 FP32, 128 INT32, 64 FP64, 32 load/store), and for the others the
# rates of sm_90. The pipes are independent of each other, except for those that `cycles` adds up.
RATES = {
    80: {"fp32": 64, "alu": 64, "imad": 64, "fp64": 32, "mufu": 16, "conversion": 16, "lsu": 32},
    90: {"fp32": 128, "alu": 64, "imad": 64, "fp64": 64, "mufu": 16, "conversion": 64, "lsu": 32},
    100: {"fp32": 128, "alu": 128, "imad": 64, "fp64": 64, "mufu": 16, "conversion": 64, "lsu": 32},
}


@dataclass(frozen=True)
class Limits:
    """The limits of a multiprocessor: CUDA C++ Programming Guide, technical specifications."""

    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared: int = 228 * 1024  # bytes
    reserved: int = 1024  # bytes of shared memory that the system takes for a block


LIMITS = {80: Limits(shared=164 * 1024), 90: Limits(), 100: Limits()}


def occupancy(architecture: int, registers: int, threads: int, shared: int) -> tuple[int, str]:
    """Returns the resident threads in percent of a multiprocessor's, and what limits them. `shared`
    is in bytes a block."""
    limits = LIMITS[architecture]
    warps = -(-threads // WARP)
    a_warp = -(-registers * WARP // 256) * 256  # registers are handed out by 256
    blocks = {
        "registers": limits.registers // (a_warp * warps) if registers else limits.blocks,
        "shared": limits.shared // (shared + limits.reserved),
        "threads": limits.threads // (warps * WARP),
        "blocks": limits.blocks,
    }
    # Where several limit alike, the one is named that a kernel can change least.
    limit = min(reversed(blocks), key=blocks.__getitem__)
    return 100 * min(blocks[limit] * threads, limits.threads) // limits.threads, limit


def cycles(architecture: int, pipes: dict[str, int]) -> tuple[float, str]:
    """Clocks that a multiprocessor needs for one warp's trip, and the units that take so long."""
    rates = RATES[architecture]
    # Integer multiply-adds go through units that FP32 shares.
    floats = pipes.get("fp32", 0) + pipes.get("imad", 0)
    needed = {"issue": sum(pipes.values()) / ISSUE, "fp32": floats * WARP / rates["fp32"]}
    for pipe in ("alu", "imad", "fp64", "mufu", "conversion", "lsu"):
        needed[pipe] = pipes.get(pipe, 0) * WARP / rates[pipe]
    longest = max(needed, key=needed.__getitem__)
    return needed[longest], longest


def share_of_bandwidth(gpu: Gpu, hot: Hot) -> tuple[float, str]:
    """Returns the clocks for a trip's bytes over those for its instructions, and the units that
    take longest. A kernel at 1 or more is bound by bytes; one below is bound by instructions, at
    that share of the bandwidth."""
    bytes_a_clock = gpu.bandwidth / gpu.multiprocessors / gpu.clock
    needed, pipe = cycles(gpu.architecture, hot.pipes)
    return hot.bytes * WARP / bytes_a_clock / needed, pipe
