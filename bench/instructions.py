"""Counts the instructions that an element costs in the native CPU code, by valgrind's callgrind.

Writes bench/results/instructions.md. Each case is called at two sizes that lie in the caches; the
difference leaves out what a call costs by itself. A count does not depend on what else the machine
does, and says what binds where caches and memory do not. Of vectors of eight floats one instruction
an element is eight a vector. Valgrind knows no AVX-512: its code is not counted.

`python -m bench.instructions WORD...` prints the cases whose names have one of the words, alone.
Needs valgrind with its header and a C compiler (`apt-get install valgrind gcc`).

Exit code: 0; 2 where a tool is missing or what runs under it fails.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from reg_kernels import functional as fused
from reg_kernels import optim
from reg_kernels._mixed_target import MixedTarget
from reg_kernels.bench import _isas
from reg_kernels.cli._files import write_whole

RESULT = Path(__file__).resolve().parents[1] / "bench" / "results" / "instructions.md"
UNCOUNTED = ("avx512",)
SIZES = (2**15, 2**16)  # elements
CLASSES = 4096
LEAST = 0.05  # instructions an element that a function is named for

# Asks callgrind, from within, to begin and to write down what was counted since the last time.
REQUESTS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; }
void count(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""

Call = Callable[[], object]


def images(n: int) -> Tensor:
    return torch.randn(n // 4096, 4, 32, 32)


def drawn(
    function: Callable[[Tensor, float], Tensor], dtype: torch.dtype = torch.float32
) -> Callable[[int], Call]:
    def of(n: int) -> Call:
        x = torch.randn(n).to(dtype)
        return lambda: function(x, 0.1)

    return of


def adversarial_step(norm: str) -> Callable[[int], Call]:
    def of(n: int) -> Call:
        adv, grad, clean = images(n), images(n), images(n)
        bounds = {"norm": norm, "lower": -1.0, "upper": 1.0}
        return lambda: fused.adversarial_step_(adv, grad, clean, 0.01, 0.1, **bounds)

    return of


def batch_norm(layout: torch.memory_format, drop: float | None = None) -> Callable[[int], Call]:
    def of(n: int) -> Call:
        x = images(n).contiguous(memory_format=layout).requires_grad_()
        grad, weight, bias = torch.randn_like(x), torch.ones(4), torch.zeros(4)

        def call() -> object:
            if drop is None:
                y = fused.batch_norm(x, None, None, weight, bias, True)
            else:
                y = fused.batch_norm_act(x, None, None, weight, bias, training=True, drop=drop)
            return torch.autograd.grad(y, x, grad)

        return call

    return of


def labels(n: int) -> Tensor:
    return torch.randint(CLASSES, (n // CLASSES,))


def cross_entropy(pair: bool, smoothing: float = 0.0) -> Callable[[int], Call]:
    def of(n: int) -> Call:
        x = torch.randn(n // CLASSES, CLASSES, requires_grad=True)
        target = MixedTarget(labels(n), labels(n), 0.3) if pair else labels(n)
        return lambda: fused.cross_entropy(x, target, label_smoothing=smoothing)

    return of


def distillation(n: int) -> Call:
    x = torch.randn(n // CLASSES, CLASSES, requires_grad=True)
    teacher, target = torch.randn(n // CLASSES, CLASSES), labels(n)
    return lambda: fused.distillation_loss(x, teacher, target, temperature=4.0)


def mixup(from_bytes: bool) -> Callable[[int], Call]:
    def of(n: int) -> Call:
        x = images(n)
        x = (x * 64).to(torch.uint8) if from_bytes else x
        lam, index = torch.full((len(x),), 0.3), torch.randperm(len(x))
        if not from_bytes:
            return lambda: fused.mixup(x, lam, index)
        return lambda: fused.mixup(x, lam, index, mean=0.5, std=0.2, dtype=torch.float32)

    return of


def penalty(function: Callable[..., Tensor]) -> Callable[[int], Call]:
    def of(n: int) -> Call:
        x = torch.randn(n, requires_grad=True)
        return lambda: torch.autograd.grad(function(x), x)

    return of


def step(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[int], Call]:
    def of(n: int) -> Call:
        p = torch.nn.Parameter(torch.randn(n))
        p.grad = torch.randn(n)
        return optimizer([p], lr=1e-3).step

    return of


CASES: dict[str, Callable[[int], Call]] = {
    "dropout float32": drawn(fused.dropout),
    "dropout bfloat16": drawn(fused.dropout, torch.bfloat16),
    "gaussian_noise": drawn(fused.gaussian_noise),
    "uniform_noise": drawn(fused.uniform_noise),
    "salt_and_pepper": drawn(fused.salt_and_pepper),
    "batch_norm fwd+bwd": batch_norm(torch.contiguous_format),
    "batch_norm fwd+bwd, channels_last": batch_norm(torch.channels_last),
    "batch_norm + relu + dropout fwd+bwd": batch_norm(torch.contiguous_format, 0.1),
    "cross_entropy pair fwd+bwd": cross_entropy(pair=True),
    "cross_entropy smoothed fwd+bwd": cross_entropy(pair=False, smoothing=0.1),
    "distillation fwd+bwd": distillation,
    "mixup float32": mixup(from_bytes=False),
    "mixup uint8 to float32": mixup(from_bytes=True),
    "l1_penalty fwd+bwd": penalty(fused.l1_penalty),
    "l2_penalty fwd+bwd": penalty(fused.l2_penalty),
    "adversarial_step linf": adversarial_step("linf"),
    "adversarial_step l2": adversarial_step("l2"),
    "AdamW step": step(optim.AdamW),
    "SGDW step": step(lambda p, lr: optim.SGDW(p, lr=lr, momentum=0.9)),
}


def costs(profile: str) -> Counter[str]:
    """Instructions of each function by itself, of a profile that callgrind wrote."""
    names: dict[str, str] = {}
    result: Counter[str] = Counter()
    function, of_callee = "", False
    for line in profile.splitlines():
        if named := re.fullmatch(r"(c?fn)=\((\d+)\)(?: (.*))?", line):
            kind, key, name = named.groups()
            name = names.setdefault(key, name)
            function = name if kind == "fn" else function
        elif line.startswith("calls="):
            of_callee = True  # the next line is what the function that it called took
        elif cost := re.fullmatch(r"(?:[+-]?\d+|\*) (\d+)", line):
            result[function] += 0 if of_callee else int(cost[1])
            of_callee = False
    return result


def of_leaves(functions: Counter[str], isa: str) -> Counter[str]:
    """Those of an instruction set's own code, by their names without types and arguments."""
    result: Counter[str] = Counter()
    for name, cost in functions.items():
        name = name.replace("(anonymous namespace)::", "")
        while name != (name := re.sub(r"<[^<>()]*>|\([^<>()]*\)", "", name)):
            pass
        if found := re.search(rf"\breg_kernels::{isa}::([\w:~]+)", name):
            result[found[1].rstrip(":")] += cost  # a lambda is its function's
    return result


