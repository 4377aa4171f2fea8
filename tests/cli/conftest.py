"""Images to train on, for the commands that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


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
