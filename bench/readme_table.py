"""Puts the results of bench/results/*/report.json into README.md, between its two markers.

`python -m bench.readme_table` rewrites the README, `--check` exits 1 where that would change it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reg_kernels.bench import _report
from reg_kernels.cli._files import write_whole

from . import report

ROOT = Path(__file__).resolve().parents[1]

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SHOWN = ("native", "triton")  # the other implementations' rows are in the reports


def results(folder: Path) -> str:
    """The Markdown of all reports below `folder`, a section for each device."""
    sections = []
    for path in sorted(folder.glob("*/report.json")):
        data = report.read(path)
        if (bench := data["results"].get("bench")) is None:
            continue
        link = f"bench/results/{path.parent.name}"
        charts = "\n".join(report.charts_in_markdown(data, link))
        sections.append(
            f"### {data['device']['name']}\n\n{_report.headline(bench, SHOWN)}\n{charts}\n\n"
            f"Every benchmark: [{link}/report.md]({link}/report.md), with raw times: "
            f"[report.json]({link}/report.json).\n"
        )
    return "\n".join(sections) or "No results yet: `make bench` writes them.\n"


def replaced(readme: str, text: str) -> str:
    """`readme` with `text` between the markers.

    Raises ValueError where they are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"README must hold {BEGIN} and, behind it, {END}, once each")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    try:
        old = args.readme.read_text()
        new = replaced(old, results(args.results))
    except (OSError, ValueError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    if old == new:
        return 0
    if args.check:
        print(f"{args.readme} is stale: run `python -m bench.readme_table`", file=sys.stderr)
        return 1
    write_whole(args.readme, lambda path: path.write_text(new))
    print(f"wrote {args.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
