"""Compiles every Triton kernel ahead of time for a GPU that is not there, as the launchers call it.

The public functions are called on CPU tensors while Triton is told that a GPU of the asked
architecture is current: each launch compiles the kernel with the very signature, constants and
warps that it would run with there, and runs nothing. So no list of signatures can go stale; the
list below is one of calls. A program of its own, since the importing process may have
TRITON_INTERPRET set:

    python triton_launches.py ARCHITECTURE DIRECTORY [OP ...]

writes a cubin for each kernel into the directory and prints a JSON line that describes it. With
"cases" before the ops the calls are the cases of reg_kernels/cases that are too large for an
interpreter.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BACKEND = "triton"
OPS = ("dropout", "penalty", "optimizer_step", "mixup", "batch_norm", "losses")
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # as the launchers are told

Call = tuple[str, Callable[[], Any]]


def calls(op: str, dtype: Any) -> Iterator[Call]:
    """(what is called, the call) of one op on large inputs of one dtype."""
    import torch

    import reg_kernels.functional as F
    from reg_kernels import optim
    from reg_kernels._mixed_target import MixedTarget

    def values(*shape: int, last: bool = False) -> torch.Tensor:
        x = torch.zeros(shape, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return x.requires_grad_()

    def both(y: torch.Tensor) -> None:
        y.backward(torch.full_like(y, 0.5))  # not 1, which asks for no rescaling

    def capture() -> None:
        """What a step launches besides where its lr is on the device and a graph is captured."""
        from reg_kernels.triton import optimizer_step

        row = [0.0] * optimizer_step.NUMBERS
        optimizer_step._on_device([row], [0], torch.device("cpu"), capturing=True)

    images = (8, 64, 32, 32)
    if op == "dropout":
        yield "1d", lambda: F.dropout(values(2**16), backend=BACKEND)
        for last in (False, True):
            layout = "channels_last" if last else "contiguous"
            yield (
                f"2d {layout}",
                lambda last=last: F.dropout2d(values(*images, last=last), backend=BACKEND),
            )
    elif op == "penalty":
        yield "l1", lambda: both(F.l1_penalty([values(2**16)], backend=BACKEND))
        yield "l2", lambda: both(F.l2_penalty([values(2**16)], backend=BACKEND))
    elif op == "optimizer_step":
        for name, kind in (("adamw", optim.AdamW), ("sgdw", optim.SGDW)):

            def step(kind: Any = kind) -> None:
                parameter = torch.nn.Parameter(values(2**16).detach())
                parameter.grad = torch.zeros_like(parameter)
                momentum = {"momentum": 0.9} if kind is optim.SGDW else {}
                kind([parameter], lr=0.1, **momentum, backend=BACKEND).step()

            yield name, step
        yield "capture", capture
    elif op == "mixup":
        index = torch.arange(8).roll(1)
        for last in (False, True):
            layout = "channels_last" if last else "contiguous"
            yield (
                f"mixup {layout}",
                lambda last=last: both(
                    F.mixup(values(*images, last=last), torch.rand(8), index, backend=BACKEND)
                ),
            )
        to_last = torch.channels_last
        yield (
            "mixup contiguous to channels_last",
            lambda: both(
                F.mixup(
                    values(*images), torch.rand(8), index, memory_format=to_last, backend=BACKEND
                )
            ),
        )
        yield (
            "mixup in place",
            lambda: F.mixup(
                values(*images).detach(), torch.rand(8), index, inplace=True, backend=BACKEND
            ),
        )
    elif op == "batch_norm":
        small, large = (32, 64, 16, 16), (64, 64, 56, 56)
        for shape, last, training in (
            (small, False, True),
            (large, False, True),
            (large, True, True),
            (large, False, False),
        ):

            def norm(shape: Any = shape, last: bool = last, training: bool = training) -> None:
                zero, one = torch.zeros(64), torch.ones(64)
                weight = one.clone().requires_grad_()
                x = values(*shape, last=last)
                both(F.batch_norm(x, zero, one, weight, zero, training, backend=BACKEND))

            layout = "channels_last" if last else "contiguous"
            size = "small" if shape == small else "large"
            yield f"{'training' if training else 'inference'} {size} {layout}", norm
    else:
        labels = {n: torch.zeros(n, dtype=torch.int64) for n in (256, 8)}

        def of_each(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
            """The loss of each row, whose gradient is made in the backward."""
            options = {"reduction": "none", "backend": BACKEND}
            if name == "cross_entropy":
                return lambda x: F.cross_entropy(x, labels[256], **options)
            return lambda x: F.distillation_loss(x, x.detach(), labels[256], **options)

        for name, loss in (
            ("cross_entropy", lambda x, y: F.cross_entropy(x, y, backend=BACKEND)),
            ("distillation", lambda x, y: F.distillation_loss(x, x.detach(), y, backend=BACKEND)),
        ):
            for classes in (1000, 32000):
                yield (
                    f"{name} {classes} classes",
                    lambda loss=loss, classes=classes: both(
                        loss(values(256, classes), labels[256])
                    ),
                )
            yield (
                f"{name} of each",
                lambda name=name: both(of_each(name)(values(256, 1000))),
            )
            yield (
                f"{name} planes",
                lambda loss=loss: both(
                    loss(values(8, 64, 32, 32), torch.zeros(8, 32, 32, dtype=torch.int64))
                ),
            )
        pair = MixedTarget(labels[256], labels[256], torch.rand(256), 0.1)
        yield (
            "cross_entropy mixed",
            lambda: both(F.cross_entropy(values(256, 1000), pair, backend=BACKEND)),
        )


def calls_of_cases(op: str, dtype: Any) -> Iterator[Call]:
    """Those of the large cases of an op's file, with their gradients; each in every other dtype."""
    import torch

    from reg_kernels import backends
    from reg_kernels.cases import all_cases

    def run(case: Any) -> None:
        inputs = case.inputs(torch.device("cpu"), dtype)
        leaves = [x.requires_grad_(case.differentiable) for x in inputs]
        y = case.function(*leaves, backend=BACKEND)
        if y.requires_grad:
            y.backward(torch.full_like(y, 0.5))

    cases = [c for c in all_cases() if not c.small and re.fullmatch(_FAMILY.format(op), c.op)]
    for case in cases[backends.DTYPES.index(dtype) % 2 :: 2]:
        yield f"{case.op}[{case.name}]", lambda case=case: run(case)


_FAMILY = "(feature_)?{}(_|_inference|_backward)?"


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


def main(architecture: int, directory: Path, ops: list[str]) -> None:
    """Compiles what the calls launch; each kernel that comes out the same is written once."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from reg_kernels import backends
    from reg_kernels.triton import _launch

    # The launchers then take CPU tensors, as they do for the interpreter, but for a GPU.
    backends.triton_interpreted = lambda: True
    _launch.processors = lambda x: MULTIPROCESSORS[architecture]
    driver.set_active(_Gpu(architecture))
    run, launched = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    JITFunction.run = compile_only
    seen = set()
    of_cases, dtypes = ops[:1] == ["cases"], (torch.float32, torch.bfloat16)
    if of_cases:
        ops, dtypes = ops[1:], backends.DTYPES
    for op, dtype in itertools.product(ops or OPS, dtypes):
        for name, call in (calls_of_cases if of_cases else calls)(op, dtype):
            launched.clear()
            call()
            for kernel in launched:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                path = directory / f"{kernel.hash}.cubin"
                path.write_bytes(kernel.asm["cubin"])
                path.with_suffix(".ptx").write_text(kernel.asm["ptx"])
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
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
