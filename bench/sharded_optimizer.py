"""A step of AdamW on DTensors beside torch's on the same: `python -m bench.sharded_optimizer`.

Two processes of one thread each are the ranks of a gloo group, and hold the shards of dimension 0.
The contenders run interleaved, a sample of each in every round, and start each sample together; a
sample is of rank 0's clock, until its own step has ended. What they make of the parameters is
compared first. "norm" clips by the norm of all gradients: ours by `max_grad_norm`, torch's by
`clip_grad_norm_` before the step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from reg_kernels import optim

LISTS = {
    "1 of 1024 x 1024": [(1024, 1024)],
    "100 of 64 x 64": [(64, 64)] * 100,
    "400 of 64": [(64,)] * 400,
    "a transformer block of width 512": [
        *((512,), (512,), (1536, 512), (1536,), (512, 512), (512,)),
        *((512,), (512,), (2048, 512), (2048,), (512, 2048), (512,)),
    ],
}
MAX_NORM = 1.0

Step = Callable[[], Any]


def _made(shapes: list[tuple[int, ...]], kind: str, norm: bool) -> tuple[list[Any], Step]:
    """Parameters with gradients, and what steps them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(1)

    def placed(shape: tuple[int, ...]) -> Any:
        x = torch.randn(shape, generator=generator)
        return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)

    params = [nn.Parameter(placed(shape)) for shape in shapes]
    for p in params:
        p.grad = placed(tuple(p.shape))
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
    if kind == "ours":
        ours = optim.AdamW(params, max_grad_norm=MAX_NORM if norm else None, **options)
        return params, ours.step
    theirs = torch.optim.AdamW(params, **{kind: True}, **options)

    def step() -> None:
        if norm:
            nn.utils.clip_grad_norm_(params, MAX_NORM)
        theirs.step()

    return params, step


def _measured(shapes: list[tuple[int, ...]], norm: bool, rounds: int) -> dict[str, list[float]]:
    kinds = ("ours", "fused", "foreach")
    made = {kind: _made(shapes, kind, norm) for kind in kinds}
    for _ in range(3):
        for _, step in made.values():
            step()
    for kind in kinds[1:]:
        for own, theirs in zip(made["ours"][0], made[kind][0], strict=True):
            torch.testing.assert_close(own.to_local(), theirs.to_local(), rtol=1e-4, atol=1e-5)
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds):
        for i in range(len(kinds)):
            kind = kinds[(turn + i) % len(kinds)]
            dist.barrier()
            begin = time.perf_counter()
            made[kind][1]()
            samples[kind].append(time.perf_counter() - begin)
    return samples


def _rank(rank: int, store: str, size: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if rank == 0:
        print("| tensors | norm | ours, ms | fused=True, ms | foreach, ms | fused / ours |")
        print("|---|---|---|---|---|---|")
    for name, shapes in LISTS.items():
        for norm in (False, True):
            samples = _measured(shapes, norm, rounds)
            if rank == 0:
                medians = [f"{statistics.median(x) * 1e3:.3f}" for x in samples.values()]
                pairs = zip(samples["fused"], samples["ours"], strict=True)
                ratio = statistics.median(theirs / ours for theirs, ours in pairs)
                cells = (name, "yes" if norm else "no", *medians, f"{ratio:.2f}")
                print("| " + " | ".join(cells) + " |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), options.ranks, options.rounds)
        torch.multiprocessing.spawn(_rank, arguments, options.ranks)


if __name__ == "__main__":
    main()
