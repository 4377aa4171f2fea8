"""How contenders are measured on ranks of a gloo group: processes of one thread each."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

# Called on each rank with the number of rounds.
Work = Callable[[int], None]


def run(work: Work, description: str | None, rounds: int) -> None:
    """The command of a benchmark: `work` on all ranks, with options for how many and how long."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds, help="samples of each contender")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (work, str(Path(folder) / "store"), options.ranks, options.rounds)
        torch.multiprocessing.spawn(_rank, arguments, options.ranks)


def _rank(rank: int, work: Work, store: str, size: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work(rounds)
    dist.destroy_process_group()


def sampled(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's calls. They take turns, so that whatever else the machine does
    falls on all; the ranks start a call together, and it ends with the slowest one."""
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            dist.barrier()
            begin = time.perf_counter()
            contenders[name]()
            taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            samples[name].append(taken.item())
    return samples


def print_head(*columns: str) -> None:
    """The head of a table, by rank 0."""
    _print_cells(columns)
    _print_cells(["---"] * len(columns))


def print_row(what: tuple[str, ...], samples: Mapping[str, list[float]], beside: str) -> None:
    """A row of that table: `what`, the contenders' medians in ms, and how many times as fast as the
    contender `beside` "ours" is."""
    medians = [f"{statistics.median(x) * 1e3:.3f}" for x in samples.values()]
    pairs = zip(samples[beside], samples["ours"], strict=True)
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    _print_cells([*what, *medians, f"{ratio:.2f}"])


def _print_cells(cells: Any) -> None:
    if dist.get_rank() == 0:
        print("| " + " | ".join(cells) + " |", flush=True)
