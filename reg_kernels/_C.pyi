"""What csrc/python/module.cpp has."""

from typing import Any

from torch import Tensor

compiler: str
torch_version_built_with: str

def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def hint_huge_pages(address: int, bytes: int) -> None: ...
def philox4x32(key: int, counter_low: int, counter_high: int) -> tuple[int, int, int, int]: ...

# As reg_kernels/ops/_host_draws.py has them; tensors by where they lie.
def draw_words(
    key: int, epoch: int, indices: int, samples: int, groups: int, count: int, out: int
) -> None: ...
def first_rectangle(
    u: int,
    stretches: int,
    size: int,
    samples: int,
    low: float,
    span: float,
    is_crop: bool,
    out: int,
) -> int: ...

# As reg_kernels/optim/_watch.py has them.
def describe(tensors: list[Tensor]) -> bytes: ...
def look(
    known: list[Tensor],
    facts: bytes,
    states: list[dict[str, Any]],
    names: tuple[str, ...],
    grads: list[Tensor | None],
    row: memoryview,
) -> list[int] | None: ...
def holds(container: list[Any] | dict[Any, Any], expected: list[Any]) -> bool: ...
def signature(questions: tuple[Any, ...], *arguments: Any) -> bytes | None: ...
