"""Philox4x32-10 against the known-answer vectors of its authors (Random123, kat_vectors)."""

from pathlib import Path

import pytest
import torch

from reg_kernels._rng import TAG_DROPOUT
from reg_kernels.reference._philox import half_words, philox4x32
from reg_kernels.reference.dropout import _TAG

from support import DEVICE, isas, rng_state

# counter words 0..3, key words 0..1, result words 0..3
VECTORS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words64(words: tuple[int, ...]) -> list[int]:
    return [words[i] | words[i + 1] << 32 for i in range(0, len(words), 2)]


def as_int64(value: int) -> torch.Tensor:
    return torch.tensor((value + 2**63) % 2**64 - 2**63)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_reference(counter, key, expected):
    low, high = map(as_int64, words64(counter))
    words = philox4x32(as_int64(words64(key)[0]), low, high)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.skipif(not isas(), reason="the native library was not built")
@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_native_scalar(counter, key, expected):
    from reg_kernels import _C

    low, high = words64(counter)
    assert tuple(_C.philox4x32(words64(key)[0], low, high)) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_triton(counter, key, expected):
    pytest.importorskip("triton")
    from philox_kernel import philox_kernel

    low, high = map(as_int64, words64(counter))
    arguments = torch.stack([as_int64(words64(key)[0]), low, low, high]).to(DEVICE)
    out = torch.empty(8, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](out, arguments)
    assert tuple((out[::2] & 0xFFFFFFFF).tolist()) == expected


def test_half_words_are_words_low_half_first():
    key = as_int64(TAG_DROPOUT)  # xor TAG_DROPOUT leaves the key 0 of the first vector
    drawn = half_words(torch.stack([key, as_int64(0)]), TAG_DROPOUT, 0, 8).tolist()
    expected = [half for word in VECTORS[0][2] for half in (word & 0xFFFF, word >> 16)]
    assert drawn == expected


def test_half_words_of_a_part_are_part_of_the_whole():
    whole = half_words(rng_state(), TAG_DROPOUT, 0, 100)
    for first in (0, 1, 7, 8, 9, 50):
        assert torch.equal(
            half_words(rng_state(), TAG_DROPOUT, first, 30), whole[first : first + 30]
        )


def test_the_tag_is_one_number_everywhere():
    assert _TAG == TAG_DROPOUT
    assert TAG_DROPOUT == 0x64726F706F757431  # "dropout1"
    header = Path(__file__).parents[1] / "csrc/include/reg_kernels/philox.h"
    assert 'kDropoutTag = rng_tag("dropout1")' in header.read_text()
