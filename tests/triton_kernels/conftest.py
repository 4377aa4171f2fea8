"""What tests of Triton kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN or 255, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["kept", "looped"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the tilings of losses.TILINGS: that module needs Triton, which may be missing."""
    if request.param == "looped":
        from losses import small_tiles

        small_tiles(monkeypatch)
