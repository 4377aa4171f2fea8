"""What is printed for people: tables and progress, by rich, which the extra `cli` brings."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_WIDE = 200  # columns: a file or a pipe has no width to fit into
_BAD = ("MISSED", "WRONG VALUES", "FAILED")  # a row with one of these stands out


def print_lines(lines: Iterable[str]) -> None:
    console = _console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[tuple[str, ...]],
    words: int = 2,
    narrow: bool = False,
    width: int | None = None,
) -> None:
    """Prints a table; what a row's first cell shares with the row above is left out.

    Args:
        title: above it.
        columns: their heads.
        rows: their cells.
        words: so many first columns are words, to the left; the others are figures.
        narrow: no frame, and no cell broken into lines.
        width: columns of the terminal that it takes at the most; words are broken for it.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD)
    for i, column in enumerate(columns):
        whole = narrow or (width is not None and i >= words)
        table.add_column(column, justify="left" if i < words else "right", no_wrap=whole)
    above = None
    for first, *others in rows:
        style = "bold red" if any(word in cell for word in _BAD for cell in others) else ""
        cells = ["" if first == above else first, *others]
        table.add_row(*(Text(cell) for cell in cells), style=style)
        above = first
    console = _console()
    console.print(table, width=min(width or console.width, console.width))


def progress(shown: bool = True) -> Progress:
    """A bar on standard error, with the task's description behind it; none where nobody looks, or
    it is not to be shown."""
    console = Console(stderr=True)
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=not (shown and console.is_terminal),
    )


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
