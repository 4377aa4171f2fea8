"""How a benchmark is measured.

The contenders of one benchmark run interleaved: each round takes one sample of every one of them,
so that a machine that slows down for a while slows them all. A ratio of two contenders is the
median over the rounds of the ratio within a round. Values are checked before anything is timed.
Beside them runs `Tensor.copy_` of as many bytes, the floor that a share of bandwidth is measured
against.

A contender also pays for the cache lines that the one before it left to be written back: on a CPU,
mixup of a batch of bytes took 1.17 times as long after `copy_` as after itself. A sample therefore
begins with untimed calls of its own, two where they are short, which leaves 1.09; one leaves 1.15,
and reading twice the last-level cache before it instead changes nothing. Samples of short calls
hold several, which shares out what is left.

A benchmark whose tensors a training step has thrown out of the caches says that it is "cold": there
a sample is one call, and twice the last-level cache is written before it, untimed.

On a GPU a sample is timed by CUDA events around several calls that the host queued while the GPU
was kept busy, so that it holds no launch gaps; the calls walk a pool of inputs larger than the L2
cache. Where the host's time counts as well, the clock runs until the GPU has done the last call.
A small call has further figures, each measured in the same way after the first: what the host
takes where that is not the benchmark ("host_median"), what the GPU takes where the host is
("device_median"), and what a CUDA graph of the call takes, whose input stays in the L2 cache
("graph_median", or "graph_note" where there is none).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._dtypes import named
from . import _isas
from ._clock import Clock, captured, clock
from ._memory import kept_bytes, peak_bytes

COPY, EAGER, COMPILE = "copy", "eager", "compile"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
STEP = "step"  # of an optimizer, in place

_POOL_OVER_L2 = 4  # the pool of inputs is this many times the L2 cache
_LARGEST_POOL = 512
# Calls up to the first length get two untimed ones before a sample, and up to the second one, which
# wipe out what the contender before them left in the caches; longer ones do not feel it.
_LEAD_IN_TWICE, _LEAD_IN = 0.01, 0.05
_SMALL = 4 * 2**20  # bytes of an input up to which launching is a part of a call's time on a GPU
_FURTHER = 0.25  # of the time for a benchmark goes to each further figure of a small call


class WrongValues(Exception):
    """A contender computes something else than it should; it is not timed."""


@dataclass(frozen=True)
class Scope:
    """What is to be measured."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    everything: bool = False  # every size and layout in every dtype
    compiled: bool = True  # torch.compile is a contender: it takes seconds a benchmark

    @property
    def brief(self) -> tuple[torch.dtype, ...]:
        """The dtypes of benchmarks for which one dtype is enough."""
        return self.dtypes if self.everything else self.dtypes[:1]

    @property
    def of_small_calls(self) -> tuple[torch.dtype, ...]:
        """The dtypes of small calls, whose time is the host's and hardly depends on the dtype."""
        return self.dtypes if self.everything else (torch.float32,)


@dataclass(frozen=True)
class Budget:
    """How long to measure a benchmark."""

    seconds: float  # for all rounds together
    least: int  # rounds, whatever they take
    most: int
    sample: float  # seconds: a sample holds as many calls as take so long, and at least one


@dataclass(frozen=True)
class Contender:
    """One way to compute what a benchmark asks for."""

    name: str
    call: Callable[[int], object]  # one call, on input number i of the pool
    check: Callable[[], None]  # raises WrongValues; it is called first, so it also compiles
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # around each sample
    may_fail: bool = False  # an exception in the check skips the contender and is no error
    isa: str | None = None  # the instruction set of native CPU code


@dataclass(frozen=True)
class Skipped:
    """A contender that cannot run here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of an implementation, whatever instruction set it is held to; `figure`
    is a key of its result."""

    contender: str
    text: str
    figure: str
    limit: float
    at_least: bool = False

    def result(self, value: float | None) -> dict[str, Any]:
        met = None
        if value is not None:
            met = value >= self.limit if self.at_least else value <= self.limit
        return {
            "text": self.text,
            "figure": self.figure,
            "limit": self.limit,
            "at_least": self.at_least,
            "value": value,
            "met": met,
        }


