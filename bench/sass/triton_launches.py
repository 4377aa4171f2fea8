"""Compiles every Triton kernel ahead of time for a GPU that is not there, as the launchers call it.

The public functions are called on CPU tensors while Triton is told that a GPU of the asked
architecture is current: each launch compiles the kernel with the very signature, constants and
warps that it would run with there, and runs nothing. So there is no list of signatures that
could go stale: triton_calls.py lists calls. This is a program of its own, since the process that
imports it may have TRITON_INTERPRET set:

    python triton_launches.py ARCHITECTURE DIRECTORY [--cases] [OP ...]

writes a cubin for each kernel into the directory and prints a JSON line that describes it. With
--cases an op's large cases (reg_kernels/cases) are called as well.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

OPS = sorted(p.stem for p in Path(__file__).parents[2].glob("reg_kernels/triton/[!_]*.py"))
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # what the launchers are told


class _Gpu:
    """The driver of a GPU that compiles and does nothing else."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def main(architecture: int, directory: Path, cases: bool, ops: list[str]) -> None:
    """Compiles what the calls launch, and prints each kernel of an op only once."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from bench.sass import triton_calls
    from reg_kernels import backends
    from reg_kernels.triton import _launch

    # The launchers then take CPU tensors, as for the interpreter, but compile for a GPU.
    backends.triton_interpreted = lambda: True
    _launch.processors = lambda x: MULTIPROCESSORS[architecture]
    driver.set_active(_Gpu(architecture))
    run, launched = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    JITFunction.run = compile_only
    seen = set()
    for op, dtype in itertools.product(ops or OPS, backends.DTYPES):
        if cases:
            calls = triton_calls.some_calls(op, dtype, architecture)
        elif dtype in (torch.float32, torch.bfloat16):
            calls = triton_calls.calls(op, dtype)
        else:
            continue
        for name, call in calls:
            launched.clear()
            call()
            for kernel in launched:
                if (op, kernel.hash) in seen:
                    continue
                seen.add((op, kernel.hash))
                path = directory / f"{kernel.hash}.cubin"
                fresh = path.with_suffix(f".{os.getpid()}")  # another process may read it
                fresh.write_bytes(kernel.asm["cubin"])
                fresh.replace(path)
                facts = {
                    "kernel": kernel.metadata.name,
                    "variant": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "op": op,
                    "threads": 32 * kernel.metadata.num_warps,
                    "shared": kernel.metadata.shared,
                    "cubin": str(path),
                }
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(Path(sys.argv[2]) / "cache")
    of_cases = sys.argv[3:4] == ["--cases"]
    main(int(sys.argv[1]), Path(sys.argv[2]), of_cases, sys.argv[3 + of_cases :])
