"""The table of all kernels: they are compiled and read, and each GPU's time is predicted."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import binary, compiling, triton_launches
from .disassembly import Hot, elements_alone, hot_paths, widths
from .findings import findings
from .gpus import GPUS, occupancy, share_of_bandwidth

FOLDER = compiling.ROOT / "build" / "sass"
Row = dict[str, Any]

_SIZES = {"unsigned char": 1, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4, "double": 8}
_TYPES = re.compile(r"\b(unsigned char|b?float(?:16|32)?|double)\b")
# From how many inputs of its first type a kernel reads an element in a trip, where that is not one.
# None: its elements are not counted. What an optimizer reads, for one, depends on its options, and
# what augmentation reads on its programs.
READS = {
    r"optimizer_step|write_group|target_sums|label_totals|count_batch|augment": None,
    r"batch_norm_backward|gradient_sums|^backward_kernel|distillation|<Distillation": 2,
    r"mixup_(kernel|pairs)": 2,
}


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS", "2"))


def versions() -> dict[str, str]:
    """The versions of the tools that decide on the machine code."""
    release = re.search(r"V([\d.]+)", compiling.compiler("NVCC", "nvcc")[1])
    return {"nvcc": release[1], "triton": importlib.metadata.version("triton")}


def is_current(report: Row, source: Path) -> bool:
    """Whether a report's rows of a .cu file are those that compiling it here would give again."""
    compiled = report["sources"].get(source.stem)
    return report["versions"] == versions() and compiled == compiling.digest_of_source(source)


def element_bytes(arguments: str) -> int | None:
    """The bytes of the first type among template arguments, or of a dtype."""
    found = _TYPES.search(arguments)
    return _SIZES[found[1]] if found else None


