"""The pool of ranks that the other tests stand on."""

from collections.abc import Iterator

import pytest
import torch
from process_group import Died, Ranks, die, running_ranks
from torch import distributed as dist


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks() as pool:
        yield pool


def _sum(value: int) -> tuple[int, int]:
    x = torch.tensor(value + dist.get_rank())
    dist.all_reduce(x)
    return dist.get_rank(), int(x)


def _fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("not this one")


def _dies_on(rank: int) -> str:
    if dist.get_rank() == rank:
        die()
    return "lives"


def test_results_come_in_the_order_of_ranks(ranks: Ranks) -> None:
    assert ranks(2, _sum, 10) == [(0, 21), (1, 21)]
    assert ranks(4, _sum, 0) == [(0, 6), (1, 6), (2, 6), (3, 6)]


def test_an_error_names_its_rank_and_the_pool_lives_on(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2(.|\n)*ValueError: not this one"):
        ranks(2, _fails_on, 1)
    assert ranks(2, _sum, 1) == [(0, 3), (1, 3)]


def test_a_rank_that_dies_is_told_and_replaced(ranks: Ranks) -> None:
    assert ranks.outcomes(2, _dies_on, 0) == [(False, Died(9)), (True, "lives")]
    assert ranks(2, _sum, 1) == [(0, 3), (1, 3)]
