"""Calls leave no memory behind, those that are refused included: what malloc has given out and not
taken back is counted, by the C library or by a sanitizer that stands in its place."""

import contextlib
import ctypes
import gc
import math
import random
import warnings

import hostile_calls
import pytest
import torch
from case_runs import SMALL, leaves_of, one_dtype, results, taken

from reg_kernels import augment, backends
from reg_kernels.optim import AdamW

import hostile_inputs
from support import DEVICE

C = ctypes.CDLL(None)
ROUNDS = 10
LEAK = 16 * ROUNDS  # the least that malloc gives, at each round; counting itself moves a hundred
HOSTILE = 100  # calls of a round


class MallInfo(ctypes.Structure):
    """What mallinfo2 returns, by its names."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


def bytes_in_use():
    gc.collect()
    if hasattr(C, "__sanitizer_get_current_allocated_bytes"):
        C.__sanitizer_get_current_allocated_bytes.restype = ctypes.c_size_t
        return C.__sanitizer_get_current_allocated_bytes()
    C.mallinfo2.restype = MallInfo
    info = C.mallinfo2()
    return info.uordblks + info.hblkhd


C.malloc.restype, C.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


def is_counted():
    """Whether what malloc gives out is seen here: another allocator may have been preloaded."""
    if not (hasattr(C, "mallinfo2") or hasattr(C, "__sanitizer_get_current_allocated_bytes")):
        return False
    before, block = bytes_in_use(), C.malloc(10**6)
    seen = bytes_in_use() - before
    C.free(block)
    return seen > 10**6 / 2


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's memory is not malloc's"),
    pytest.mark.skipif(
        backends.why_not("native", "cpu", torch.float32) is not None, reason="there are no kernels"
    ),
    pytest.mark.skipif(not is_counted(), reason="malloc does not tell"),
]


def growth(round_, groups=40):
    """The bytes that some rounds add, of several times the least: before all is in caches, they add
    something for other reasons. A leak adds to all of them."""
    least = math.inf
    with warnings.catch_warnings(action="ignore"):  # which pytest keeps
        for _ in range(groups):
            before = bytes_in_use()
            for _ in range(ROUNDS):
                round_()
            least = min(least, bytes_in_use() - before)
            if least < LEAK:
                break
    return least


def every_case():
    for case in SMALL:
        if taken(case.op, "native", one_dtype(case)):
            results(case, leaves_of(case, one_dtype(case)), "native")


def hostile():
    for number in range(HOSTILE):
        hostile_calls.run(hostile_inputs.draw(random.Random(f"leaks:{number}")), "native")


def steps():
    """Of an optimizer whose gradients come, go and are refused."""
    params = [torch.ones(n, requires_grad=True) for n in (1, 70, 3000)]
    optimizer = AdamW(params, lr=0.1, ema_decay=0.9)
    for step in range(8):
        for p in params[: 1 + step % 3]:
            p.grad = torch.ones_like(p) if step != 5 else torch.ones_like(p).to_sparse()
        with contextlib.suppress(RuntimeError):
            optimizer.step()
        optimizer.zero_grad()


def pipelines():
    pipeline = augment.Pipeline(augment.RandomResizedCrop(8), augment.RandAugment(2, 9), seed=1)
    for size in (9, 12, 30):
        pipeline([torch.zeros(3, size, size + 1, dtype=torch.uint8)] * 3, indices=[0, 1, 2])


@pytest.mark.parametrize("round_", [every_case, hostile, steps, pipelines])
def test_calls_leave_nothing_behind(round_):
    assert growth(round_) < LEAK


def test_a_planted_leak_is_seen():
    """The least there is, of one call in many."""

    def leaking():
        steps()
        C.malloc(16)

    assert growth(leaking, groups=3) >= LEAK
