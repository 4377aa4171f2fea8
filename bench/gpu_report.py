"""Builds for this machine's GPU, tests, sanitizes and measures on it, and writes a report.

Everything runs in stages, in at most 8 minutes and without a network. Each stage is a process with
a time limit; if it fails, the report says so and the rest still runs. The report, `report.json`,
`report.md` and its charts in bench/results/<gpu>/, is written after every stage, so an interruption
loses nothing. `--only` runs some stages and keeps the others of a report of the same commit. Where
the sources are no git checkout, REG_KERNELS_COMMIT names their commit.

Exit code: 0 all stages passed or were not available, 1 one failed, 2 no GPU or bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reg_kernels.bench import _environment, _results

from . import report as reports

ROOT = Path(__file__).resolve().parents[1]

BUDGET = 8 * 60.0
RESERVE = 30.0  # of the budget: for starting, killing and writing
LEAST = 5.0  # seconds that a stage is worth starting for
TAIL = 6000  # characters of a stage's output that are kept
INTERRUPTED = 130

OK, FAILED, TIMED_OUT = "ok", "failed", "timed out"
NOT_AVAILABLE, SKIPPED, STOPPED = "not available", "skipped", "interrupted"
BAD = (FAILED, TIMED_OUT, STOPPED)

# What runs on the GPU; the CPU's instruction sets are no matter of it.
CPU_TEST = "tests/every_op/test_values.py::test_bits_of_each_instruction_set_and_number_of_threads"
TESTS = ("tests/every_op", "tests/gpu", "--deselect", CPU_TEST)
NO_TESTS = 5  # pytest's exit code where it selected none


@dataclass(frozen=True)
class Stage:
    """A process of its own.

    `command[0]` is looked for on PATH and in the CUDA toolkit. {seconds} in a word is replaced by
    the seconds that the stage may take.
    """

    name: str
    group: str
    command: tuple[str, ...]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    promised: float = 0.0  # seconds of the budget that earlier stages leave to it
    result: str | None = None  # the JSON file that it leaves in the report's folder
    reasons: dict[int, str] = field(default_factory=dict)  # what exit codes mean


def stages(folder: Path) -> list[Stage]:
    """What a report consists of, in order; results go to `folder`."""
    python = sys.executable
    command_line = (python, "-m", "reg_kernels")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
    no_tests = {NO_TESTS: "no test was selected"}
    jobs = {"MAX_JOBS": str(os.cpu_count() or 2)}
    only_this_gpu = {"REG_KERNELS_CUDA": "1", "REG_KERNELS_CUDA_ARCH": "native"}
    result = [
        Stage("driver", "environment", ("nvidia-smi",), 20),
        Stage("toolkit", "environment", ("nvcc", "--version"), 20),
        Stage(
            "compile",
            "build",
            (python, "setup.py", "-q", "build_ext", "--inplace"),
            150,
            jobs | only_this_gpu,
        ),
        Stage("info", "build", (*command_line, "info"), 60),
        Stage("tests", "suite", pytest, 180, reasons=no_tests),
        Stage(
            "check",
            "suite",
            (*command_line, "check", "--device", "cuda", "--json", str(folder / "check.json")),
            90,
            result="check.json",
        ),
    ]
    for tool in ("memcheck", "racecheck", "initcheck"):
        result.append(
            Stage(
                tool,
                "sanitizer",
                (
                    "compute-sanitizer",
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "9",
                    *pytest,
                    "-k",
                    "short",
                ),
                60,
                # torch's cache of device memory would hide an access past the end of a tensor.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                reasons={9: f"{tool} found errors", **no_tests},
            )
        )
    result.append(
        Stage(
            "bench",
            "benchmarks",
            (
                *(python, "-m", "bench.report", "--device", "cuda", "--time-limit", "{seconds}"),
                *("--figures", str(folder / "bench.json")),
            ),
            330,  # what the other stages leave
            promised=130,
            result="bench.json",
            reasons={1: "a contender computed something else"},
        )
    )
    return result


def selected(available: Sequence[Stage], only: str | None) -> list[Stage]:
    """The stages that `--only` names, by stage or by group; ValueError for an unknown name."""
    if only is None:
        return list(available)
    names = {name.strip() for name in only.split(",")}
    known = {s.name for s in available} | {s.group for s in available}
    if unknown := sorted(names - known):
        groups: dict[str, list[str]] = {}
        for stage in available:
            groups.setdefault(stage.group, []).append(stage.name)
        choices = ", ".join(f"{group} ({', '.join(of)})" for group, of in groups.items())
        raise ValueError(f"--only must name stages of {choices}, got {', '.join(unknown)!r}")
    return [s for s in available if names & {s.name, s.group}]


def find_program(name: str) -> str | None:
    """The path of a program: as it is, on PATH, or in the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    for place in (None, toolkit / "bin", toolkit / "compute-sanitizer"):
        if found := shutil.which(name, path=place):
            return found
    return None


