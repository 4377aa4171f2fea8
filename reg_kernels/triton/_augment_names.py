"""What augment's kernels call numbers by, as constants: an opcode, AUTOCONTRAST; the place of an
argument in its instruction, BOX__TOP; a row of the plan, AT_HEIGHT.

A module, since kernels read a constant of another module and of no enumeration.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from .._augment_program import Op, column

# The rows of a plan: what its segments are, one a column. A segment is a geometric instruction,
# or none, and the instructions of single pixels after it, of one sample.
FIELDS = (
    "sample",
    "begin",  # its instructions, [begin, end)
    "end",
    "kind",  # WARP, SHARPNESS or, of sums of taps, BOX; 0 where pixels stay
    "geometry",  # the geometric instruction, where it has one
    "finish",  # whether its values are brought into range
    "source",  # where the image begins that it reads, its height and width
    "source_height",
    "source_width",
    "height",  # of the image that it makes
    "width",
    "rows",  # how many taps a pixel has in a column, 0 for itself, and where their table is
    "rows_taps",
    "columns",  # likewise in a row
    "columns_taps",
    "sink",  # where its image goes: 0 the result, else into scratch; SAVE and JOIN as they say
    "sink_at",
    "sums_at",  # where JOIN's sums are
    "statistic",  # the opcode of what needs one of this image, or 0; and where it goes
    "statistic_at",
    "known_at",  # where the one is that this segment needs
)


def __getattr__(name: str) -> Any:
    if name in Op.__members__:
        return tl.constexpr(int(Op[name]))
    if name.startswith("AT_"):
        return tl.constexpr(FIELDS.index(name.removeprefix("AT_").lower()))
    op, _, argument = name.partition("__")
    if op in Op.__members__:
        return tl.constexpr(column(Op[op], argument.lower()))
    raise AttributeError(name)
