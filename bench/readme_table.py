"""Puts the results of bench/results/*/report.json between the markers of the pages that show them:
into README.md one table and one chart of the newest CPU, into docs/figures.md the rest.

`python -m bench.readme_table` rewrites the pages, `--check` exits 1 where that would change one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reg_kernels.bench import _report
from reg_kernels.cli._files import write_whole

from . import report

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NONE = "No results yet: `make bench` writes them.\n"

Found = list[tuple[Path, dict[str, Any]]]  # folders, with their reports that hold measurements


def reports(results: Path) -> Found:
    found = [(path.parent, report.read(path)) for path in sorted(results.glob("*/report.json"))]
    return [(folder, data) for folder, data in found if "bench" in data["results"]]


def overview(found: Found, page: Path) -> str:
    """What somebody wants to know first: a row an op, of the CPU that was measured last."""
    of_cpu = [(folder, data) for folder, data in found if data["device"]["type"] == "cpu"]
    if not of_cpu:
        return NONE
    folder, data = max(of_cpu, key=lambda pair: pair[1]["date"])
    bench, device = data["results"]["bench"], data["device"]
    torch, commit = data["versions"]["torch"], _report.format_commit(data["commit"])
    charts = report.charts_in_markdown(data, _link(page, folder))
    return "\n\n".join(
        [
            f"{device['name']}, {bench['threads']} threads, {device['isa'] or 'no native code'}, "
            f"torch {torch}, float32, at commit {commit}. Times are medians; `ratio`: how many "
            "times faster than eager, with the quartiles of the rounds.",
            _report.overview_table(bench).markdown(),
            *charts[:1],
        ]
    )


def figures(found: Found, page: Path) -> str:
    """A section for each device."""
    sections = []
    for folder, data in found:
        link, name = _link(page, folder), folder.relative_to(folder.parents[2]).as_posix()
        charts = report.charts_in_markdown(data, link)
        sections.append(
            "\n\n".join(
                [
                    f"## {folder.name}",
                    _report.headline(data["results"]["bench"]).rstrip(),
                    *charts[1:],
                    f"Every benchmark: [{name}/report.md]({link}/report.md), and what two reports "
                    f"are compared by: [report.json]({link}/report.json).",
                ]
            )
        )
    return "\n\n".join(sections) or NONE


PAGES: dict[str, Callable[[Found, Path], str]] = {
    "README.md": overview,
    "docs/figures.md": figures,
}


def _link(page: Path, folder: Path) -> str:
    return Path(os.path.relpath(folder, page.parent)).as_posix()


def replaced(page: str, text: str, name: str) -> str:
    """`page` with `text` between the markers.

    Raises ValueError, which says `name`, where they are not there, once each and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{name} must hold {BEGIN} and, behind it, {END}, once each")
    written = f"<!-- {report.GENERATED} -->"
    return f"{before}{BEGIN}\n{written}\n\n{text.strip()}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository's")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    try:
        found = reports(root / "bench" / "results")
        pages = {root / name: text for name, text in PAGES.items()}
        old = {page: page.read_text() for page in pages}
        new = {
            page: replaced(old[page], text(found, page), page.name) for page, text in pages.items()
        }
    except (OSError, ValueError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    stale = [page for page in pages if old[page] != new[page]]
    for page in stale:
        if args.check:
            print(f"{page} is stale: run `python -m bench.readme_table`", file=sys.stderr)
        else:
            write_whole(page, lambda path, text=new[page]: path.write_text(text))
            print(f"wrote {page}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
