"""Measures every op, whole networks and growth curves, and writes a report of it.

The native code of what has goals is measured by each instruction set of the machine.
`report.json`, `report.md` and the charts go to a folder of bench/results/ that is named after the
device; `python -m bench.readme_table` then renews the pages' results from them. It takes less than
15 minutes on two cores. Nothing is written before the end, nor when it is interrupted.

Exit code: 0 written, 1 written, but a contender computed something else, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reg_kernels.bench import _environment, _plots, _report, _results, _run
from reg_kernels.cli._files import write_whole

ROOT = Path(__file__).resolve().parents[1]

RESULTS = ROOT / "bench" / "results"
GENERATED = "written by `make bench` or `make gpu-report`: do not edit"
TAIL_OF_FAILURE, TAIL = 60, 30  # lines of a stage's output

CHARTS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "overview.png": _plots.draw_overview,
    "shares.png": _plots.draw_shares,
    "speedups.png": _plots.draw_speedups,
    "growth.png": _plots.draw_growth,
}


def folder_of(device: dict[str, Any], results: Path = RESULTS) -> Path:
    return results / _environment.folder_name(device)


def read(path: Path) -> dict[str, Any]:
    """A report.json; OSError or ValueError, which names the file, where it is none."""
    return parse(path.read_text(), str(path))


def parse(text: str, name: str) -> dict[str, Any]:
    """The report that `text` holds; ValueError, which says `name`, where it is none."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: no JSON: {error}") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != _results.SCHEMA:
        raise ValueError(f"{name}: expected a report of schema {_results.SCHEMA}, got {found}")
    if bench := data["results"].get("bench"):
        data["results"]["bench"] = _results.expanded(bench, data)
    return data


def write(folder: Path, data: dict[str, Any]) -> None:
    """Writes report.json, report.md and, where something was measured, the charts.

    Without matplotlib, which a machine without a network may lack, there are none.
    """
    bench = data["results"].get("bench")
    data["charts"] = list(CHARTS) if bench and importlib.util.find_spec("matplotlib") else []
    kept = {"generated": GENERATED, **data}
    if bench:
        kept["results"] = data["results"] | {"bench": _results.condensed(bench, data)}
    text = _results.to_json(kept)
    # What is drawn and printed comes of the file's own digits, so that it can be had from it again.
    data = parse(text, "the report")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", lambda path: path.write_text(text))
    write_whole(folder / "report.md", lambda path: path.write_text(render(data)))
    for name in CHARTS.keys() - data["charts"]:
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    for name in data["charts"]:
        draw, figures = CHARTS[name], data["results"]["bench"]
        write_whole(folder / name, lambda path, draw=draw, figures=figures: draw(path, figures))


def charts_in_markdown(data: dict[str, Any], folder: str) -> list[str]:
    """A line for each chart of a report that lies in `folder`."""
    return [f"![{Path(name).stem}]({folder}/{name})" for name in data["charts"]]


def copy_bandwidth(bench: dict[str, Any] | None) -> dict[str, float]:
    """Bytes/s of `Tensor.copy_`, read and written, by dtype and size: of each dtype the largest."""
    largest: dict[str, tuple[int, float]] = {}
    for case in (bench or {}).get("benchmarks", []):
        for row in case["contenders"]:
            if row["name"] == "copy" and "median" in row and _results.counts_bytes(case):
                found = (case["bytes"], case["bytes"] / row["median"])
                largest[case["dtype"]] = max(found, largest.get(case["dtype"], found))
    return {
        f"{dtype} {_report.format_bytes(count / 2)}": speed
        for dtype, (count, speed) in largest.items()
    }


