"""Whether what a step goes by is still what it was: asked of each tensor once, at every step.

csrc/python/tensor_watch.cpp has the three functions in one pass of C each; these are for where it
was not built, and say what they do.
"""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .._extension import extension
from .._tensor_table import addresses
from ._member import fits

_LAYOUT = (attrgetter("shape"), Tensor.stride, attrgetter("dtype"), attrgetter("device"))
# `p.grad`, without looking the name up for each.
gradient: Any = vars(torch._C.TensorBase)["grad"].__get__


def _facts(tensors: list[Tensor]) -> Any:
    """Where tensors lie, and how: what `look` compares with what there is then."""
    return [addresses(tensors), *(list(map(of, tensors)) for of in _LAYOUT)]


def look(
    known: list[Tensor],
    facts: Any,
    states: list[dict[str, Any]],
    names: tuple[str, ...],
    grads: list[Tensor | None],
    row: memoryview,
) -> list[int] | None:
    """Looks at parameters and their state, and takes in their gradients.

    Args:
        known: of each parameter itself, the dense tensor that the kernels take for it, and its
            state of `names`, as they were.
        facts: what `describe` said of them then.
        states: the state of each parameter, as the optimizer has it.
        names: which of it is looked at.
        grads: where the gradients go, one for each parameter; empty where none is wanted.
        row: where their addresses go, as many.

    Returns:
        The places of those gradients that the kernels cannot take beside the dense tensors as they
        are. None where anything else is no longer what it was, or there is no gradient.
    """
    width = 2 + len(names)
    for i, name in enumerate(names, start=2):
        if not all(map(is_, (s.get(name) for s in states), known[i::width])):
            return None
    if _facts(known) != facts:
        return None
    if not grads:
        return []
    grads[:] = map(gradient, known[::width])
    odd = []
    for i, (grad, dense) in enumerate(zip(grads, known[1::width], strict=True)):
        if grad is None:
            return None
        if grad.layout != torch.strided or grad.shape != dense.shape:
            odd.append(i)
            continue
        row[i] = grad.data_ptr()
        if not fits(grad, dense, dense.dtype):
            odd.append(i)
    return odd


def holds(container: list[Any] | dict[Any, Any], expected: list[Any]) -> bool:
    """Whether a list, or a dictionary in its order, has these very objects and no others."""
    values = container.values() if isinstance(container, dict) else container
    return len(values) == len(expected) and all(map(is_, values, expected))


def _in_c() -> Any:
    """The three of csrc/python/tensor_watch.cpp, or None where they are not there."""
    module = extension()
    try:
        module.describe([])  # type: ignore[union-attr]  # raises without a DLPack exchange
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return module.describe, module.look, module.holds  # type: ignore[union-attr]


IN_PYTHON = (_facts, look, holds)
IN_C = _in_c()
describe, look, holds = IN_C or IN_PYTHON
