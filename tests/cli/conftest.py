"""Images to train on, for the commands that train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 noisy images of three classes, told apart by which row is bright."""
    rng = np.random.default_rng(0)
    y = np.arange(100) % 3
    x = rng.normal(size=(100, 6, 5))
    x[np.arange(100), y] += 1
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x=x.astype(np.float32), y=y)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost these nets more than they give, above all where other work keeps the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
