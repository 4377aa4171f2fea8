"""The calls whose launches are compiled: those of each op, on large inputs of one dtype."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import reg_kernels.functional as F
from reg_kernels import backends, optim
from reg_kernels._augment_program import Filter, Op, instruction
from reg_kernels._mixed_target import MixedTarget
from reg_kernels.cases import all_cases
from reg_kernels.ops import _batch_norm_ops as ops
from reg_kernels.ops import augment
from reg_kernels.ops.subset import Subset, add_of_subset

BACKEND = "triton"
Call = tuple[str, Callable[[], Any]]  # its name, and the call

IMAGES = (8, 64, 32, 32)
LAYOUTS = ((False, "contiguous"), (True, "channels_last"))


def _values(dtype: torch.dtype, *shape: int, last: bool = False) -> Tensor:
    x = torch.zeros(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return x.requires_grad_()


def _both(y: Tensor) -> None:
    y.backward(torch.full_like(y, 0.5))  # not 1, which asks for no rescaling


def _dropout(dtype: torch.dtype) -> Iterator[Call]:
    yield "1d", lambda: F.dropout(_values(dtype, 2**16), backend=BACKEND)
    for last, layout in LAYOUTS:
        x = _values(dtype, *IMAGES, last=last)
        yield f"2d {layout}", lambda x=x: F.dropout2d(x, backend=BACKEND)


def _penalty(dtype: torch.dtype) -> Iterator[Call]:
    for name, penalty in (("l1", F.l1_penalty), ("l2", F.l2_penalty)):
        x = _values(dtype, 2**16)
        yield name, lambda penalty=penalty, x=x: _both(penalty([x], backend=BACKEND))


class _OnDevice(Tensor):
    """A learning rate that a step takes for one on the GPU."""

    is_cuda = True


def _optimizer_step(dtype: torch.dtype) -> Iterator[Call]:
    def step(kind: Any, everything: bool = False, **options: Any) -> None:
        """One step; with `everything` it has all that a launch may be handed: two groups too, and a
        parameter that is only averaged."""
        params = [torch.nn.Parameter(_values(dtype, 2**16).detach()) for _ in range(3)]
        for parameter in params[:2]:
            parameter.grad = torch.zeros_like(parameter)
        groups: list[Any] = [{"params": params[:1]}]
        if everything:
            groups[0]["lr"] = torch.tensor(0.1).as_subclass(_OnDevice)
            groups.append({"params": params[1:]})
            options |= {"ema_decay": 0.9, "max_grad_norm": 1.0, "l1": 0.1}
        optimizer = kind(groups, **options, backend=BACKEND)
        if everything:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)
        optimizer.step()

    def capture() -> None:
        """The further launch of a step whose lr is on the device while a graph is captured."""
        from reg_kernels.triton import optimizer_step

        row = [0.0] * optimizer_step.NUMBERS
        optimizer_step._on_device([row], [0], torch.device("cpu"), capturing=True)

    roundings = ["nearest"]
    roundings += ["kahan"] if dtype.itemsize == 2 else []
    roundings += ["stochastic"] if dtype == torch.bfloat16 else []
    moments = {2: [None, torch.float32], 4: [None, torch.bfloat16]}.get(dtype.itemsize, [None])
    for name, kind, own in (
        ("adamw", optim.AdamW, {"lr": 0.1}),
        ("sgdw", optim.SGDW, {"lr": 0.1, "momentum": 0.9}),
    ):
        for rounding, state in itertools.product(roundings, moments):
            options = {**own, "rounding": rounding, "state_dtype": state}
            words = [name, rounding] if rounding != "nearest" else [name]
            words += [f"moments {str(state).removeprefix('torch.')}"] if state else []
            for everything in (False, True):
                yield (
                    " ".join([*words, "everything"] if everything else words),
                    lambda kind=kind, options=options, everything=everything: step(
                        kind, everything, **options
                    ),
                )
    yield "capture", capture


def _mixup(dtype: torch.dtype) -> Iterator[Call]:
    index, lam = torch.arange(8).roll(1), torch.rand(8)

    def mix(last: bool = False, **options: Any) -> Tensor:
        x = _values(dtype, *IMAGES, last=last)
        x = x.detach() if "inplace" in options else x
        return F.mixup(x, lam, index, **options, backend=BACKEND)

    for last, layout in LAYOUTS:
        yield f"mixup {layout}", lambda last=last: _both(mix(last))
    to_last = {"memory_format": torch.channels_last}
    yield "mixup contiguous to channels_last", lambda: _both(mix(**to_last))
    yield "mixup in place", lambda: mix(inplace=True)


def _augment(dtype: torch.dtype) -> Iterator[Call]:
    """Of a crop, what needs a statistic, and what draws: two segments, of the input and of
    scratch. A kernel has all instructions, whichever a program has."""
    program = [
        instruction(Op.BOX, 0, 0, 200, 200, 224, 224, 1, Filter.BILINEAR_ANTIALIAS),
        instruction(Op.CONTRAST, 0.5, 0.5),
        instruction(Op.NORMALIZE, 1, 1, 1),
    ]

    def of(channels: int, source: torch.dtype, result: torch.dtype, last: bool, exact: bool) -> Any:
        pixels = torch.zeros(channels * 256 * 256).to(source)
        layout = (channels, last, 224, 224, result, not last, exact)
        images = torch.tensor([[0, 256, 256]])
        return lambda: augment.run(pixels, images, torch.tensor([program]), *layout, BACKEND)

    if dtype == torch.float64:  # which it does not take
        return
    yield "bytes", of(3, torch.uint8, dtype, True, False)
    yield "floats", of(3, dtype, dtype, False, False)
    if dtype == torch.float32:
        yield "bytes of 1 channel", of(1, torch.uint8, dtype, True, False)
        yield "bytes exact", of(3, torch.uint8, torch.uint8, True, True)


def _batch_norm(dtype: torch.dtype) -> Iterator[Call]:
    small, large = (32, 64, 16, 16), (64, 64, 56, 56)

    def norm(shape: tuple[int, ...], last: bool, training: bool) -> None:
        parameters = dtype if dtype == torch.float64 else torch.float32
        zero, one = torch.zeros(64, dtype=parameters), torch.ones(64, dtype=parameters)
        weight = one.clone().requires_grad_()
        x = _values(dtype, *shape, last=last)
        _both(F.batch_norm(x, zero, one, weight, zero, training, backend=BACKEND))

    for name, *arguments in (
        ("training small contiguous", small, False, True),
        ("training large contiguous", large, False, True),
        ("training large channels_last", large, True, True),
        ("inference large contiguous", large, False, False),
    ):
        yield name, lambda arguments=arguments: norm(*arguments)

    def of_ranks() -> None:
        """The forward and the backward of a rank, as if there were two like it."""
        x = _values(dtype, *large).detach()
        where = (x.device, dtype, BACKEND)
        gathered = torch.stack([ops.MOMENTS.overload(*where)(x)] * 2)
        training = ops.Training([], None, 1e-5, 0, 0.0, 0.0, None, 0, False, gathered)
        y, mean, invstd, _ = ops.TRAINING.overload(*where)(x, None, None, None, *training)
        saved = (y, x, None, None, None, mean, invstd, None)
        sums = ops.SUMS.overload(*where)(*saved, 0, 0.0, 0.0)
        wants = (True, 0, 0.0, 0.0, True, False, False)
        ops.BACKWARD.overload(*where)(*saved, None, 0, *wants, sums)

    yield "of ranks large contiguous", of_ranks


def _loss(dtype: torch.dtype, loss: Callable[..., Tensor]) -> Iterator[Call]:
    labels = torch.zeros(256, dtype=torch.int64)

    def of(*shape: int, target: Any = labels, **options: Any) -> Callable[[], None]:
        return lambda: _both(loss(_values(dtype, *shape), target, **options, backend=BACKEND))

    yield "1000 classes", of(256, 1000)
    yield "32000 classes", of(256, 32000)
    yield "of each", of(256, 1000, reduction="none")  # its gradient is made in the backward
    yield "planes", of(*IMAGES, target=torch.zeros(8, 32, 32, dtype=torch.int64))
    yield "mixed", of(256, 1000, target=MixedTarget(labels, labels, torch.rand(256), 0.1))


def _adversarial_step(dtype: torch.dtype) -> Iterator[Call]:
    def step(norm: str, last: bool, **options: Any) -> None:
        adv, grad, clean = (_values(dtype, *IMAGES, last=last).detach() for _ in range(3))
        F.adversarial_step_(
            adv, grad, clean, 0.1, torch.rand(8), norm, 0, 1, **options, backend=BACKEND
        )

    for norm in ("linf", "l2", "l1"):
        yield norm, lambda norm=norm: step(norm, False)
        for last, layout in LAYOUTS:
            yield (
                f"{norm} normalised {layout}",
                lambda norm=norm, last=last: step(norm, last, mean=0.5, std=0.25),
            )


def _subset(dtype: torch.dtype) -> Iterator[Call]:
    subset = Subset(torch.arange(4), torch.arange(4, 8))
    yield (
        "residual branch",
        lambda: _both(
            add_of_subset(_values(dtype, *IMAGES), lambda x: x, subset, 2.0, backend=BACKEND)
        ),
    )


def _distillation(x: Tensor, target: Any, **options: Any) -> Tensor:
    return F.distillation_loss(x, x.detach(), target, **options)


CALLS: dict[str, Callable[[torch.dtype], Iterator[Call]]] = {
    "adversarial_step": _adversarial_step,
    "augment": _augment,
    "batch_norm": _batch_norm,
    "cross_entropy": lambda dtype: _loss(dtype, F.cross_entropy),
    "distillation": lambda dtype: _loss(dtype, _distillation),
    "dropout": _dropout,
    "mixup": _mixup,
    "optimizer_step": _optimizer_step,
    "penalty": _penalty,
    "subset": _subset,
}


def of_cases(op: str, dtype: torch.dtype) -> Iterator[Call]:
    """The calls of the op's large cases, with their gradients."""

    def run(case: Any) -> None:
        inputs = case.inputs(torch.device("cpu"), dtype)
        y = case.function(*[x.requires_grad_(case.differentiable) for x in inputs], backend=BACKEND)
        if y.requires_grad:
            _both(y)

    if backends.why_not_op(op, BACKEND, "cpu", torch.promote_types(dtype, torch.float32)):
        return
    for case in all_cases():
        parts = r"(_|_inference|_backward|_add|_moments|_sums)?"
        if not case.small and re.fullmatch(rf"(feature_)?{op}{parts}", case.op):
            yield f"{case.op}[{case.name}]", lambda case=case: run(case)


def calls(op: str, dtype: torch.dtype) -> Iterator[Call]:
    """The calls that stand for an op in the table. Some have none: one op stands for a family."""
    yield from CALLS[op](dtype) if op in CALLS else ()


def some_calls(op: str, dtype: torch.dtype, architecture: int) -> list[Call]:
    """Enough of an op's calls and cases to see what spills. On sm_90: the calls in every dtype, and
    each case in every other dtype. On other architectures: each call and case in one dtype."""
    stand_for_it, turn = list(calls(op, dtype)), backends.DTYPES.index(dtype)
    if architecture == 90:
        return stand_for_it + list(of_cases(op, dtype))[turn % 2 :: 2]
    return (stand_for_it + list(of_cases(op, dtype)))[turn::4]
