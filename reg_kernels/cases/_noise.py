"""The inputs of ops that draw for each element and add noise: the edges of groups of four or eight
draws, of vectors and of tiles, and every kind of layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Case, in_place
from .dropout import (
    _channels_last,
    _contiguous,
    _misaligned,
    _strided,
    _transposed,
    _values,
    state,
)

SHAPES: list[tuple[tuple[int, ...], Any, int]] = [
    *(((), _contiguous, 0), ((3,), _contiguous, 0), ((129,), _misaligned, 0)),
    *(((2049,), _contiguous, 0), ((5, 7), _strided, 0), ((3, 5, 7), _transposed, 0)),
    *(((2, 3, 4, 5), _channels_last, 0), ((1001,), _contiguous, 5)),
    ((2000,), _contiguous, 4 * 2**32 - 1000),  # a carry between words of the counter
    ((70, 65, 33), _channels_last, 0),
]


def noise_cases(
    op: str,
    variants: dict[str, Callable[..., Tensor]],
    oracle: Callable[[str, Tensor, int], Tensor],
) -> list[Case]:
    """The cases of an op by its variants' functions, the first of which has them all; `oracle` is
    called with a variant's name, the elements in the order of their draws, and the first one's
    number."""
    cases = []
    for name, function in variants.items():
        for shape, layout, offset in SHAPES if not name else SHAPES[::3]:
            cases.append(_case(op, name, function, oracle, shape, layout, offset))
    return cases + [
        in_place(c, functools.partial(c.function, inplace=True)) for c in cases if c.small
    ]


def _case(
    op: str,
    variant: str,
    noise: Callable[..., Tensor],
    elements: Callable[[str, Tensor, int], Tensor],
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    offset: int,
) -> Case:
    in_a_row = torch.Size(shape[1:]).numel()

    def call(x: Tensor, first: int = 0, **options: Any) -> Tensor:
        place = offset + first * in_a_row
        return noise(x, rng_state=state(), element_offset=place, **options)

    def oracle(x: Tensor) -> Tensor:
        order = list(range(x.dim()))
        if torch.ops.aten.is_non_overlapping_and_dense(x):
            order.sort(key=lambda d: (x.stride(d), x.size(d)), reverse=True)
        y = elements(variant, x.permute(order).reshape(-1), offset)
        y = y.view([x.shape[d] for d in order])
        return y.permute([order.index(d) for d in range(x.dim())])

    name = " ".join(
        filter(None, ["x".join(map(str, shape)) or "0-d", layout.__name__[1:], variant])
    )
    return Case(
        op=op,
        name=f"{name} offset {offset}" if offset else name,
        inputs=lambda device, dtype: (layout(_values(shape, device, dtype)),),
        function=call,
        oracle=oracle,
        small=torch.Size(shape).numel() <= 2100,
        draws=True,
        keeps=16 if variant or op == "salt_and_pepper" else 0,  # the rng_state
        shard=call if shape and layout is not _transposed else None,
    )
