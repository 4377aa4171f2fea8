"""Checks every op, implementation and dtype on this machine against the fp64 reference.

The error of an output or a gradient may be twice the error of PyTorch's own arithmetic for the same
formula in the same dtype, plus one rounding of that dtype. float64 must pass gradcheck as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _console, backends
from .._dtypes import named
from ..cases import Case, all_cases
from ._device import device_from, forced_implementations
from ._errors import UsageError
from ._files import output_file, write_output


@dataclass
class Result:
    """The worst figures of an op's cases in one implementation and dtype.

    `error` and `allowed` are absolute, and come from the case that uses most of its allowance.
    """

    op: str
    backend: str
    device: str
    dtype: str
    cases: int
    worst_case: str
    error: float
    allowed: float
    gradcheck: bool | None  # None where the dtype is not float64, or there is no gradient
    message: str = ""  # what went wrong, where it is not a figure

    @property
    def ok(self) -> bool:
        return not self.message and self.error <= self.allowed and self.gradcheck is not False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", action="append", help="check this op only; may be given again (default: all)"
    )
    parser.add_argument(
        "--backend",
        choices=backends.NAMES,
        action="append",
        help="check this implementation only; may be given again (default: what "
        "REG_KERNELS_BACKEND forces, else all that run here)",
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: the GPU where torch sees one, else the CPU)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> int:
    device = device_from(args.device)
    names = _ops(args.op)
    if args.json is not None:
        output_file("--json", args.json)
    chosen = list(_implementations(args.backend, device))
    every = [(n, b, d) for n in names for b in chosen for d in backends.DTYPES]
    work = [w for w in every if backends.why_not_op(*w[:2], device.type, w[2]) is None]
    results = []
    with _console.progress() as progress:
        bar = progress.add_task("", total=len(work))
        for name, backend, dtype in work:
            progress.update(bar, description=f"{name} {backend} {named(dtype)}")
            results.append(check(name, backend, device, dtype))
            progress.advance(bar)
    _print(results)
    if args.json is not None:
        text = json.dumps([asdict(r) | {"ok": r.ok} for r in results], indent=1) + "\n"
        write_output("--json", args.json, lambda path: path.write_text(text))
    over = [r for r in results if not r.ok]
    for r in over:  # in full: a table may have to cut
        what = r.message or f"error {r.error:.3e}, allowed {r.allowed:.3e}, in {r.worst_case}"
        print(f"{r.op} {r.backend} {r.dtype}: {what}")
    print(f"{len(results) - len(over)} passed, {len(over)} failed")
    return 1 if over else 0


def _ops(wanted: list[str] | None) -> list[str]:
    """The ops that `--op` names; one that works in place alone needs no underscore."""
    known = sorted({case.op for case in all_cases()})
    found = [name if name in known else f"{name}_" for name in wanted or known]
    for name, op in zip(wanted or known, found, strict=True):
        if op not in known:
            raise UsageError(f"--op must be one of {', '.join(known)}, got {name!r}")
    return found


def _implementations(wanted: list[str] | None, device: torch.device) -> Iterator[str]:
    if forced := forced_implementations(wanted or (), device):
        yield from forced
        return
    for name in backends.NAMES:
        reason = backends.why_not(name, device.type, torch.float32)
        if reason is None:
            yield name
        else:
            print(f"{name}: not checked: {reason}")


def check(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Result:
    """Runs the cases of one op in one implementation and dtype."""
    interpreted = backend == "triton" and device.type == "cpu"
    cases = [c for c in all_cases() if c.op == op and (c.small or not interpreted)]
    result = Result(op, backend, str(device), named(dtype), 0, "", 0, 0, None)
    worst = -1.0
    try:
        for case in cases:
            error, allowed = measure(case, backend, device, dtype)
            result.cases += 1
            # A NaN in the error or in what is allowed counts as the worst.
            share = error / allowed if allowed else (0.0 if error == 0 else float("inf"))
            if not share <= worst and worst == worst:
                worst, result.worst_case = share, case.name
                result.error, result.allowed = error, allowed
        checked = [c for c in cases if c.small and c.differentiable]
        if dtype == torch.float64 and checked:
            result.gradcheck = all(gradcheck(c, backend, device) for c in checked)
    except Exception as error:  # a crash of one implementation is a result, not the end
        result.message = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def measure(
    case: Case, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """The largest error of output and gradients, and what is allowed for it.

    Twice PyTorch's error in this dtype is allowed, plus a rounding of the largest value. A rounding
    is half an ulp. It is a whole one where the op adds in another order than its oracle does, and
    for bfloat16 in Triton's interpreter, which truncates. In float64 PyTorch's result is the truth
    itself; sums in another order may differ from it by 256 roundings.
    """
    inputs = case.inputs(device, dtype)
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = case.oracle(*exact_inputs)
    grad = torch.linspace(-1, 1, exact.numel(), device=device).to(dtype).view(exact.shape)

    def outputs(function: Any, *tensors: Tensor) -> list[Tensor]:
        y = function(*tensors)
        if not case.differentiable:
            return [y]
        # The incoming gradient has the output's layout, as autograd's own usually does.
        g = torch.empty_like(y).copy_(grad)
        return [y, *torch.autograd.grad(y, tensors, g)]

    def detached() -> list[Tensor]:
        return [x.detach().requires_grad_() for x in inputs]

    truth = outputs(case.oracle, *exact_inputs)
    theirs = outputs(case.oracle, *detached())
    ours = outputs(lambda *t: case.function(*t, backend=backend), *detached())
    error, baseline = _distance(ours, truth), _distance(theirs, truth)
    # Values that are not finite must be the same, and do not count as the largest.
    finite = [t.detach().nan_to_num(0.0, 0.0, 0.0) for t in truth]
    largest = max((float(t.abs().max()) for t in finite if t.numel()), default=0.0)
    truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    roundings = 0.5 if case.exact and not truncates else 1.0
    if dtype == torch.float64 and not case.exact:
        roundings = 256.0
    rounding = torch.finfo(dtype).eps * roundings
    return error, 2 * baseline + rounding * largest


def _distance(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference anywhere; NaN where one is NaN, which Python's max would lose."""
    worst = []
    for a, b in zip(results, truth, strict=True):
        a, b = a.detach().double(), b.detach().double()
        same = (a == b) | (a.isnan() & b.isnan())  # infinities, too
        if a.numel():
            worst.append(torch.where(same, torch.zeros_like(a), (a - b).abs()).max())
    return float(torch.stack(worst).max()) if worst else 0.0


