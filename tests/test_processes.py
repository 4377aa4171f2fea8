"""Many threads at once, processes that are forked after threads were at work, and loaders' workers,
by each way to start a process."""

import os
import sys
import threading
import traceback

import pytest
import torch
from case_runs import SMALL, leaves_of, one_dtype, results, same, taken
from torch import nn
from torch.utils.data import DataLoader, Dataset

import reg_kernels
import reg_kernels.functional as F
from reg_kernels import augment, backends
from reg_kernels import nn as rnn
from reg_kernels.optim import SGDW, AdamW

from support import DEVICE, run_program

NATIVE = pytest.mark.skipif(
    backends.why_not("native", DEVICE, torch.float32) is not None, reason="there are no kernels"
)
THREADS = 8


def at_once(*functions):
    """Runs each in a thread of its own, from the same moment on; raises what one of them raised."""
    barrier, errors = threading.Barrier(len(functions)), []

    def run(function):
        try:
            barrier.wait(60)
            function()
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # from one thread to the next at every chance
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive(), "a thread does not end"
    finally:
        sys.setswitchinterval(interval)
    assert not errors, "\n".join(errors)


@NATIVE
def test_threads_that_call_every_op_get_what_one_alone_gets():
    cases = [case for case in SMALL if taken(case.op, "native", one_dtype(case))]

    def run(case):
        return results(case, leaves_of(case, one_dtype(case)), "native")

    def expect(first):
        for case in cases[first:] + cases[:first]:
            assert same(run(case), alone[case]), case

    alone = {case: run(case) for case in cases}
    at_once(*(lambda n=n: expect(n * len(cases) // THREADS) for n in range(THREADS)))


def trained(seed, kind):
    """The weights of a net, converted and trained; what it draws, it draws by states."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) - 0.5)
    model = reg_kernels.convert(model)
    assert isinstance(model[1], rnn.BatchNorm1d)
    optimizer = kind(model.parameters(), lr=0.05)
    x, y = torch.rand(16, 6, generator=generator), torch.arange(16) % 3
    for step in range(12):
        optimizer.zero_grad()
        hidden = F.dropout(x, 0.3, rng_state=torch.tensor([seed, step]))
        F.cross_entropy(model(hidden), y, label_smoothing=0.1).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_threads_that_convert_and_train_models_of_their_own():
    plans = [(seed, (AdamW, SGDW)[seed % 2]) for seed in range(THREADS)]
    alone = [trained(*plan) for plan in plans]

    def train(number):
        assert same(trained(*plans[number]), alone[number])

    at_once(*(lambda n=n: train(n) for n in range(THREADS)))


def test_no_two_threads_draw_alike():
    x, masks, count = torch.ones(64), [], 2000

    def draw():
        for _ in range(count):
            masks.append(F.dropout(x, 0.5))

    at_once(*[draw] * THREADS)
    assert len({tuple(mask.tolist()) for mask in masks}) == THREADS * count


def test_threads_whose_pipelines_are_their_own_or_one():
    images = [torch.randint(256, (3, 9 + n, 11), dtype=torch.uint8) for n in range(4)]
    shared = pipeline()
    alone = shared(images, indices=[*range(4)])

    def expect(mine):
        for _ in range(10):
            assert torch.equal(mine(images, indices=[*range(4)]), alone)

    at_once(*(lambda p=p: expect(p) for p in [shared] * 4 + [pipeline() for _ in range(4)]))


# Processes


def pipeline():
    return augment.Pipeline(
        augment.RandomResizedCrop(8),
        augment.RandomHorizontalFlip(),
        augment.RandAugment(2, 9),
        augment.RandomErasing(0.5),
        dtype=torch.float32,
        seed=3,
    )


class Photos(Dataset):
    """Images by their number, with that."""

    def __len__(self):
        return 12

    def __getitem__(self, number):
        generator = torch.Generator().manual_seed(number)
        return torch.randint(
            256, (3, 12, 10 + number), generator=generator, dtype=torch.uint8
        ), number


class Collate:
    """What workers do with a batch: augmentation, and a call of other kernels."""

    def __init__(self):
        self.pipeline = pipeline()

    def __call__(self, batch):
        images, numbers = zip(*batch, strict=True)
        x = self.pipeline(list(images), indices=list(numbers))
        return x, F.dropout(x, 0.5, rng_state=torch.tensor([1, 2])), os.getpid()


def wake_threads():
    """Has torch's threads at work, in our kernels and in torch's own."""
    x = torch.randn(2000, 1000)
    assert F.dropout(x, 0.5).shape == (x @ x.T)[:, :1000].shape


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_augment_as_this_process_does(start):
    wake_threads()
    loaders = [
        DataLoader(
            Photos(),
            4,
            collate_fn=Collate(),
            num_workers=workers,
            multiprocessing_context=start if workers else None,
            timeout=300 if workers else 0,
        )
        for workers in (0, 2)
    ]
    here, there = (list(loader) for loader in loaders)
    for (x, y, own), (their_x, their_y, other) in zip(here, there, strict=True):
        assert torch.equal(x, their_x) and torch.equal(y, their_y)
        assert own == os.getpid() != other


# One thread in the child, as a loader's workers have: OpenMP's other threads are not there after a
# fork, and whoever shares work out to them waits for ever. That is so of torch's own operations.
FORKED = """
import os, signal, sys, torch
import test_processes
from test_processes import NATIVE, SMALL, leaves_of, one_dtype, results, same, taken, trained
from reg_kernels.optim import AdamW

torch.set_num_threads(4)
test_processes.wake_threads()
cases = [case for case in SMALL if taken(case.op, "native", one_dtype(case))]
run = lambda case: results(case, leaves_of(case, one_dtype(case)), "native")
alone, net = [run(case) for case in cases], trained(1, AdamW)
big = torch.ones(2000, 1000)
state = torch.tensor([1, 2])
mask = test_processes.F.dropout(big, 0.5, rng_state=state)
for grandchild in (False, True):
    if (pid := os.fork()) == 0:
        signal.alarm(300)
        torch.set_num_threads(1)
        for case, expected in zip(cases, alone):
            assert same(run(case), expected), case
        assert same(trained(1, AdamW), net)
        assert torch.equal(test_processes.F.dropout(big, 0.5, rng_state=state), mask)
        if grandchild and (inner := os.fork()):
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
        assert torch.equal(test_processes.F.dropout(big, 0.5, rng_state=state), mask)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, code
# And this process still has its own.
assert torch.equal(test_processes.F.dropout(big, 0.5, rng_state=state), mask)
"""


@NATIVE
def test_a_child_that_is_forked_after_use_computes_the_same():
    path = os.pathsep.join(sys.path)
    done = run_program([sys.executable, "-c", FORKED], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