def run_stage(stage: Stage, seconds: float) -> dict[str, Any]:
    """Runs one stage for at most `seconds` and says how it went; KeyboardInterrupt included."""
    row: dict[str, Any] = {"name": stage.name, "group": stage.group, "seconds": 0.0, "tail": ""}
    row["command"] = _portable(" ".join(stage.command))
    program = find_program(stage.command[0])
    if program is None:
        return row | {"status": NOT_AVAILABLE, "reason": f"{stage.command[0]} was not found"}
    if seconds < LEAST:
        return row | {"status": SKIPPED, "reason": "no time was left"}
    # A quarter for what the limit does not cover: starting and the last benchmark.
    arguments = [w.replace("{seconds}", f"{seconds * 0.75:.0f}") for w in stage.command[1:]]
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output, _held_interrupts() as release:
        process = subprocess.Popen(
            [program, *arguments],
            cwd=ROOT,
            # rich takes a pipe for 80 columns wide and breaks its tables there.
            env={**os.environ, "COLUMNS": "160", **stage.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all it started can be killed with it
        )
        try:
            release()
            code = process.wait(timeout=seconds)
            status = OK if code == 0 else FAILED
            reason = "" if code == 0 else stage.reasons.get(code, f"exit code {code}")
        except subprocess.TimeoutExpired:
            status, reason = TIMED_OUT, f"stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            status, reason = STOPPED, "stopped from outside"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL))
        tail = output.read().decode(errors="replace")
    row |= {"seconds": round(time.monotonic() - begin, 1), "tail": _portable(tail.strip())}
    return row | {"status": status, "reason": reason}


@contextlib.contextmanager
def _held_interrupts() -> Iterator[Callable[[], None]]:
    """Holds interrupts back until the function that it yields is called; that raises
    KeyboardInterrupt where one has come. A process that is just being started cannot be stopped."""
    came: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda n, frame: came.append(n)) for number in held}

    def release() -> None:
        while previous:
            signal.signal(*previous.popitem())
        if came:
            raise KeyboardInterrupt

    try:
        yield release
    finally:
        while previous:
            signal.signal(*previous.popitem())


def _portable(text: str) -> str:
    """`text` without the paths of this checkout and this Python."""
    text = text.replace(sys.executable, "python").replace(f"{ROOT}/", "")
    text = text.replace(str(ROOT), ".")
    in_venv = sys.prefix != sys.base_prefix
    return text.replace(sys.prefix, "$VIRTUAL_ENV") if in_venv else text


class Report:
    """report.json and report.md, written anew after every change."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._folder = folder
        self.data: dict[str, Any] = {
            "schema": _results.SCHEMA,
            **facts,
            "stages": [],
            "results": {},
        }

    def adopt(self) -> None:
        """Takes over the stages of the report that is there, if that is of the same commit."""
        try:
            old = reports.read(self._folder / "report.json")
        except (OSError, ValueError):
            return
        if old["commit"] == self.data["commit"]:
            self.data |= {"stages": old["stages"], "results": old["results"]}

    def add(self, row: dict[str, Any], order: Sequence[str]) -> None:
        """Puts a stage's outcome in the place of an earlier one, in the order of the stages."""
        kept = [r for r in self.data["stages"] if r["name"] != row["name"]]
        self.data["stages"] = sorted([*kept, row], key=lambda r: order.index(r["name"]))
        self.write()

    def write(self) -> None:
        reports.write(self._folder, self.data)


def make_report(
    folder: Path,
    facts: dict[str, Any],
    available: Sequence[Stage],
    only: str | None = None,
    budget: float = BUDGET - RESERVE,
) -> int:
    """Runs stages, writes the report after each and returns the exit code.

    Args:
        folder: where the report goes; it is created.
        facts: commit, date, device and versions, as `_environment.environment` states them.
        available: all stages, in order.
        only: which of them to run, by comma-separated names of stages or groups.
        budget: seconds for all of them together.
    """
    chosen = selected(available, only)
    order = [stage.name for stage in available]
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, facts)
    if only is not None:
        report.adopt()
    report.write()
    end = time.monotonic() + budget
    outcomes = []
    for number, stage in enumerate(chosen):
        promised = sum(later.promised for later in chosen[number + 1 :])
        seconds = min(stage.limit, end - time.monotonic() - promised)
        print(f"{stage.group}: {stage.name} ...", end=" ", flush=True)
        before = _written(folder, stage)
        row = run_stage(stage, seconds)
        if stage.result is not None and _written(folder, stage) not in (None, before):
            try:
                result = json.loads((folder / stage.result).read_text())
            except ValueError:
                row |= {"status": FAILED, "reason": f"{stage.result} is no JSON"}
            else:
                report.data["results"][stage.name] = result
        report.add(row, order)
        outcomes.append(row["status"])
        print(f"{row['status']}, {row['seconds']:.0f} s {row['reason']}".rstrip(), flush=True)
        if row["status"] == STOPPED:
            return INTERRUPTED
    print((folder / "report.md").read_text()[-TAIL:])
    print(f"wrote {folder / 'report.json'} and report.md")
    return 1 if any(status in BAD for status in outcomes) else 0


def _written(folder: Path, stage: Stage) -> int | None:
    """When a stage's result was last written; an older run's is no result of this one."""
    try:
        return (folder / (stage.result or "")).stat().st_mtime_ns
    except OSError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        metavar="STAGE[,STAGE]",
        help="run these stages or groups: environment, build, suite, sanitizer, benchmarks",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=reports.RESULTS,
        metavar="DIR",
        help="the report goes to a folder in DIR named after the GPU (default: bench/results)",
    )
    args = parser.parse_args(argv)

    import torch

    if not torch.cuda.is_available():
        print(f"gpu-report: torch {torch.__version__} sees no GPU here", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = _environment.environment(torch.device("cuda", torch.cuda.current_device()))
    folder = reports.folder_of(facts["device"], args.out.resolve())
    try:
        return make_report(folder, facts, stages(folder), args.only)
    except (OSError, ValueError) as error:
        print(f"gpu-report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
