"""Compiles every Triton kernel ahead of time for a GPU that is not there, as the launchers call it.

The public functions are called on CPU tensors while Triton is told that a GPU of the asked
architecture is current: each launch compiles the kernel with the very signature, constants and
warps that it would run with there, and runs nothing. So there is no list of signatures that
could go stale: triton_calls.py lists calls. This is a program of its own, since the process that
imports it may have TRITON_INTERPRET set:

    python triton_launches.py compile ARCHITECTURE DIRECTORY [--cases] [OP ...]

writes a cubin for each kernel into the directory and prints a JSON line that describes it. With
--cases an op's large cases (reg_kernels/cases) are called as well.

    python triton_launches.py digests

compiles nothing, and prints for each op a digest of all that these calls would compile.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
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


def pretend(architecture: int) -> None:
    """From here on launchers take CPU tensors, as for the interpreter, but launch for this GPU."""
    from triton.runtime import driver

    from reg_kernels import backends
    from reg_kernels.triton import _launch

    backends.triton_interpreted = lambda: True
    _launch.processors = lambda x: MULTIPROCESSORS[architecture]
    driver.set_active(_Gpu(architecture))


def calls(op: str, architecture: int, cases: bool) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The dtype, the name and the call of each launch, or launches, of an op."""
    import torch

    from bench.sass import triton_calls
    from reg_kernels.backends import DTYPES

    for dtype in DTYPES:
        if cases:
            of_dtype = triton_calls.some_calls(op, dtype, architecture)
        elif dtype in (torch.float32, torch.bfloat16):
            of_dtype = list(triton_calls.calls(op, dtype))
        else:
            continue
        for name, call in of_dtype:
            yield str(dtype).removeprefix("torch."), name, call


def compile_launches(architecture: int, directory: Path, cases: bool, ops: list[str]) -> None:
    """Compiles what the calls launch, and prints each kernel of an op only once."""
    from triton.runtime.jit import JITFunction

    pretend(architecture)
    run, launched = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    JITFunction.run = compile_only
    for op in ops or OPS:
        seen = set()
        for dtype, name, call in calls(op, architecture, cases):
            launched.clear()
            call()
            for kernel in launched:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                path = directory / f"{kernel.hash}.cubin"
                fresh = path.with_suffix(f".{os.getpid()}")  # another process may read it
                fresh.write_bytes(kernel.asm["cubin"])
                fresh.replace(path)
                facts = {
                    "kernel": kernel.metadata.name,
                    "variant": name,
                    "dtype": dtype,
                    "op": op,
                    "threads": 32 * kernel.metadata.num_warps,
                    "shared": kernel.metadata.shared,
                    "cubin": str(path),
                }
                print(json.dumps(facts), flush=True)


def print_digests() -> None:
    """Prints a digest for each op: of each call, and of all that Triton goes by when it compiles
    what the call launches, but for Triton's version."""
    from triton.runtime.jit import JITFunction

    launched = []

    def compile_nothing(self: Any, key: str, *others: Any) -> None:
        launched.append(f"{self.cache_key} {key}")

    JITFunction._do_compile = compile_nothing
    digests = {}
    for op in OPS:
        digest = hashlib.sha256()
        for architecture in MULTIPROCESSORS:
            pretend(architecture)
            for cases in (False, True):
                for dtype, name, call in calls(op, architecture, cases):
                    launched.clear()
                    call()
                    digest.update(f"{architecture} {dtype} {name}: {launched}\n".encode())
        digests[op] = digest.hexdigest()
    print(json.dumps(digests))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    if sys.argv[1] == "digests":
        print_digests()
    else:
        _, _, sm, folder, *rest = sys.argv
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        of_cases = rest[:1] == ["--cases"]
        compile_launches(int(sm), Path(folder), of_cases, rest[of_cases:])
