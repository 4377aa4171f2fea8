"""How a sample of calls is timed, and how a call becomes a CUDA graph."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_MOST_HOST_CALLS = 2000
_MOST_QUEUED_CALLS = 100  # more could fill the launch queue, which would make the host wait
_MOST_EVENT_CALLS = 20  # likewise, with several launches a call
_SLEEP = 4_000_000  # cycles that the GPU waits, some 2 ms, while the host queues a sample
_LEAST_EVICTION = 64 * 2**20  # bytes that are written to empty a CPU's caches
_LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # in KiB, as "32768K"
_CAPTURE_WARM_UP = 3  # calls before a capture, which end autotuning and lazy loading

Call = Callable[[int], object]  # on input number i of a pool


@dataclass(frozen=True)
class Clock:
    """`seconds(call, calls, first)`: the time of each of `calls` calls, numbered from `first`."""

    seconds: Callable[[Call, int, int], float]
    most_calls: int
    beside: float = 0.0  # seconds that a sample takes untimed


def clock(
    device: torch.device, *, host: bool = False, wall: bool = False, cold: bool = False
) -> Clock:
    """The clock for calls on `device`. It times the device; with `host` the host alone; with `wall`
    until both are done. A CPU is its own host; with `cold` its caches are emptied before a call."""
    if device.type != "cuda":
        if cold:
            times = [_host_seconds(_evict, 1, i) for i in range(2)]  # the first makes the buffer
            return Clock(_cold_seconds, 1, beside=min(times))
        return Clock(_host_seconds, _MOST_HOST_CALLS)
    if not host and not wall:
        return Clock(_event_seconds, _MOST_EVENT_CALLS)

    def seconds(call: Call, calls: int, first: int) -> float:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        queued = _host_seconds(call, calls, first)
        torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / calls if wall else queued

    return Clock(seconds, _MOST_HOST_CALLS if wall else _MOST_QUEUED_CALLS)


def _host_seconds(call: Call, calls: int, first: int) -> float:
    begin = time.perf_counter()
    for i in range(first, first + calls):
        call(i)
    return (time.perf_counter() - begin) / calls


def _cold_seconds(call: Call, calls: int, first: int) -> float:
    seconds = 0.0
    for i in range(first, first + calls):
        _evict(i)
        seconds += _host_seconds(call, 1, i)
    return seconds / calls


def _evict(i: int) -> None:
    """Writes twice what the last-level cache holds, from all threads: their own caches go too."""
    _eviction_buffer().add_(1)


@functools.cache
def _eviction_buffer() -> Tensor:
    try:
        cache = int(_LAST_LEVEL_CACHE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):  # where nobody says
        cache = 0
    return torch.zeros(max(_LEAST_EVICTION, 2 * cache), dtype=torch.uint8, device="cpu")


def _event_seconds(call: Call, calls: int, first: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP)
    begin.record()
    for i in range(first, first + calls):
        call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def captured(call: Call, device: torch.device) -> Call:
    """Captures `call` on input 0 as a CUDA graph and returns what replays it, for any input number.

    Raises what the capture raises: RuntimeError where the call waits for the GPU, for example.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_CAPTURE_WARM_UP):
            call(0)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call(0)  # what it returns lies in the graph's own memory: nobody reads it

    return lambda i: graph.replay()
