"""Dropout's inputs: sizes at the edges of groups, vectors and tiles, and every kind of layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..reference.dropout import multipliers
from . import Case, in_place

STATE = (0x1234_5678_9ABC_DEF0, -3)  # offsets are 64-bit words: a negative int64 is a large one
P = 0.3


def state(device: torch.device | str = "cpu") -> Tensor:
    """The rng_state that the cases use."""
    return torch.tensor(STATE, dtype=torch.int64, device=device)


def _values(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def _contiguous(x: Tensor) -> Tensor:
    return x


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _transposed(x: Tensor) -> Tensor:
    """Dense, with the first dimension innermost."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _strided(x: Tensor) -> Tensor:
    """Every second element of a larger tensor: not dense."""
    wide = torch.stack((x, x + 1), dim=-1)
    return wide[..., 0]


def _misaligned(x: Tensor) -> Tensor:
    """The data one element past a 64-byte boundary."""
    return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape)


def _oracle(x: Tensor, element_offset: int = 0) -> Tensor:
    """x m in storage order; a layout that is not dense counts in contiguous order."""
    order = list(range(x.dim()))
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        order.sort(key=lambda d: (x.stride(d), x.size(d)), reverse=True)
    m = multipliers(x.numel(), P, state(x.device), element_offset, torch.float64)
    m = m.view([x.shape[d] for d in order]).permute([order.index(d) for d in range(x.dim())])
    return x * m.to(x.dtype)


def _channel_oracle(x: Tensor) -> Tensor:
    m = multipliers(x.shape[0] * x.shape[1], P, state(x.device), 0, torch.float64)
    return x * m.view(*x.shape[:2], *[1] * (x.dim() - 2)).to(x.dtype)


def _drawn(
    op: str,
    name: str,
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    dropout: Callable[..., Tensor],
    oracle: Callable[[Tensor], Tensor],
    in_a_row: int,
    element_offset: int = 0,
) -> Case:
    """`in_a_row`: how many draws each row of the input takes."""

    def call(x: Tensor, first: int = 0, **options: Any) -> Tensor:
        offset = element_offset + first * in_a_row
        return dropout(x, P, rng_state=state(), element_offset=offset, **options)

    return Case(
        op=op,
        name=name,
        inputs=lambda device, dtype: (layout(_values(shape, device, dtype)),),
        function=call,
        oracle=oracle,
        small=torch.Size(shape).numel() <= 2100,
        draws=True,
        keeps=16,  # the rng_state
        shard=call if shape and layout is not _transposed else None,
    )


def _elements(
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor] = _contiguous,
    element_offset: int = 0,
) -> Case:
    name = f"{'x'.join(map(str, shape)) or '0-d'} {layout.__name__[1:]}"
    if element_offset:
        name += f" offset {element_offset}"
    oracle = functools.partial(_oracle, element_offset=element_offset)
    in_a_row = torch.Size(shape[1:]).numel()
    return _drawn("dropout", name, shape, layout, F.dropout, oracle, in_a_row, element_offset)


def _channels(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor] = _contiguous) -> Case:
    function = {3: F.dropout1d, 4: F.dropout2d, 5: F.dropout3d}[len(shape)]
    name = f"{'x'.join(map(str, shape))} {layout.__name__[1:]}"
    return _drawn("feature_dropout", name, shape, layout, function, _channel_oracle, shape[1])


CASES = [
    _elements(()),
    _elements((1,)),
    _elements((3,)),
    _elements((8,)),
    _elements((127,)),
    _elements((1024,)),
    _elements((2049,)),
    _elements((5, 7), _strided),
    _elements((129,), _misaligned),
    _elements((2, 3, 4, 5), _channels_last),
    _elements((3, 5, 7), _transposed),
    _elements((1001,), element_offset=5),
    _elements((64,), element_offset=2**33 + 8),
    _elements((2000,), element_offset=8 * 2**32 - 1000),  # a carry between words of the counter
    _elements((200_003,)),
    _elements((70, 65, 33), _channels_last),
    _channels((3, 5, 7)),
    _channels((3, 5, 7), _channels_last),
    _channels((2, 8, 4, 4)),
    _channels((2, 8, 4, 4), _channels_last),
    _channels((2, 3, 2, 3, 4)),
    _channels((2, 3, 2, 3, 4), _channels_last),
    _channels((1, 1, 9)),
    _channels((4, 3, 5), _strided),
    _channels((2, 1030, 3), _channels_last),
    _channels((5, 64, 29, 27)),
    _channels((5, 64, 29, 27), _channels_last),
]
CASES += [in_place(c, functools.partial(c.function, inplace=True)) for c in CASES if c.small]
