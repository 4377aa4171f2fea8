"""A step of AdamW on DTensors beside torch's on the same: `python -m bench.sharded_optimizer`.

The ranks (`ranks.py`) hold the shards of dimension 0. What the contenders make of the parameters is
compared first. "norm" clips by the norm of all gradients: ours by `max_grad_norm`, torch's by
`clip_grad_norm_` before the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from reg_kernels import optim

from . import ranks

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
    return ranks.sampled({kind: step for kind, (_, step) in made.items()}, rounds)


def measure(rounds: int) -> None:
    """Prints a table."""
    heads = ("ours, ms", "fused=True, ms", "foreach, ms", "fused / ours")
    ranks.print_head("tensors", "norm", *heads)
    for name, shapes in LISTS.items():
        for norm in (False, True):
            samples = _measured(shapes, norm, rounds)
            ranks.print_row((name, "yes" if norm else "no"), samples, "fused")


if __name__ == "__main__":
    ranks.run(measure, __doc__, rounds=100)
