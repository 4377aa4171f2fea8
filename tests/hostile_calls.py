"""Calls ops as no public function would, and says which of the calls killed the process.

    python tests/hostile_calls.py --seed 0 --calls 2000 [--backend native] [--only 17]

A call is drawn from (seed, number) alone: a valid one of hostile_inputs.py, of which one to three
arguments are then changed. It may raise, or return what can be read. It runs in a forked process
that shares with this one the number of the call it is at, so that one that dies is named and the
next ones still run; --only runs a call that was named again, in this process. Exit code 1 where a
call died, spun, or was refused by one of the two sets of checks and not by the other.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import resource
import signal
import struct
import sys
import traceback

import torch

from reg_kernels.ops._modes import below_autograd
from reg_kernels.ops._registry import OPS

import hostile_inputs

BATCH = 500  # calls of one process
SECONDS = 60  # of processor time for a call: one that takes longer does not end
MEMORY = 32 << 30  # addresses of a process, but for a sanitizer's: a huge size is then refused

# Refused for a value, which the checks in Python leave to the kernels.
OF_VALUES = (
    *("labels must be in", "lam must be in", "index must be in", "index must be a permutation"),
    *("boxes must be (x1", "receivers and starts must be those of", "the sizes must be"),
    "kept and dropped must be such",
    "float64, which is the reference's alone",  # that of one implementation
    "group must be given where gathered is",  # of a call with a gradient, which no check knows
)


planted: int | None = None  # a call that reads address 0


def draw(seed: int, number: int) -> hostile_inputs.HostileCall:
    return hostile_inputs.draw(random.Random(f"{seed}:{number}"))


def read(result: object) -> None:
    """Looks at all that was returned."""
    if isinstance(result, torch.Tensor):
        if result.device.type == "cpu" and result.layout == torch.strided:
            result.detach().clone()
    elif isinstance(result, list | tuple):
        for each in result:
            read(each)


def refused_by_checks(call: hostile_inputs.HostileCall) -> bool | None:
    """What the op's check in Python says; None where it is not asked: of what the dispatcher
    changes."""
    check = OPS[call.op].check if call.op in OPS else None
    if check is None or not call.is_plain() or goes_by_formula(call):
        return None
    try:
        check(*call.arguments)
    except RuntimeError:
        return True
    return False


def goes_by_formula(call: hostile_inputs.HostileCall) -> bool:
    """Whether torch's own operations compute the call, which make checks of their own: of an op
    whose gradient is wanted and that has none."""
    route = OPS[call.op].route
    if call.below_autograd or route._apply is not None:
        return False
    return any(x.requires_grad for x in hostile_inputs.tensors_in(call.arguments[: route._inputs]))


def run(call: hostile_inputs.HostileCall, backend: str) -> str | None:
    """Makes the call; returns what is wrong with how it ended, if anything is."""
    suffix = "default" if backend == "native" else backend
    overload = getattr(getattr(torch.ops.reg_kernels, call.op), suffix, None)
    if overload is None:  # a part has no other implementation
        return None
    expected = refused_by_checks(call)
    message = ""
    try:
        if call.hook is not None:
            result = call.through_hook()
        elif call.below_autograd:
            with below_autograd():
                result = overload(*call.arguments)
        else:
            result = overload(*call.arguments)
            first = result[0] if isinstance(result, tuple | list) and result else result
            if isinstance(first, torch.Tensor) and first.requires_grad:
                first.sum().backward()
        read(result)
    except Exception as error:  # an answer like any other
        message = str(error) or type(error).__name__
    if expected is None or call.hook is not None:
        return None
    if expected and not message:
        return "is refused by the check in Python alone"
    of_value = backend != "native" or any(words in message for words in OF_VALUES)
    if not expected and f"{call.op}: " in message and not of_value:
        return f"is refused by csrc/ alone: {message}"
    return None


def child(place: mmap.mmap, seed: int, numbers: range, backend: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    wrong = 0
    for number in numbers:
        place.seek(0)
        place.write(struct.pack("q", number))
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS, resource.RLIM_INFINITY))
        call = draw(seed, number)
        place.write(str(call).encode()[: len(place) - 9] + b"\0")
        if number == planted:
            ctypes.string_at(0)
        said = run(call, backend)
        if said is not None:
            wrong += 1
            print(f"{backend} --seed {seed} --only {number} {said}\n  {call}", flush=True)
    os._exit(min(wrong, 100))


def survive(seed: int, numbers: range, backend: str) -> int:
    """Runs the calls, each death in a process of its own; returns how many went wrong."""
    place, wrong = mmap.mmap(-1, 16384), 0
    while numbers:
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            try:
                child(place, seed, numbers[:BATCH], backend)
            except BaseException:
                traceback.print_exc()
            os._exit(101)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) <= 100:
            wrong += os.WEXITSTATUS(status)
            numbers = numbers[BATCH:]
            continue
        (number,) = struct.unpack("q", place[:8])
        call = place[8:].split(b"\0")[0].decode(errors="replace")
        how = (
            f"exit code {os.WEXITSTATUS(status)}"
            if os.WIFEXITED(status)
            else signal.Signals(os.WTERMSIG(status)).name
        )
        wrong += 1
        print(f"{backend} --seed {seed} --only {number} died: {how}\n  {call}")
        numbers = numbers[numbers.index(number) + 1 :]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--backend", default="native", choices=("native", "triton", "reference"))
    parser.add_argument("--only", type=int, help="the number of one call, made in this process")
    parser.add_argument("--op", help="calls of this op alone")
    parser.add_argument("--plant", type=int, help="the number of a call that dies whatever it is")
    args = parser.parse_args()
    hostile_inputs.ONLY_OP = args.op
    global planted
    planted = args.plant
    torch.set_num_threads(1)  # no pool that a fork would leave behind
    if args.only is not None:
        call = draw(args.seed, args.only)
        print(call, flush=True)
        print(run(call, args.backend) or "ended well")
        return 0
    wrong = survive(args.seed, range(args.calls), args.backend)
    print(f"{args.calls} calls, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