def run_counted(library: str, isas: list[str], words: list[str]) -> None:
    """Under valgrind: every case at both sizes, each a profile of the name `isa/case/size`."""
    from reg_kernels import _C

    requests = ctypes.CDLL(library)
    torch.set_num_threads(1)
    calls = {f"{name}/{n}": CASES[name](n) for name in cases(words) for n in SIZES}
    for call in calls.values():
        call()
    requests.begin()
    for isa in isas:
        _C.set_isa(isa)
        for name, call in calls.items():
            requests.count(b"between")
            call()
            requests.count(f"{isa}/{name}".encode())


def cases(words: list[str]) -> list[str]:
    return [name for name in CASES if not words or any(word in name for word in words)]


def measure(isas: list[str], words: list[str]) -> dict[str, dict[str, Counter[str]]]:
    """Instructions at both sizes' difference: {case: {instruction set: {function: number}}}."""
    with tempfile.TemporaryDirectory() as folder:
        library, profile = Path(folder, "requests.so"), Path(folder, "profile")
        Path(folder, "requests.c").write_text(REQUESTS)
        compiler = shutil.which("cc") or "gcc"
        build = [compiler, "-shared", "-fPIC", f"{folder}/requests.c", "-o", str(library)]
        subprocess.run(build, check=True)
        valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]
        inside = [sys.executable, "-m", "bench.instructions", "--counted", str(library)]
        command = [*valgrind, f"--callgrind-out-file={profile}", *inside, ",".join(isas), *words]
        subprocess.run(command, check=True, capture_output=True, text=True)
        profiles = {}
        for path in Path(folder).glob("profile.*"):
            text = path.read_text()
            if trigger := re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE):
                profiles[trigger[1]] = text
    result: dict[str, dict[str, Counter[str]]] = {}
    for name in cases(words):
        result[name] = {}
        for isa in isas:
            small, large = (of_leaves(costs(profiles[f"{isa}/{name}/{n}"]), isa) for n in SIZES)
            large.subtract(small)
            result[name][isa] = large
    return result


def render(counts: dict[str, dict[str, Counter[str]]], isas: list[str]) -> str:
    """A Markdown table: a case's total, then the functions that take a share of it."""
    more = SIZES[1] - SIZES[0]

    def row(title: str, values: Iterable[float]) -> str:
        return f"| {title} | " + " | ".join(f"{value / more:.2f}" for value in values) + " |"

    lines = [f"| instructions an element | {' | '.join(isas)} |", "|---" * (1 + len(isas)) + "|"]
    for name, of_isa in counts.items():
        lines.append(row(name, (of_isa[isa].total() for isa in isas)))
        total = sum(of_isa.values(), Counter())
        for function, _ in total.most_common():
            values = [of_isa[isa][function] for isa in isas]
            if max(values) >= LEAST * more:
                lines.append(row(f"– `{function}`", values))
    return "\n".join(lines) + "\n"


HEAD = f"""# Instructions an element of the native CPU code

`python -m bench.instructions` counted them by callgrind, as the difference of a call of
{SIZES[1]:,} elements and one of {SIZES[0]:,}; float32 where a case names no dtype;
{CLASSES:,} classes. Below a case stand the functions that it calls. Valgrind knows no AVX-512.

"""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--counted"]:
        library, isas, *words = arguments[1:]
        run_counted(library, isas.split(","), words)
        return 0
    if shutil.which("valgrind") is None:
        print("instructions: needs valgrind: apt-get install valgrind", file=sys.stderr)
        return 2
    counted = [isa for isa in _isas.here() if isa not in UNCOUNTED]
    try:
        table = render(measure(counted, arguments), counted)
    except subprocess.CalledProcessError as error:
        print(f"instructions: {error}", *(error.stderr or "").splitlines()[-1:], file=sys.stderr)
        return 2
    print(table)
    if not arguments:
        write_whole(RESULT, lambda path: path.write_text(HEAD + table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
