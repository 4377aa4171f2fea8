"""Growth: the time of one op against its size, and of an optimizer's step against its tensors.

A curve consists of the benchmarks of one `series`, from small to large, in float32. Each compares
ours, by the backend that is chosen automatically, with PyTorch as "eager" (its optimizers with
`fused=True`) and with the copy of as many bytes. An op's module makes the points in
`sized(scope, elements)`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from reg_kernels import backends, bench
from reg_kernels.bench import batch_norm, cross_entropy, dropout, mixup, optimizer_step
from reg_kernels.bench._measure import EAGER, STEP, format_bytes
from reg_kernels.bench.optimizer_step import FUSED

BUDGET = bench.Budget(seconds=0.3, least=3, most=10, sample=1e-3)

SIZES = tuple(4**power for power in range(5, 15))  # elements: 2^10 to 2^28
TENSORS = (1, 10, 100, 1000, 10_000)

# Bytes an element that are alive at once: the tensors of every contender, of the copy and of the
# check. Measured by how much a process grew at 2^24 elements.
_ALIVE = {dropout: 34, mixup: 36, cross_entropy: 34, batch_norm: 80, optimizer_step: 124}
_SHARE = 0.4  # of the machine's memory, which one benchmark may take
_EAGER_DROPOUT_UP_TO = 2**26  # elements


def cases(scope: bench.Scope) -> list[bench.Benchmark]:
    """Curve by curve. A size that does not fit into memory has a reason in place of contenders."""
    scope = dataclasses.replace(scope, compiled=False)
    result = []
    for module in _ALIVE:
        for elements in SIZES:
            skipped = _skipped(module, scope.device, elements)
            for case in module.sized(scope, elements):
                words = (case.op, case.variant, "" if case.direction == STEP else case.direction)
                result.append(_point(case, scope.device, " ".join(filter(None, words)), skipped))
    for tensors in TENSORS:
        for case in optimizer_step.numbered(scope, tensors):
            result.append(_point(case, scope.device, f"{case.variant} by tensors", {}))
    return sorted(result, key=lambda case: case.series)  # a stable sort: sizes keep their order


def _skipped(module: ModuleType, device: torch.device, elements: int) -> Mapping[str, str]:
    """The contenders that are left out at a size, and why."""
    alive, there = _ALIVE[module] * elements, _SHARE * _memory(device)
    if alive > there:
        reason = f"it would hold {format_bytes(alive)}, more than {format_bytes(there)}"
        return dict.fromkeys((*backends.NAMES, EAGER), reason)
    if module is dropout and device.type == "cpu" and elements > _EAGER_DROPOUT_UP_TO:
        return {EAGER: "its forward takes seconds"}
    return {}


def _memory(device: torch.device) -> int:
    """Bytes in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _point(
    case: bench.Benchmark, device: torch.device, series: str, skipped: Mapping[str, str]
) -> bench.Benchmark:
    """`case` as a point of a curve: it has a curve's contenders and no goals."""
    with backends.backend(None):
        ours = backends.choose(case.op, device.type, case.dtype)
    names = {ours: ours, (FUSED if case.direction == STEP else EAGER): EAGER}
    none = skipped.keys() >= set(names.values())

    def prepare(device: torch.device, pool: int) -> Sequence[bench.Contender | bench.Skipped]:
        if none:  # before anything is allocated
            return [bench.Skipped(name, skipped[name]) for name in names.values()]
        entries = [
            dataclasses.replace(entry, name=names[entry.name])
            for entry in case.prepare(device, pool)
            if entry.name in names
        ]
        return [
            bench.Skipped(entry.name, skipped[entry.name]) if entry.name in skipped else entry
            for entry in entries
        ]

    return dataclasses.replace(
        case,
        prepare=prepare,
        bytes=None if none else case.bytes,
        series=series,
        peers=(),
        goals=(),
    )