def access_bytes(arguments: str) -> frozenset[int] | None:
    """The widths in bytes that a CUDA kernel's accesses to elements have: 16 bytes of its longest
    type and as many elements of the others, or one element. None where no type is named."""
    sizes = [_SIZES[name] for name in _TYPES.findall(arguments)]
    if not sizes:
        return None
    vectors = {16 * size // max(sizes) for size in sizes}
    return frozenset(vectors | set(sizes))


def _reads(kernel: str) -> int | None:
    return next((n for pattern, n in READS.items() if re.search(pattern, kernel)), 1)


def elements(kernel: str, arguments: str, hot: Hot) -> int | None:
    """Elements that a thread handles in one trip."""
    reads = _reads(kernel)
    size = element_bytes(arguments)
    if reads is None or size is None:
        return None
    moved = hot.moved("load") // reads or hot.moved("store")
    return max(moved // size, 1)


def _hot_row(kernel: str, arguments: str, architecture: int, hot: Hot) -> Row:
    def by_width(kind: str) -> dict[str, int]:
        return {str(width): count for k, width, count in hot.streamed if k == kind}

    bounds = {}
    for gpu in GPUS:
        if gpu.architecture == architecture:
            share, pipe = share_of_bandwidth(gpu, hot)
            bounds[gpu.name] = [round(share, 2), pipe]
    return {
        "loop": hot.loop,
        "inner_loops": hot.inner_loops,
        "loads": by_width("load"),
        "stores": by_width("store"),
        "elements": elements(kernel, arguments, hot),
        "kinds": hot.kinds,
        "bounds": bounds,
    }


def row_of(kernel: binary.Kernel, source: str, name: str, **launch: Any) -> Row:
    """One kernel instance on one architecture. `launch`: threads and shared bytes, where known."""
    threads, shared = launch.get("threads", kernel.threads), launch.get("shared", kernel.shared)
    percent, limit = occupancy(kernel.architecture, kernel.registers, threads, shared)
    base, _, arguments = name.partition("<")
    if source.startswith("cuda/"):
        base = name  # where losses share a kernel, its arguments name the loss
    # In Triton a tile decides how many elements a thread takes at once: they may have any width.
    elements_counted = source.startswith("cuda/") and _reads(base) is not None
    accesses = access_bytes(arguments) if elements_counted else None
    code = kernel.code if accesses is None else elements_alone(kernel.code, accesses)
    paths = [_hot_row(base, arguments, kernel.architecture, h) for h in hot_paths(code)]
    paths.sort(key=lambda row: min(share for share, _ in row["bounds"].values()))
    return {
        "source": source,
        "kernel": name,
        "architecture": kernel.architecture,
        "threads": threads,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "shared": shared,
        "occupancy": percent,
        "limit": limit,
        "widths": widths(kernel.code),
        "paths": len(paths),
        "hot": paths[:1],  # the one that its instructions slow down most
    }


def cuda_rows(source: Path) -> list[Row]:
    """The rows of every kernel instance in a .cu file, on every architecture."""
    path, result = compiling.compile_cuda(source, *compiling.torch_flags())
    if result.code != 0:
        raise RuntimeError(f"{source.name} does not compile: {result}")
    found = list(binary.kernels_of_object(path))
    names = binary.demangled([kernel.name for kernel in found])
    return [row_of(k, f"cuda/{source.stem}", n) for k, n in zip(found, names, strict=True)]


def _lines_of_launches(*arguments: str) -> list[Any]:
    """What triton_launches.py prints, each line read as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(compiling.ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, triton_launches.__file__, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the Triton kernels do not compile: {done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def launched(architecture: int, *what: str) -> Iterator[Row]:
    """The facts that triton_launches.py prints about each kernel that it compiles."""
    folder = FOLDER / f"sm_{architecture}"
    folder.mkdir(parents=True, exist_ok=True)
    for facts in _lines_of_launches("compile", str(architecture), str(folder), *what):
        yield facts | {"name": f"{facts['kernel']}<{facts['dtype']}> {facts['variant']}"}


@functools.cache
def digests_of_triton() -> dict[str, str]:
    """A digest for each op of all that decides on its launches and their kernels, except Triton's
    version. They take seconds, where compiling takes minutes."""
    (digests,) = _lines_of_launches("digests")
    return digests


def is_current_triton(report: Row, op: str) -> bool:
    """Whether a report's rows of an op's Triton kernels are those that compiling would give."""
    same = report["versions"]["triton"] == importlib.metadata.version("triton")
    return same and report["triton_launches"].get(op) == digests_of_triton()[op]


def faulty_launches(op: str) -> list[Row]:
    """The launches of an op's calls and large cases that have findings, on any architecture."""
    rows = []
    for architecture in compiling.CUDA_ARCHITECTURES:
        for facts in launched(architecture, "--cases", op):
            ((registers, stack, _),) = binary.resources(Path(facts["cubin"])).values()
            used = occupancy(architecture, registers, facts["threads"], facts["shared"])
            row = {
                "source": f"triton/{op}",
                "kernel": facts["name"],
                "architecture": architecture,
                "stack": stack,
                "registers": registers,
                "occupancy": used[0],
                "limit": used[1],
                "hot": [],
            }
            rows += [row] if any(findings(row)) else []
    return sorted(rows, key=key_of)


def triton_rows(architecture: int, ops: Sequence[str] = triton_launches.OPS) -> list[Row]:
    """The rows of every kernel that the calls of triton_calls.py launch, on one architecture."""
    rows = []
    for facts in launched(architecture, *ops):
        (kernel,) = binary.kernels(Path(facts["cubin"]))
        launch = {"threads": facts["threads"], "shared": facts["shared"]}
        rows.append(row_of(kernel, f"triton/{facts['op']}", facts["name"], **launch))
    return rows


def tasks() -> dict[str, Callable[[], list[Row]]]:
    """The parts of the table by name; those that take longest to compile come first."""
    sources = sorted(compiling.CUDA_SOURCES, key=lambda p: ("mixup" not in p.stem, p.stem))
    result: dict[str, Callable[[], list[Row]]] = {
        f"CUDA {source.stem}": lambda source=source: cuda_rows(source) for source in sources
    }
    for architecture in compiling.CUDA_ARCHITECTURES:
        result[f"Triton sm_{architecture}"] = lambda a=architecture: triton_rows(a)
    for op in triton_launches.OPS:
        result[f"launches of {op}"] = lambda op=op: faulty_launches(op)
    return result


def build(done: Callable[[str], None]) -> list[Row]:
    """Every row, sorted; `done` is called with the name of each part when it is finished."""

    def part(item: tuple[str, Callable[[], list[Row]]]) -> list[Row]:
        rows = item[1]()
        done(item[0])
        return rows

    with ThreadPoolExecutor(jobs()) as pool:
        parts = list(pool.map(part, tasks().items()))
    return sorted((row for rows in parts for row in rows), key=key_of)


def key_of(row: Row) -> tuple[str, str, int]:
    return row["source"], row["kernel"], row["architecture"]


def global_kernels() -> Iterator[str]:
    """Names of all kernels that the sources define."""
    for folder in ("cuda", "include"):
        for path in sorted((compiling.CSRC / folder).rglob("*.cu*")):
            text = re.sub(r"//.*", "", path.read_text())
            for bounds in re.finditer(r"__global__ void\s+", text):
                rest = text[bounds.end() :]
                rest = _after_bounds(rest) if rest.startswith("__launch_bounds__") else rest
                yield re.match(r"\s*(\w+)\(", rest)[1]
    for path in sorted((compiling.ROOT / "reg_kernels" / "triton").glob("*.py")):
        yield from re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)


def _after_bounds(text: str) -> str:
    """What follows __launch_bounds__(...), whose parentheses may nest."""
    depth, start = 0, text.index("(")
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return text[at + 1 :]
    raise ValueError("__launch_bounds__ without its closing parenthesis")