def faster(limit: float, than: str = EAGER) -> Goal:
    """The goal that the native code has `limit` times the speed of eager or of torch.compile."""
    named = {EAGER: "eager's", COMPILE: "torch.compile's"}[than]
    text = f"at least {limit:g} times {named} speed"
    return Goal("native", text, f"speedup_over_{than}", limit, True)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: an op in one direction, dtype and shape."""

    op: str
    direction: str  # FORWARD, BACKWARD, BOTH in one call, or STEP
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int | None  # that a call must read or write, each once; None where nobody counts them
    prepare: Callable[[torch.device, int], Sequence[Contender | Skipped]]  # for a pool of n inputs
    variant: str = ""  # of the op, where it has several
    layout: str = "contiguous"
    requires_grad: bool = True
    host: bool = False  # what is timed is the host, whatever the device does
    wall: bool = False  # what is timed is the host and the device together
    cold: bool = False  # a CPU's caches are emptied before each call
    tensors: int = 0  # how many tensors a call takes, where it takes a list; `shape` is of all
    peers: tuple[str, ...] = ()  # names of further contenders that are not ours
    goals: tuple[Goal, ...] = ()
    items: int = 0  # how many items a call processes, where their rate is what counts
    unit: str = ""  # of the items
    series: str = ""  # the growth curve that the benchmark is a point of
    isas: tuple[str, ...] = ()  # that native CPU code is measured by; none: the best

    @property
    def label(self) -> str:
        dtype = named(self.dtype)
        if len(self.shape) > 1:
            size = "×".join(map(str, self.shape))
        elif self.host:
            size = f"{self.shape[0]} elements"
        else:
            size = format_bytes(self.shape[0] * self.dtype.itemsize)
        if self.tensors:
            size = f"{self.tensors} tensors, {size}"
        words = [self.op, self.variant, "" if self.direction == STEP else self.direction]
        words = [*filter(None, words), dtype, size]
        if self.layout != "contiguous":
            words.append(self.layout)
        if not self.requires_grad:
            words.append("no grad")
        if self.cold:
            words.append("cold caches")
        if self.host:
            words.append("host time")
        return " ".join(words)


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def measure(
    case: Benchmark,
    device: torch.device,
    budget: Budget,
    after_round: Callable[[int, int], None] = lambda done, rounds: None,
) -> dict[str, Any]:
    """Checks and times the contenders of `case`.

    Args:
        case: the benchmark.
        device: where to run it.
        budget: how long to.
        after_round: called with the number of rounds done and of all.

    Returns:
        The benchmark's description and, under "contenders", a dictionary for each contender. It
        has "name" and one of three: "skipped", which is a reason; "wrong", which says what is wrong
        with its values or what it raised; or its figures, with the seconds of a call in each round.
    """
    gc.collect()  # the tensors of the case before
    pool = pool_size(case, device)
    entries = contenders(case, device)
    rows: list[dict[str, Any]] = []
    running: list[Contender] = []
    for entry in entries:
        row: dict[str, Any] = {"name": entry.name}
        rows.append(row)
        if isinstance(entry, Skipped):
            row["skipped"] = entry.reason
            continue
        if entry.isa is not None:
            row["isa"] = entry.isa
        try:
            with entry.within():
                entry.check()
        except WrongValues as error:
            row["wrong"] = str(error)
        except Exception as error:  # a crash of one contender is a result, not the end
            row["skipped" if entry.may_fail else "wrong"] = _message(error)
        else:
            running.append(entry)
    timed_by = clock(device, host=case.host, wall=case.wall, cold=case.cold)
    samples, calls = _interleave(running, timed_by, budget, after_round)
    for row in rows:
        if (seconds := samples.get(row["name"])) is None:
            continue
        row["calls_per_sample"] = calls[row["name"]]
        row |= figures(seconds, samples, case.bytes, case.peers)
        if case.items:
            row["items_per_second"] = case.items / row["median"]
        if case.tensors:
            row["seconds_per_tensor"] = row["median"] / case.tensors
    if device.type == "cuda" and math.prod(case.shape) * case.dtype.itemsize <= _SMALL:
        further = _small_call_figures(case, device, running, budget)
        for row in rows:
            row |= further.get(row["name"], {})
    for entry in running:
        row = next(r for r in rows if r["name"] == entry.name)
        with entry.within():
            if case.requires_grad and case.direction in (FORWARD, BOTH):
                row["kept_bytes"] = kept_bytes(entry.call)
            row["peak_bytes"] = peak_bytes(entry.call, device)
    peaks = {row["name"]: row["peak_bytes"] for row in rows if "peak_bytes" in row}
    for row in rows:
        for peer in case.peers:
            if row["name"] in peaks and peer in peaks:
                row[f"peak_above_{peer}_bytes"] = peaks[row["name"]] - peaks[peer]
    for goal in case.goals:
        for row in (r for r in rows if _isas.implementation(r["name"]) == goal.contender):
            row.setdefault("goals", []).append(goal.result(row.get(goal.figure)))
    return {
        "label": case.label,
        "op": case.op,
        "variant": case.variant,
        "direction": case.direction,
        "dtype": named(case.dtype),
        "shape": list(case.shape),
        "layout": case.layout,
        "requires_grad": case.requires_grad,
        "host": case.host,
        "wall": case.wall,
        "cold": case.cold,
        "tensors": case.tensors,
        "peers": list(case.peers),
        "bytes": case.bytes,
        "items": case.items,
        "unit": case.unit,
        "series": case.series,
        "inputs": pool,
        "contenders": rows,
    }


def _small_call_figures(
    case: Benchmark, device: torch.device, running: list[Contender], budget: Budget
) -> dict[str, dict[str, Any]]:
    """What launching a small call on a GPU costs: further figures of each contender."""
    budget = replace(budget, seconds=_FURTHER * budget.seconds)
    found: dict[str, dict[str, Any]] = {entry.name: {} for entry in running}

    def add(figure: str, contenders: list[Contender], timed_by: Clock) -> None:
        samples, _ = _interleave(contenders, timed_by, budget)
        for name, seconds in samples.items():
            found[name][figure] = statistics.median(seconds)

    if case.host:
        add("device_median", running, clock(device))
    elif not case.wall:
        add("host_median", running, clock(device, host=True))
    graphs: list[Contender] = []
    for entry in running:
        try:
            with entry.within():
                graphs.append(replace(entry, call=captured(entry.call, device)))
        except Exception as error:  # who cannot be captured has been timed all the same
            found[entry.name]["graph_note"] = _message(error)
    add("graph_median", graphs, clock(device))
    return found


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def figures(
    seconds: list[float],
    samples: dict[str, list[float]],
    bytes_moved: int | None,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """The figures of one contender, from its seconds and from those of all, by name.

    Its speed is compared with the copy's, eager's, torch.compile's and the peers', where they ran.
    "speed_over" holds the quartiles of the ratios within a round; the figures that goals name, such
    as "share_of_copy" and "time_over_eager", are made from their medians.
    """
    median = statistics.median(seconds)
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    row: dict[str, Any] = {
        "seconds": seconds,
        "median": median,
        "quartiles": [lower, upper],
        "fastest": min(seconds),
    }
    if bytes_moved is not None:
        row["bytes_per_second"] = bytes_moved / median
    row["speed_over"] = {}
    for name in (COPY, EAGER, COMPILE, *peers):
        if name not in samples:
            continue
        ratios = [theirs / own for own, theirs in zip(seconds, samples[name], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        row["speed_over"][name] = quartiles
        row[f"time_over_{name}"] = 1 / quartiles[1]
        row["share_of_copy" if name == COPY else f"speedup_over_{name}"] = quartiles[1]
    return row


def contenders(case: Benchmark, device: torch.device) -> list[Contender | Skipped]:
    """The copy and the contenders of the benchmark, with their tensors."""
    pool = pool_size(case, device)
    copy = [] if case.bytes is None else [_copy_contender(case, device, pool, case.bytes)]
    entries = case.prepare(device, pool)
    isas = (case.isas or _isas.here()[:1]) if device.type == "cpu" else ()
    return [*copy, *(each for entry in entries for each in _by_isa(entry, isas))]


def _by_isa(entry: Contender | Skipped, isas: Sequence[str]) -> list[Contender | Skipped]:
    """The native code once for each instruction set: the same function, and so the same tensors."""
    if entry.name != _isas.NATIVE or isinstance(entry, Skipped) or not isas:
        return [entry]
    return [
        replace(
            entry,
            name=entry.name if isa == isas[0] else _isas.further(isa),
            isa=isa,
            within=functools.partial(_isas.held_to, isa, entry.within),
        )
        for isa in isas
    ]


def pool_size(case: Benchmark, device: torch.device) -> int:
    """How many inputs the calls walk, so that each has left the GPU's L2 cache before its turn."""
    if device.type != "cuda" or case.host or case.wall:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = math.prod(case.shape) * case.dtype.itemsize
    return min(_LARGEST_POOL, max(1, math.ceil(_POOL_OVER_L2 * cache / size)))


