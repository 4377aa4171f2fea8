"""Which program takes which tiles (_channels.py) of a dense (N, C, L) tensor: the host decides."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .._rng import GROUP
from ._channels import Tiles
from ._launch import ceil_div, next_power_of_2

KEPT = 4096  # elements of a tile that is kept between the passes: 16 a thread
SPLITS_IN_FLIGHT = 4  # programs to a multiprocessor where the positions are split
PARTIALS = 4096  # moments that a program merges, 16 bytes each
SECTOR, LINE = 32, 128  # bytes that memory moves at least, and best


@dataclass(frozen=True)
class ChannelPlan:
    """Who takes what: the tiles of a channel's positions are split into ranges of `tiles`."""

    channels: int
    count: int  # M
    length: int  # L
    tiles: int
    splits: int
    programs: int
    single: bool  # one tile holds all positions
    run: int
    gate_axis: int
    warps: int
    blocks: Tiles

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.channels, self.count, self.length, self.tiles, self.splits


@functools.lru_cache(4096)
def plan_for(
    samples: int,
    channels: int,
    length: int,
    channels_last: bool,
    itemsize: int,
    tile_bytes: int,
    processors: int,
    merges: bool,
) -> ChannelPlan:
    """The tiles of an input (samples, channels, length).

    Args:
        tile_bytes: of one tensor in a tile.
        processors: how many programs it takes to fill the device.
        merges: whether ranges have to be put together in the end; else each tile may be one.
    """
    count = samples * length
    channels_last = channels_last or length == 1
    if channels == 1 and not channels_last:
        length = count
    row = channels if channels_last else length
    tile = tile_bytes // itemsize
    whole = max(16, next_power_of_2(count))

    # Channels of a block: rows of them are read from a sector on where they are the inner ones.
    padded = next_power_of_2(channels)
    narrowest = min(padded, max(8, SECTOR // itemsize)) if channels_last else 1
    widest = min(padded, LINE // itemsize) if channels_last else padded
    widest = max(widest, narrowest)

    def blocks(width: int) -> int:
        return ceil_div(channels, width)

    single = whole * narrowest <= min(tile, KEPT)
    short = count * narrowest <= 2 * tile  # too little to split
    if single:
        block_m, width = whole, min(widest, min(tile, KEPT) // whole)
        while width > narrowest and blocks(width) < processors:
            width //= 2
    else:
        if channels_last:
            width = narrowest if merges and short else widest
            while merges and width > narrowest and blocks(width) * (PARTIALS // width) < processors:
                width //= 2
        else:
            # Short rows: neighbouring channels share the sectors at their ends.
            width = 1
            while (
                width < widest
                and length * width * itemsize < 2 * LINE
                and blocks(2 * width) >= processors
            ):
                width *= 2
        block_m = max(16, tile // width)
    total = ceil_div(count, block_m)
    splits = 1
    if not merges:
        splits = total
    elif blocks(width) < processors and not short:
        wanted = ceil_div(SPLITS_IN_FLIGHT * processors, blocks(width))
        splits = min(wanted, total, PARTIALS // width)
    tiles = ceil_div(total, splits)
    splits = ceil_div(total, tiles)

    unit = math.gcd(row, count if not channels_last else 0, 16 // itemsize)
    inner = width if channels_last else block_m
    return ChannelPlan(
        channels=channels,
        count=count,
        length=length,
        tiles=tiles,
        splits=splits,
        programs=blocks(width) * splits,
        single=single,
        # A single row of positions starts at a mask group, and so do its tiles.
        run=math.gcd(0 if channels == 1 and not channels_last else row, GROUP, inner),
        gate_axis=0 if channels_last and channels % 8 else 1,
        warps=max(1, min(8, width * block_m // 256)),
        blocks=Tiles(
            BLOCK_C=width,
            BLOCK_M=block_m,
            M_AXIS=0 if channels_last else 1,
            SHORT_ROWS=length < block_m,
            UNIT=unit,
            WIDE=count > 2**31 - 2**16,
        ),
    )
