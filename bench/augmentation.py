"""Image augmentation beside other libraries: whole pipelines, and the time of one that grows.

    python -m bench.augmentation [--seconds 5] [--batch 32]

The others take part where they are installed: torchvision, kornia, AlbumentationsX and OpenCV. A
CPU build of torch has no torchvision beside it: make an environment that has both, and run it
there on this folder's build (`pip install torch torchvision kornia albumentationsx
opencv-python-headless rich matplotlib`). Writes augmentation.md and augmentation.png to the folder
of this machine's results.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.report import folder_of
from reg_kernels import augment, bench
from reg_kernels.bench import _environment, _isas
from reg_kernels.bench import augment as benchmarks
from reg_kernels.cli._files import write_whole

CPU = torch.device("cpu")
# What is added to a pipeline, one after the other; by the names of torchvision's classes.
CHAIN: tuple[tuple[str, Any], ...] = (
    ("RandomResizedCrop", (benchmarks.CROP,)),
    ("RandomHorizontalFlip", ()),
    ("ColorJitter", (0.4,)),
    ("ColorJitter", (0, 0.4)),
    ("ColorJitter", (0, 0, 0.4)),
    ("ColorJitter", (0, 0, 0, 0.1)),
    ("RandomSolarize", (128, 0.5)),
    ("RandomPosterize", (4, 0.5)),
    ("RandomInvert", (0.5,)),
)
WORDS = ("crop", "flip", "brightness", "contrast", "saturation", "hue", "solarize", "posterize",
         "invert")  # fmt: skip


def chain(length: int) -> benchmarks.Kind:
    """The first `length` transforms of the chain, and a normalisation."""

    def of_torchvision(v2: Any) -> list[Any]:
        made = [getattr(v2, name)(*given) for name, given in CHAIN[:length]]
        return [*made, *benchmarks.to_floats(v2)]

    def of_kornia(module: Any) -> list[Any]:
        makers: tuple[Callable[[], Any], ...] = (
            lambda: module.RandomResizedCrop((benchmarks.CROP, benchmarks.CROP)),
            lambda: module.RandomHorizontalFlip(),
            *(functools.partial(module.ColorJitter, *given, p=1.0) for _, given in CHAIN[2:6]),
            lambda: module.RandomSolarize(thresholds=(0.5, 0.5), additions=0.0),
            lambda: module.RandomPosterize(4),
            lambda: module.RandomInvert(),
        )
        return [
            *(make() for make in makers[:length]),
            module.Normalize(torch.tensor(benchmarks.MEAN), torch.tensor(benchmarks.STD)),
        ]

    return benchmarks.Kind(
        WORDS[length - 1],
        0,
        lambda: [
            *(getattr(augment, name)(*given) for name, given in CHAIN[:length]),
            augment.Normalize(benchmarks.MEAN, benchmarks.STD),
        ],
        {
            benchmarks.TORCHVISION: benchmarks.of_torchvision(of_torchvision),
            benchmarks.KORNIA: benchmarks.of_kornia(of_kornia),
        },
    )


def measured(case: bench.Benchmark, budget: bench.Budget) -> dict[str, Any]:
    print(f"  {case.variant}", file=sys.stderr, flush=True)
    return bench.measure(case, CPU, budget)


def ours(result: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in result["contenders"] if row["name"] == "native")


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| pipeline, images | implementation | µs an image | of a copy | ours: faster by | goals |",
        "|---|---|---:|---:|---:|---|",
    ]
    for result in results:
        for row in result["contenders"]:
            cells = [f"{result['variant']}, {result['shape'][0]}", row["name"]]
            if "median" not in row:
                if row["name"] != "triton":
                    lines.append(f"| {cells[0]} | {row['name']} | {_why(row)} | | | |")
                continue
            each = row["median"] / result["shape"][0]
            own = ours(result)["speed_over"].get(row["name"])
            copies = row["time_over_copy"]
            goals = "; ".join(
                f"{goal['text']}: {'met' if goal['met'] else 'MISSED'}"
                for goal in row.get("goals", ())
                if goal["met"] is not None
            )
            faster = f"{own[1]:.2f}" if own and row["name"] != "copy" else ""
            cells += [f"{1e6 * each:.1f}", f"{copies:.2f}", faster, goals]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _why(row: dict[str, Any]) -> str:
    return str(row.get("skipped") or row.get("wrong"))


def draw(path: Path, lengths: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in ("native", benchmarks.TORCHVISION, benchmarks.KORNIA, "copy"):
        points = [
            1e6 * row["median"] / result["shape"][0]
            for result in lengths
            for row in result["contenders"]
            if row["name"] == name and "median" in row
        ]
        if len(points) == len(lengths):
            label = {"native": "ours", "copy": "a copy of its bytes"}.get(name, name)
            axes.plot(range(1, len(points) + 1), points, marker="o", label=label)
    axes.set_yscale("log")
    axes.set_ylabel("µs an image")
    axes.set_xticks(range(1, len(lengths) + 1), [f"+ {word}" for word in WORDS], rotation=30)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title("a pipeline that grows: 256×256 bytes to 224×224 float32")
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pipeline")
    parser.add_argument("--batch", type=int, default=32, help="images of the growing pipeline")
    args = parser.parse_args()
    if _environment.has_glibc() and _environment.allocator() is None:
        os.execve(  # or freed memory would go back to the kernel, and come back page by page
            sys.executable,
            [sys.executable, "-m", "bench.augmentation", *sys.argv[1:]],
            {**os.environ, **_environment.ALLOCATOR},
        )
    budget = bench.Budget(args.seconds, least=3, most=30, sample=0.02)
    scope = bench.Scope(CPU, (torch.float32,), compiled=False)
    results = [measured(case, budget) for case in bench.on_each_isa(benchmarks.cases(scope))]
    lengths = [
        measured(benchmarks.case(chain(n)._replace(batch=args.batch), torch.float32), budget)
        for n in range(1, len(CHAIN) + 1)
    ]
    environment = _environment.environment(CPU)
    folder = folder_of(environment["device"])
    commit, versions = environment["commit"], environment["versions"]
    revision = commit and commit["hash"][:12] + " and changes" * bool(commit["dirty"])
    lines = [
        "# Image augmentation beside other libraries",
        "",
        f"`python -m bench.augmentation`, {environment['date']}, commit {revision}; torch "
        f"{versions['torch']}, {environment['threads']} threads, {', '.join(_isas.here())}. "
        "Medians; drawing, conversions and stacking included. torchvision draws once for a batch.",
        "",
        *table(results),
        "",
        "A pipeline that grows, one transform after the other:",
        "",
        *table(lengths),
        "",
        "![growing](augmentation.png)",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "augmentation.md", lambda path: path.write_text("\n".join(lines)))
    write_whole(folder / "augmentation.png", lambda path: draw(path, lengths))
    print(f"wrote augmentation.md and augmentation.png to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