def gradcheck(case: Case, backend: str, device: torch.device) -> bool:
    """torch.autograd.gradcheck and gradgradcheck of the case in float64."""
    inputs = [x.detach().requires_grad_() for x in case.inputs(device, torch.float64)]
    interpreted = backend == "triton" and device.type == "cpu"
    size = sum(x.numel() for x in inputs)
    if inputs[0].numel() > (3 if interpreted else 64) or size > 200:
        # Numerical gradients call the op twice an element; past this size one direction has to do.
        return torch.autograd.gradcheck(
            lambda *t: case.function(*t, backend=backend), inputs, fast_mode=True
        )

    def function(*tensors: Tensor) -> Tensor:
        return case.function(*tensors, backend=backend)

    return torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(
        function, inputs
    )


def _print(results: list[Result]) -> None:
    # Narrow enough for 80 columns; how many cases and which was the worst is in the JSON.
    verdicts = {None: "", True: "passed", False: "FAILED"}
    columns = ("op", "backend", "dtype", "error", "allowed", "grad")
    rows = [
        (r.op, r.backend, r.dtype, f"{r.error:.2e}", f"{r.allowed:.2e}", verdicts[r.gradcheck])
        for r in results
    ]
    title = "errors against the fp64 reference"
    _console.print_table(title, columns, rows, words=3, narrow=True)
