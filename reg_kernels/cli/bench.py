"""Times the ops against PyTorch eager and torch.compile, beside a copy of the same bytes.

The contenders of a benchmark run interleaved in one process, after a check of their values. Shown
are median times of the implementation that the op takes here and of PyTorch's, and the ratio: how
many times faster the op is than eager, with quartiles. --details shows the other implementations,
the share of the copy's bandwidth, peers, memory, and how each figure stands against its goal; --isa
holds native CPU code to other instruction sets than the best one here. In FILE, {device} stands for
the device, as in --json 'runs/{device}.json'. Exit code 1: a contender computed something else.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from .. import _console, _extras, backends, bench
from .._dtypes import named
from ..bench import _environment, _isas, _plots, _report, _results, _run
from ._device import device_from
from ._errors import UsageError
from ._files import output_file, write_output

DTYPES = {named(dtype): dtype for dtype in backends.DTYPES}
DEFAULT_DTYPES = ("float32", "bfloat16")
WIDTH = 100  # columns of the table that everybody sees
PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", action="append", help="measure this op only; may be given again (default: all)"
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: the GPU where torch sees one, else the CPU)"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=tuple(DTYPES),
        help=f"measure this dtype; may be given again (default: {', '.join(DEFAULT_DTYPES)})",
    )
    parser.add_argument("--all", action="store_true", help="every case in every dtype")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, float32 and no torch.compile: a look, in a minute",
    )
    parser.add_argument(
        "--details",
        action="store_true",
        help="show every implementation, peers, memory and goals",
    )
    parser.add_argument(
        "--isa",
        action="append",
        help="hold native CPU code to this instruction set, such as avx2; may be given again, and "
        "then each is measured (default: the best that the machine has)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: as many as torch takes)"
    )
    _run.add_time_limit(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every figure and the raw times to FILE"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the shares of the copy")


def run(args: argparse.Namespace) -> int:
    device = device_from(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.time_limit is not None and not args.time_limit > 0:
        raise UsageError(f"--time-limit must be above 0, got {args.time_limit}")
    scope = _scope(args, device)
    # Cases are light: their tensors are made when they are measured.
    cases = bench.all_cases(scope)
    ops = sorted({case.op for case in cases})
    for name in args.op or ():
        if name not in ops:
            raise UsageError(f"--op must be one of {', '.join(ops)}, got {name!r}")
    isas = _chosen_isas(args, device)
    cases = [
        dataclasses.replace(case, isas=isas) for case in cases if not args.op or case.op in args.op
    ]
    json_path = _output("--json", args.json, device)
    plot_path = _output("--plot", args.plot, device)
    if plot_path is not None:
        if plot_path.suffix not in PICTURES:
            raise UsageError(f"--plot: must end in {', '.join(PICTURES)}, got {plot_path.name}")
        _extras.require("--plot", "train", "matplotlib")
    _run.warm_allocator(device, ["-m", "reg_kernels", "bench", *_arguments(args)])

    budget = _run.QUICK if args.quick else _run.full_budget(device)
    options = {name: getattr(args, name) for name in ("quick", "all", "op", "dtype", "isa")}
    try:
        data = _run.measure_all(cases, device, lambda case: budget, options, args.time_limit)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return _run.INTERRUPTED
    _print(data, args.details)
    if json_path is not None:
        text = _results.to_json(data)
        write_output("--json", json_path, lambda path: path.write_text(text))
    if plot_path is not None:
        write_output("--plot", plot_path, lambda path: _plots.draw_shares(path, data))
    if errors := _report.wrong(data):
        for error in errors:
            print(f"reg-kernels bench: wrong values: {error}", file=sys.stderr)
        return 1
    return 0


def _scope(args: argparse.Namespace, device: torch.device) -> bench.Scope:
    default = DEFAULT_DTYPES[:1] if args.quick else DEFAULT_DTYPES
    names = args.dtype or (tuple(DTYPES) if args.all else default)
    return bench.Scope(
        device=device,
        dtypes=tuple(DTYPES[name] for name in dict.fromkeys(names)),
        everything=args.all,
        compiled=not args.quick,
    )


def _chosen_isas(args: argparse.Namespace, device: torch.device) -> tuple[str, ...]:
    """What --isa names; nothing where it is not given."""
    if args.isa is None:
        return ()
    if device.type != "cpu":
        raise UsageError(f"--isa: instruction sets are the CPU's, got --device {device.type}")
    if not (here := _isas.here()):
        raise UsageError(
            "--isa: the native CPU code is not built: leave it out, or install with a C++ compiler"
        )
    for name in args.isa:
        if name not in here:
            raise UsageError(
                "--isa must be one that was built (REG_KERNELS_ISA) and that this machine has, "
                f"{', '.join(here)}, got {name!r}"
            )
    return tuple(dict.fromkeys(args.isa))


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line that `args` came from, in a form that means the same."""
    words = []
    for name in ("op", "dtype", "isa"):
        for value in getattr(args, name) or ():
            words += [f"--{name}", value]
    for name in ("device", "threads", "time_limit", "json", "plot"):
        if (value := getattr(args, name)) is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    return words + [f"--{name}" for name in ("all", "quick", "details") if getattr(args, name)]


def _output(option: str, path: Path | None, device: torch.device) -> Path | None:
    """The file that `option` names, {device} filled in."""
    if path is None:
        return None
    name = str(path).replace("{device}", _environment.folder_name(_environment.facts_of(device)))
    return output_file(option, Path(name))


def _print(data: dict[str, Any], details: bool) -> None:
    _console.print_lines(_report.conditions(data))
    if details:
        for table in (_report.result_table, _report.peer_table, _report.goal_table):
            title, columns, rows, _, words = table(data)
            if rows:
                _console.print_table(title, columns, rows, words)
    else:
        title, columns, rows, _, words = _report.short_table(data)
        _console.print_table(title, columns, rows, words, width=WIDTH)
    _console.print_lines(_report.notes(data))
