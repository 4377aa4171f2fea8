"""Compares two reports' ratios and names what got worse.

`python -m bench.compare OLD [NEW]`: each a report.json, or OLD a git revision whose report of
NEW's device is meant, as in `python -m bench.compare HEAD`. NEW is the report of this machine, or
the only one below bench/results, unless it is given.

It compares ratios, which a slow minute of the machine does not change: each implementation's speed
over that of the copy, eager, torch.compile and the peers, taken within a round. A ratio counts as
worse (or better) where its median fell (or rose) by more than the tolerance and the middle halves
of the two sets of rounds do not overlap. It also names benchmarks that are gone and contenders that
no longer run.

Exit code: 0 nothing got worse, 1 something did, 2 the reports cannot be compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reg_kernels import _console
from reg_kernels.bench import _environment, _results
from reg_kernels.bench._results import Key, Ratio

from . import report

ROOT = Path(__file__).resolve().parents[1]

TOLERANCE = 0.1
COLUMNS = ("benchmark", "implementation", "speed over", "was", "is", "change")


class Comparison(NamedTuple):
    worse: list[tuple[str, ...]]  # rows as COLUMNS, the worst first
    better: list[tuple[str, ...]]  # the best first
    gone: list[str]  # what was measured and is not


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> Comparison:
    """What changed from one report to another; ValueError where they are of different devices."""
    # A fact that one of them does not state cannot tell them apart.
    for what in ("type", "name", "family", "model", "isa"):
        was, now = (data["device"].get(what) for data in (old, new))
        if was is not None and now is not None and was != now:
            raise ValueError(f"expected two reports of one device, got {what} {was!r} and {now!r}")
    for what in ("threads", "allocator", "options"):
        was, now = (data["results"]["bench"][what] for data in (old, new))
        if was != now:
            raise ValueError(f"expected two reports of the same {what}, got {was} and {now}")
    before, after = (dict(_results.ratios(data["results"]["bench"])) for data in (old, new))
    worse, better = [], []
    for key in before.keys() & after.keys():
        was, now = before[key], after[key]
        row = (now.median / was.median, key, was, now)
        if _below(now, was, tolerance):
            worse.append(row)
        elif _below(was, now, tolerance):
            better.append(row)
    gone = sorted(
        f"{k.benchmark}: {k.implementation} over {k.other}" for k in before.keys() - after.keys()
    )
    return Comparison(
        [_row(*row) for row in sorted(worse)], [_row(*row) for row in sorted(better)[::-1]], gone
    )


def _below(ratio: Ratio, other: Ratio, tolerance: float) -> bool:
    return ratio.median < other.median * (1 - tolerance) and ratio.upper < other.lower


def _row(change: float, key: Key, was: Ratio, now: Ratio) -> tuple[str, ...]:
    return (*key, f"{was.median:.3g}", f"{now.median:.3g}", f"{change - 1:+.0%}")


def find_new(path: Path | None) -> Path:
    if path is not None:
        return path
    here = report.folder_of(_environment.facts_of(torch.device("cpu"))) / "report.json"
    if here.is_file():
        return here
    found = sorted(report.RESULTS.glob("*/report.json"))
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(ROOT)) for p in found) or "none"
        raise ValueError(f"NEW must be given where there is not just one report, got {names}")
    return found[0]


def read_old(name: str, new: Path) -> dict[str, Any]:
    """A report from a file, or NEW as it is at a git revision."""
    if Path(name).is_file():
        return report.read(Path(name))
    command = ["git", "-C", str(new.resolve().parent), "show", f"{name}:./{new.name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(
            f"OLD must be a file or a git revision that has {new}, got {name!r} "
            f"({done.stderr.strip()})"
        )
    return report.parse(done.stdout, f"{name}:{new}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD", help="a report.json or a git revision")
    parser.add_argument("new", metavar="NEW", type=Path, nargs="?", help="a report.json")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"the share by which a ratio may fall (default: {TOLERANCE})",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.tolerance < 1:
        parser.error(f"--tolerance must be in [0, 1), got {args.tolerance}")
    try:
        path = find_new(args.new)
        new = report.read(path)
        found = compare(read_old(args.old, path), new, args.tolerance)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2

    for title, rows in (("worse", found.worse), ("better", found.better)):
        if rows:
            _console.print_table(title, COLUMNS, rows)
    for line in found.gone:
        print(f"no longer measured: {line}")
    print(f"{len(found.worse)} worse, {len(found.better)} better")
    return 1 if found.worse or found.gone else 0


if __name__ == "__main__":
    sys.exit(main())
