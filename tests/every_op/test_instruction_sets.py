"""A regression guard, and the one timed test: no instruction set falls behind the others.

A machine with AVX-512 that runs its AVX2 code is no AVX2 machine. Yet what a compiler makes badly
for one instruction set alone (values kept in memory, scalar code for a choice) is many times slower
on either, and the tests of values cannot see it. Of each pair of instruction sets the narrower may
take at most twice the time that its vectors explain, and the wider may not lose more than a little.

Timed is the processor's time of this thread, on inputs that a second-level cache holds, the
instruction sets in turns. `make test` runs it by itself, after the others. What a call costs beside
its loops is taken off: that of a small one.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reg_kernels import functional as F
from reg_kernels import optim
from reg_kernels._augment_program import Filter, Op, WarpFilter, instruction
from reg_kernels._mixed_target import MixedTarget
from reg_kernels.ops.augment import run
from reg_kernels.ops.subset import Subset, add_of_subset

from support import DTYPES, isas

pytestmark = pytest.mark.skipif(len(isas()) < 2, reason="there are no two instruction sets")

WIDTH = {"baseline": 16, "neon": 16, "avx2": 32, "avx512": 64}  # bytes of a vector
PAIRS = tuple(itertools.permutations(isas(), 2))  # what may have fallen behind, and the other one
BEYOND_WIDTH = 2.0  # times slower that the narrower may be
LOST_BY_WIDTH = 1.5  # and the wider

BYTES, FEW = 2**18, 2**14  # of an input
ROUNDS, SAMPLE = 5, 150e-6  # seconds of a sample, of several calls where they are short
PAUSES = (0.0, 0.1, 0.5, 1.0, 2.0)  # seconds before each try; whoever disturbs it may be gone then
NOISE = 0.05  # of a call's time

# What the baseline of x86 lacks, and so may take as many times longer again.
NO_CONVERSION = 4.0  # of float16, which is a dozen integer instructions a value, in and out
NO_MULTIPLY_ADD = 4.0  # in float by way of double, in double a call for each value
# Which multiply and add so.
FUSED = ("cross_entropy", "distillation", "gaussian_noise", "AdamW", "SGDW")


class Timed(NamedTuple):
    """A call, and the gradients that it leads to, if any."""

    forward: Callable[[], Any]
    sources: tuple[Tensor, ...] = ()


Make = Callable[[torch.dtype, int], Timed]  # for so many elements
LAYOUTS = ("planes", "odd planes", "channels_last", "rows")


def shapes(n: int) -> dict[str, tuple[int, ...]]:
    """N, C, then H, W: planes of whole vectors and of odd lengths, channels last, and features."""
    images, odd = (max(1, n // 2048), 16, 8, 16), (max(1, n // 784), 16, 7, 7)
    return {"planes": images, "odd planes": odd, "channels_last": images, "rows": (n // 64, 64)}


def stored(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def of_batch_norm() -> Iterator[tuple[str, Make]]:
    def norm(layout: str, activation: str | None, residual: bool, drop: float) -> Make:
        def make(dtype: torch.dtype, n: int) -> Timed:
            shape = shapes(n)[layout]
            x, *more = (
                stored(torch.randn(shape, dtype=dtype), layout) for _ in range(1 + residual)
            )
            affine = [torch.rand(shape[1], dtype=max_float(dtype)).requires_grad_() for _ in "wb"]
            added = more[0] if residual else None
            how = {"activation": activation, "drop": drop}
            return Timed(
                lambda: F.batch_norm_act(x, None, None, *affine, added, True, **how),
                (x, *affine, *more),
            )

        return make

    for layout in LAYOUTS:
        for activation, residual, drop in (
            *((None, False, 0.0), (None, True, 0.0)),
            *itertools.product(["relu"], (False, True), (0.0, 0.1)),
            *(("silu", False, 0.0), ("silu", True, 0.1), ("gelu", False, 0.0)),
        ):
            chain = [activation or "", "residual" * residual, "dropout" * bool(drop)]
            yield (
                " ".join(filter(None, ["batch_norm", layout, *chain])),
                norm(layout, activation, residual, drop),
            )

    def frozen(layout: str) -> Make:
        def make(dtype: torch.dtype, n: int) -> Timed:
            x = stored(torch.randn(shapes(n)[layout], dtype=dtype), layout).detach()
            channels = torch.rand(x.shape[1], dtype=max_float(dtype))
            return Timed(lambda: F.batch_norm_act(x, *[channels] * 4))

        return make

    for layout in LAYOUTS:
        yield f"batch_norm_inference {layout}", frozen(layout)


def max_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def of_one_input() -> Iterator[tuple[str, Make]]:
    """What is called on one tensor of floats, and perhaps others that get no gradient."""

    def on(
        shape: Callable[[int], tuple[int, ...]],
        function: Callable[..., Tensor],
        others: Callable[[Tensor], tuple[Any, ...]] = lambda x: (),
    ) -> Make:
        def make(dtype: torch.dtype, n: int) -> Timed:
            x = torch.rand(shape(n), dtype=dtype).requires_grad_()
            given = others(x)
            return Timed(lambda: function(x, *given), (x,))

        return make

    def samples(n: int) -> tuple[int, ...]:
        return (8, 4, 16, n // 512)

    def planes(n: int) -> tuple[int, ...]:
        return shapes(n)["planes"]

    def rows(n: int) -> tuple[int, ...]:
        return (n // 1024, 1024)

    yield "dropout", on(lambda n: (n,), lambda x: F.dropout(x, 0.1))
    yield "dropout2d", on(planes, lambda x: F.dropout2d(x, 0.1))
    for name, noise in (("gaussian_noise", F.gaussian_noise), ("uniform_noise", F.uniform_noise)):
        relative = functools.partial(noise, multiplicative=True)  # which has a backward
        yield name, on(lambda n: (n,), lambda x, noise=relative: noise(x, 0.1))
    yield "salt_and_pepper", on(lambda n: (n,), lambda x: F.salt_and_pepper(x, 0.1))
    yield "drop_path", on(samples, lambda x: F.drop_path(x, 0.1))
    # Its factors are one beside the other, and in runs.
    for scale in ((-1,), (16, 1)):
        yield (
            f"drop_path layer scale {scale}",
            on(
                samples,
                lambda x, g: F.drop_path(x, 0.1, layer_scale=g),
                lambda x, scale=scale: (torch.ones(scale if scale[0] > 0 else x.shape[-1]),),
            ),
        )
    yield (
        "drop_path residual",
        on(samples, lambda x, r: F.drop_path(x, 0.1, residual=r), lambda x: (torch.rand_like(x),)),
    )

    subset = Subset(torch.arange(0, 8, 2), torch.arange(1, 8, 2))
    yield "subset", on(samples, lambda x: add_of_subset(x, lambda x: x, subset, 2.0))

    partners = torch.arange(8).flip(0)
    boxes = torch.tensor([[1, 1, 3, 9]] * 8)
    yield "mixup", on(samples, lambda x: F.mixup(x, 0.3, partners))
    yield (
        "mixup of each sample",
        on(
            samples,
            lambda x, lam: F.mixup(x, lam, partners),
            lambda x: (torch.rand(8, dtype=max_float(x.dtype)),),
        ),
    )
    yield "cutmix", on(samples, lambda x: F.cutmix(x, boxes, partners))

    def labels(x: Tensor) -> Tensor:
        return (
            torch.arange(x.numel() // x.shape[1]).remainder(x.shape[1]).view(len(x), *x.shape[2:])
        )

    for name, shape in (("", rows), (" planes", planes)):
        yield f"cross_entropy{name}", on(shape, F.cross_entropy, lambda x: (labels(x),))
        yield (
            f"distillation{name}",
            on(shape, F.distillation_loss, lambda x: (torch.rand_like(x), labels(x))),
        )
    yield (
        "cross_entropy smoothed",
        on(rows, lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1), lambda x: (labels(x),)),
    )
    yield (
        "cross_entropy pair",
        on(rows, F.cross_entropy, lambda x: (MixedTarget(labels(x), labels(x).flip(0), 0.3),)),
    )
    yield (
        "cross_entropy probabilities",
        on(rows, F.cross_entropy, lambda x: (torch.rand_like(x).softmax(1),)),
    )
    yield (
        "distillation at another temperature",
        on(
            rows,
            lambda *a: F.distillation_loss(*a, temperature=1.5),
            lambda x: (torch.rand_like(x), labels(x)),
        ),
    )
    yield "l1_penalty", on(lambda n: (n,), lambda x: F.l1_penalty([x]))
    yield "l2_penalty", on(lambda n: (n,), lambda x: F.l2_penalty([x]))

    def from_bytes(memory_format: torch.memory_format) -> Make:
        def make(dtype: torch.dtype, n: int) -> Timed:
            x = torch.randint(256, samples(n), dtype=torch.uint8)
            how = {"mean": 0.4, "std": 0.2, "dtype": dtype, "memory_format": memory_format}
            return Timed(lambda: F.mixup(x, 0.3, partners, **how))

        return make

    def attacked(norm: str, layout: str, **options: Any) -> Make:
        def make(dtype: torch.dtype, n: int) -> Timed:
            shape = shapes(n)[layout]
            clean, way, grad = (stored(torch.rand(shape), layout).detach() for _ in range(3))
            adv, grad, clean = (x.to(dtype) for x in (clean + 0.2 * way, grad - 0.5, clean))
            eps = {"linf": 0.1, "l2": 5.0, "l1": 50.0}[norm]
            rest = (grad, clean, eps / 4, eps, norm, 0.0, 1.0)
            # From the same start each time, since in L1 that decides about the turns.
            start = adv.clone()
            return Timed(lambda: F.adversarial_step_(adv.copy_(start), *rest, **options))

        return make

    for norm in ("linf", "l2", "l1"):
        yield f"adversarial_step {norm}", attacked(norm, "planes")
        for layout in ("planes", "channels_last"):
            name = f"adversarial_step {norm} {layout} normalised"
            yield name, attacked(norm, layout, mean=0.5, std=0.25)

    yield "mixup of bytes", from_bytes(torch.contiguous_format)
    yield "mixup of bytes channels_last", from_bytes(torch.channels_last)


def of_optimizers() -> Iterator[tuple[str, Make]]:
    def step(algorithm: str, options: dict[str, float]) -> Make:
        def make(dtype: torch.dtype, n: int) -> Timed:
            p = torch.randn(n, dtype=dtype).requires_grad_()
            p.grad = torch.randn_like(p)
            return Timed(getattr(optim, algorithm)([p], lr=1e-6, **options).step)

        return make

    for algorithm, own in (("AdamW", {}), ("SGDW", {"momentum": 0.9})):
        for option in ({}, {"l1": 1e-3}, {"max_grad_norm": 1.0}, {"ema_decay": 0.999}):
            yield " ".join([algorithm, *option]), step(algorithm, {**own, **option})


def of_images() -> Iterator[tuple[str, Make]]:
    """Programs of augmentation, from bytes; float64 is the reference's, and bytes stand for it."""

    def on(program: Callable[[int], list[list[float]]], channels_last: bool = False) -> Make:
        def make(dtype: torch.dtype, n: int) -> Timed:
            side = 16 * round((n / 3) ** 0.5 / 16)
            pixels = torch.randint(256, (3 * side * side,), dtype=torch.uint8)
            images, rows = torch.tensor([[0, side, side]]), torch.tensor([program(side)])
            to = torch.uint8 if dtype == torch.float64 else dtype
            given = (pixels, images, rows, 3, channels_last, side, side, to, False, False)
            return Timed(lambda: run(*given))

        return make

    def crop(side: int) -> list[list[float]]:
        region = (0, 0, side - side // 8, side - side // 8)
        how = (side, side, 1, Filter.BILINEAR_ANTIALIAS, 0)
        scale = instruction(Op.NORMALIZE, *[0.01] * 4, *[0.5] * 4)
        return [instruction(Op.BOX, *region, *how), scale]

    def warp(side: int) -> list[list[float]]:
        turn = (0.98, -0.17, 3.0, 0.17, 0.98, -3.0, 0.0, 0.0, 1.0)
        return [instruction(Op.WARP, *turn, side, side, WarpFilter.BILINEAR)]

    for last in (False, True):
        name = " channels_last" if last else ""
        yield f"augment crop{name}", on(crop, channels_last=last)
        yield f"augment warp{name}", on(warp, channels_last=last)
    blends = [instruction(Op.SATURATION, 1.2, -0.2), instruction(Op.CONTRAST, 0.9, 0.1)]
    yield "augment colour", on(lambda side: [instruction(Op.HUE, 0.1), *blends])
    yield "augment blur", on(lambda side: [instruction(Op.BLUR, 0, 5, 0.2, *[0.08] * 5)])


CALLS: dict[str, Make] = dict(
    itertools.chain(of_batch_norm(), of_one_input(), of_optimizers(), of_images())
)


def directions(name: str, dtype: torch.dtype, size: int) -> dict[str, Callable[[], Any]]:
    """The forward and, where there are gradients, the backward, of an input of `size` bytes."""
    call = CALLS[name](dtype, size // max(4, dtype.itemsize))
    found = {"forward": call.forward}
    if call.sources:
        y = call.forward()
        g = torch.rand_like(y)
        found["backward"] = lambda: torch.autograd.grad(y, call.sources, g, retain_graph=True)
    return found


class Clock:
    """The least time of a call, for each instruction set, of all rounds so far."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self.least = dict.fromkeys(isas(), float("inf"))

    def run(self, call: Callable[[], Any], rounds: int) -> None:
        from reg_kernels import _C

        for _, isa in itertools.product(range(rounds), self.least):
            _C.set_isa(isa)
            call()  # wakes the caches
            calls = self._calls.setdefault(isa, 1)
            begin = time.thread_time()
            for _ in range(calls):
                call()
            taken = (time.thread_time() - begin) / calls
            self.least[isa] = min(self.least[isa], taken)
            self._calls[isa] = max(1, int(SAMPLE / self.least[isa]))


def bound(name: str, dtype: torch.dtype, slower: str, faster: str) -> float:
    if WIDTH[slower] > WIDTH[faster]:
        return LOST_BY_WIDTH
    times = BEYOND_WIDTH * WIDTH[faster] / WIDTH[slower]
    if slower == "baseline":
        if dtype == torch.float16:
            times *= NO_CONVERSION
        elif name.startswith(FUSED):
            times *= NO_MULTIPLY_ADD
    return times


@pytest.fixture(autouse=True)
def _one_thread_warm_memory_and_the_best_instruction_set_again() -> Iterator[None]:
    from reg_kernels import _C

    threads, best = torch.get_num_threads(), _C.isa()
    torch.set_num_threads(1)
    torch.empty(24 * 2**20, dtype=torch.uint8)  # once it is freed, glibc keeps less than that
    yield
    torch.set_num_threads(threads)
    _C.set_isa(best)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CALLS)
def test_no_instruction_set_falls_behind(name: str, dtype: torch.dtype) -> None:
    small, large = (directions(name, dtype, size) for size in (FEW, BYTES))
    for direction in large:
        few, many, held = Clock(), Clock(), []
        for pause in PAUSES:
            time.sleep(pause)
            few.run(small[direction], 2)
            many.run(large[direction], ROUNDS)
            found = behind(name, dtype, few.least, many.least)
            if not found:
                break
            # Where the tensors lie may suit one set's accesses only: the next try has other memory.
            held.append(large)
            large = directions(name, dtype, BYTES)
        assert not found, "\n".join(f"{name}, {dtype}, {direction}: {text}" for text in found)


def behind(
    name: str, dtype: torch.dtype, small: dict[str, float], large: dict[str, float]
) -> list[str]:
    """What was measured of the pairs of which the first is too slow, by the times of a small and a
    large call."""
    loop = {isa: large[isa] - min(small.values()) for isa in large}
    found = []
    for pair in PAIRS:
        slower, faster = (loop[isa] for isa in pair)
        limit, noise = bound(name, dtype, *pair), NOISE * large[pair[0]]
        if slower > limit * faster + noise:
            times = " and ".join(f"{isa} {loop[isa] * 1e6:.1f} µs" for isa in pair)
            found.append(f"{times}, {slower / faster:.2f} times as long, allowed are {limit:g}")
    return found