def render(data: dict[str, Any]) -> str:
    """The report in Markdown."""
    device, versions = data["device"], data["versions"]
    lines = [
        f"<!-- {GENERATED} -->",
        f"# {device['name']}",
        "",
        f"- commit: {_report.format_commit(data['commit'])}",
        f"- date: {data['date']}",
        *([f"- driver: {device['driver'] or 'unknown'}"] if device["type"] == "cuda" else []),
        "- versions: " + ", ".join(f"{name} {value}" for name, value in versions.items() if value),
    ]
    for what, speed in copy_bandwidth(data["results"].get("bench")).items():
        lines.append(f"- copy bandwidth, {what}: {speed / 1e12:.3f} TB/s read and written")
    if data["stages"]:
        lines += ["", "## Stages", ""]
        rows = [
            (r["group"], r["name"], r["status"], f"{r['seconds']:.0f} s", r["reason"])
            for r in data["stages"]
        ]
        columns = ("group", "stage", "outcome", "time", "why")
        lines.append(_report.Table("stages", columns, rows, words=5).markdown())
    if bench := data["results"].get("bench"):
        lines += ["", "## Benchmarks", ""]
        lines += [f"{line}\n" for line in charts_in_markdown(data, ".")]
        lines.append(_report.markdown(bench).rstrip())
    # A benchmark that went well is shown above.
    shown = [
        row
        for row in data["stages"]
        if row["tail"] and (row["group"] != "benchmarks" or row["status"] != "ok")
    ]
    if shown:
        lines += ["", "## Output"]
    for row in shown:
        # All of what a failure said; of the rest the summary at its end.
        last = row["tail"].splitlines()[-(TAIL if row["status"] == "ok" else TAIL_OF_FAILURE) :]
        lines += ["", f"### {row['name']}: {row['status']}", "", "````text", *last, "````"]
    return "\n".join(lines) + "\n"


def measure(device_type: str, time_limit: float | None, quick: bool) -> dict[str, Any]:
    """The figures of all ops, networks and curves, as `reg-kernels bench --json` writes them."""
    import torch

    from reg_kernels import bench

    from . import growth, models

    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16)
    scope = bench.Scope(device, dtypes, compiled=not quick)
    # In turns, so that what a time limit leaves is not of one kind alone.
    curves: dict[str, list[bench.Benchmark]] = {}
    for case in growth.cases(scope):
        curves.setdefault(case.series, []).append(case)
    points = bench.take_turns(curves.values())
    kernels = bench.on_each_isa(bench.all_cases(scope))
    cases = bench.take_turns((kernels, models.cases(scope), points))
    usual = _run.QUICK if quick else _run.full_budget(device)
    options = {"quick": quick, "all": False, "op": None, "dtype": None}
    return _run.measure_all(
        cases, device, lambda case: growth.BUDGET if case.series else usual, options, time_limit
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what to measure on (default: cpu; `make gpu-report` is what takes cuda)",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, float32, no compiler")
    _run.add_time_limit(parser)
    parser.add_argument(
        "--figures", type=Path, metavar="FILE", help="write the figures alone to FILE, no report"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="the report goes to a folder in DIR named after the device (default: bench/results)",
    )
    args = parser.parse_args(argv)
    if args.time_limit is not None and not args.time_limit > 0:
        parser.error(f"--time-limit must be above 0, got {args.time_limit}")

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"bench.report: torch {torch.__version__} sees no GPU here", file=sys.stderr)
        return 2
    words = sys.argv[1:] if argv is None else argv
    _run.warm_allocator(torch.device(args.device), ["-m", "bench.report", *words])
    try:
        figures = measure(args.device, args.time_limit, args.quick)
        if args.figures is not None:
            write_whole(args.figures, lambda path: path.write_text(_results.to_json(figures)))
            print(f"wrote {args.figures}")
        else:
            folder = folder_of(figures["device"], args.out.resolve())
            write(folder, report_of(figures))
            print(_report.headline(figures))
            print(f"wrote a report to {folder}")
    except OSError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return _run.INTERRUPTED
    for error in (errors := _report.wrong(figures)):
        print(f"bench.report: wrong values: {error}", file=sys.stderr)
    return 1 if errors else 0


def report_of(figures: dict[str, Any]) -> dict[str, Any]:
    """A report that holds figures and no stages."""
    facts = {key: figures[key] for key in ("commit", "date", "device", "versions")}
    return {"schema": _results.SCHEMA, **facts, "stages": [], "results": {"bench": figures}}


if __name__ == "__main__":
    sys.exit(main())
