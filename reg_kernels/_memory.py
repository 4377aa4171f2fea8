"""Large memory that is about to be written whole, as csrc/torch/huge_pages.h asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._extension import extension


def empty_bytes(count: int) -> Tensor:
    """An uninitialised uint8 tensor (count,) on the CPU."""
    x = torch.empty(count, dtype=torch.uint8, device="cpu")
    if (module := extension()) is not None:
        module.hint_huge_pages(x.data_ptr(), count)
    return x
