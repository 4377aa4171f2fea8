"""What the tests of every op do with a case: run it, with its gradients, and look at the ops that
it calls."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from reg_kernels import backends
from reg_kernels.cases import Case, all_cases
from reg_kernels.ops._registry import OPS, implementation_of

from support import DEVICE, DTYPES, implementations

CASES = all_cases()
SMALL = [case for case in CASES if case.small]
DIFFERENTIABLE = [c for c in SMALL if c.differentiable and not c.op.endswith("_backward")]
IN_PLACE = [case for case in SMALL if case.over]
IMPLEMENTATIONS = implementations()

on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)


def taken(op: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether an implementation of an op computes in this type. One that does not run at all here
    is skipped elsewhere."""
    whole = backends.why_not_op(op, backend, DEVICE, dtype)
    return whole is None or backends.why_not(backend, DEVICE, dtype) is not None


def of(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


def one_dtype(case: Case) -> torch.dtype:
    """One for each case, which go round."""
    return DTYPES[[c for c in CASES if c.op == case.op].index(case) % len(DTYPES)]


def cells(cases: list[Case], *dtypes: torch.dtype) -> Any:
    """(backend, dtype, case) of each; an interpreter runs small cases in one dtype each."""
    chosen = [
        pytest.param(*implementation.values, dtype, case, marks=implementation.marks, id=name)
        for implementation in IMPLEMENTATIONS
        for dtype in dtypes
        for case in cases
        if taken(case.op, *implementation.values, dtype)
        if not is_interpreted(*implementation.values)
        or (case.small and (len(dtypes) == 1 or dtype == one_dtype(case)))
        for name in [f"{implementation.values[0]}-{str(dtype).removeprefix('torch.')}-{case}"]
    ]
    return pytest.mark.parametrize(("backend", "dtype", "case"), chosen)


def one_an_op(cases: list[Case]) -> list[Case]:
    """The largest of the cases of each op."""
    return _largest({case: case.op for case in cases})


def kinds_of(cases: list[Case]) -> list[Case]:
    """The largest of those of each op that take as many inputs, in or out of their order, and give
    results of as many dimensions; of some as large the last one, which has most to it."""

    def kind(case: Case) -> tuple[Any, ...]:
        inputs = _inputs(case)
        return case.op, len(inputs), inputs[0].is_contiguous(), case.oracle(*inputs).dim()

    return _largest({case: kind(case) for case in cases if _inputs(case)[0].numel() > 1})


def _largest(kinds: dict[Case, Any]) -> list[Case]:
    size = {case: sum(x.numel() for x in _inputs(case)) for case in kinds}
    chosen: dict[Any, Case] = {}
    for case, kind in kinds.items():
        if kind not in chosen or size[case] >= size[chosen[kind]]:
            chosen[kind] = case
    return list(chosen.values())


@functools.cache
def _inputs(case: Case) -> tuple[Tensor, ...]:
    return case.inputs(torch.device("cpu"), torch.float32)


def is_interpreted(backend: str) -> bool:
    """Whether Triton's interpreter runs it: some milliseconds a program."""
    return backend == "triton" and DEVICE == "cpu"


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return case.inputs(torch.device(DEVICE), dtype)


def leaves_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().requires_grad_(case.differentiable) for x in inputs_of(case, dtype)]


def gradients(case: Case, y: Tensor, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    if not case.differentiable:
        return []
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).to(y.dtype)
    g = torch.empty_like(y).copy_(g.view(y.shape))
    return list(torch.autograd.grad(y, leaves, g, **options))


def results(case: Case, leaves: list[Tensor], backend: str) -> list[Tensor]:
    """The output and the gradients by all inputs."""
    y = case.function(*leaves, backend=backend)
    return [y.detach(), *gradients(case, y, leaves)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether all bits are, NaN for NaN."""
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(ours, theirs, strict=True)
    )


def tensors(values: Any) -> list[Tensor]:
    """Those in a nest of lists and tuples."""
    return [x.detach() for x in tree_flatten(values)[0] if isinstance(x, Tensor)]


def described(values: Any) -> list[Any]:
    """dtype, shape and strides of each tensor; a dimension of one or nothing has none."""
    return [
        (x.dtype, x.shape, [t for t, n in zip(x.stride(), x.shape, strict=True) if x.numel() > n])
        for x in tensors(values)
    ]


@dataclass(eq=False)
class Call:
    """One call of a registered op."""

    overload: Any
    args: tuple[Any, ...]
    returned: Any

    @property
    def op(self) -> str:
        return self.overload._opname

    @property
    def backend(self) -> str:
        return implementation_of(self.overload)

    @functools.cached_property
    def kind(self) -> tuple[Any, ...]:
        """Which arguments are left out, and how the first tensors are laid out."""
        flat = tree_flatten(self.args)[0]
        first = next(x for x in flat if (isinstance(x, Tensor) and x.dim() > 1) or x is flat[-1])
        left_out = tuple(
            len(x) if isinstance(x, list) else x if isinstance(x, bool) else x is None
            for x in self.args
        )
        return self.overload, left_out, isinstance(first, Tensor) and first.is_contiguous()


class Recorder(TorchDispatchMode):
    """The calls of our ops inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        returned = function(*args, **(kwargs or {}))
        if function.namespace == "reg_kernels" and function._opname in OPS:
            self.calls.append(Call(function, args, returned))
        return returned


def recorded(case: Case, backend: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Call]]:
    """The case's results, and what it calls. Another implementation is forced meanwhile in the
    backward, which has to stay with the forward's."""
    leaves = leaves_of(case, dtype)
    with Recorder() as recorder:
        y = case.function(*leaves, backend=backend)
        with backends.backend("reference" if backend == "native" else "native"):
            found = [y, *gradients(case, y, leaves)]
    return found, recorder.calls


@functools.cache
def kinds_of_calls(op: str, backend: str, dtype: torch.dtype = torch.float32) -> list[Call]:
    """One call of each kind that the small cases make of an op, on finite numbers. Where an
    interpreter runs them, of one case of each three."""
    return [call for call in _kinds_of_calls(backend, dtype) if call.op == op]


@functools.cache
def _kinds_of_calls(backend: str, dtype: torch.dtype) -> list[Call]:
    kinds: dict[Any, Call] = {}
    for case in SMALL[:: 3 if is_interpreted(backend) else 1]:
        if not taken(case.op, backend, dtype):
            continue
        found, calls = recorded(case, backend, dtype)
        if all(x.isfinite().all() for x in (*found, *inputs_of(case, dtype))):
            for call in calls:
                kinds.setdefault(call.kind, call)
    return list(kinds.values())


def copied(call: Call, args: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
    """Its arguments, or these, that may be written over; none that is would be a leaf."""
    written = {
        i
        for i, argument in enumerate(call.overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }

    def copy(x: Tensor, leaf: bool) -> Tensor:
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return y.copy_(x.detach()).requires_grad_(x.requires_grad and leaf)

    return tuple(
        tree_map_only(Tensor, functools.partial(copy, leaf=i not in written), x)
        for i, x in enumerate(call.args if args is None else args)
    )