def _copy_contender(
    case: Benchmark, device: torch.device, pool: int, bytes_moved: int
) -> Contender:
    count = max(1, bytes_moved // 2 // case.dtype.itemsize)  # a copy reads and writes each byte
    sources = [torch.randn(count, dtype=case.dtype, device=device) for _ in range(pool)]
    destination = torch.zeros_like(sources[0])

    def check() -> None:
        destination.copy_(sources[0])
        if not torch.equal(destination, sources[0]):
            raise WrongValues("copy_: the copy differs from its source")

    return Contender(COPY, lambda i: destination.copy_(sources[i % pool]), check)


def _interleave(
    contenders: list[Contender],
    timed_by: Clock,
    budget: Budget,
    after_round: Callable[[int, int], None] = lambda done, rounds: None,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The seconds of each contender, one for each round, and how many calls a sample of it is."""
    calls: dict[str, int] = {}
    lead_in: dict[str, int] = {}
    number = 0
    round_seconds = 0.0

    def sample(contender: Contender, count: int, lead: int) -> float:
        nonlocal number
        with contender.within():
            for i in range(number, number + lead):
                contender.call(i)
            seconds = timed_by.seconds(contender.call, count, number + lead)
        number += lead + count
        return seconds

    for contender in contenders:
        # The check has warmed it up. The shorter of two calls is the better guess.
        guess = min(sample(contender, 1, 0) for _ in range(2))
        wanted = math.ceil(budget.sample / max(guess, 1e-9))
        calls[contender.name] = max(1, min(wanted, timed_by.most_calls))
        lead_in[contender.name] = (guess <= _LEAD_IN_TWICE) + (guess <= _LEAD_IN)
        round_seconds += guess * (calls[contender.name] + lead_in[contender.name])
        round_seconds += timed_by.beside
    rounds = max(budget.least, min(budget.most, int(budget.seconds / max(round_seconds, 1e-9))))

    samples: dict[str, list[float]] = {c.name: [] for c in contenders}
    with _no_collection():
        for done in range(rounds):
            # No contender always runs first, or always behind the same one.
            turn = done % max(1, len(contenders))
            order = contenders[turn:] + contenders[:turn]
            for contender in order[::-1] if done % 2 else order:
                name = contender.name
                samples[name].append(sample(contender, calls[name], lead_in[name]))
            after_round(done + 1, rounds)
    return samples, calls


@contextlib.contextmanager
def _no_collection() -> Any:
    """Keeps the garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
