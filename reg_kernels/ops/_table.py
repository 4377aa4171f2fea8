"""What ops on lists of tensors share: the parts of them that go by a table (_tensor_table.py)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._layout import is_dense
from .._tensor_table import TensorTable, addresses
from ._registry import define_part


class TablePart:
    """What csrc/ registers for a table's tensors, and triton/ has as a function of its name."""

    def __init__(self, module: str, name: str, arguments: str) -> None:
        """`module`: of triton/; `arguments`: the schema's, behind the table's own."""
        self._native = define_part(name, f"(Tensor table, int count, int seal, {arguments}) -> ()")
        self._module, self._name = f"reg_kernels.triton.{module}", name

    def function(self, backend: str) -> Any:
        """What runs it, "native" or "triton"; a table's `head` comes first."""
        if backend == "native":
            return self._native
        return getattr(importlib.import_module(self._module), self._name)


def tables(
    tensors: Sequence[Tensor], results: Sequence[Tensor] = ()
) -> list[tuple[TensorTable, list[Tensor]]]:
    """For the tensors of each device and dtype their table, and the dense ones that its first row
    is of and that have to outlive it; its second row is of `results`, which are dense as well."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(tensors):
        kinds.setdefault((x.device, x.dtype), []).append(i)
    found = []
    for (device, dtype), places in kinds.items():
        dense = [_dense(tensors[i]) for i in places]
        rows = {"grad": addresses(dense)}
        if results:
            rows["param"] = addresses(results[i] for i in places)
        found.append((TensorTable([x.numel() for x in dense], device, (dtype,), **rows), dense))
    return found


def _dense(x: Tensor) -> Tensor:
    return x if is_dense(x) and not x.is_neg() else torch.empty_like(x).copy_(x)
