"""Installs a wheel into environments of several Pythons and torches and runs the tests there.

`make test-matrix` runs it on the CPU wheel in dist/, which `make wheel` builds. An environment is
build/matrix/<python>-<torch>; it stays for the next time. What is not at hand, a Python or a torch
for it, is named as skipped. The table is in bench/results/matrix.md as well; `--only` tests some of
the environments and keeps the rows of the others, of the same wheel.

Exit code: 0 all that ran has passed, 1 something failed or nothing ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

from reg_kernels._console import print_lines, print_table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "matrix"
SUITE = FOLDER / "suite"  # the repository without the package, which would be imported from there
OF_SUITE = ("bench", "csrc", "docs", "pyproject.toml", "setup.py", "tests")
RESULT = ROOT / "bench" / "results" / "matrix.md"

# Each Python that is served, once, and each torch: the oldest, the one that the tests are pinned
# to, and what pip takes for the newest.
PAIRS = (("3.11", "2.13.0"), ("3.12", "2.11.0"), ("3.13", "newest"), ("3.14", "newest"))
# Of pyproject.toml's `dev`, in its versions.
NEEDED = ("rich", "numpy", "pytest", "hypothesis", "expecttest")
MOST_SECONDS = 0.3  # of the import, beside torch's
# Values of every op, the op suites, layers, optimizers and what is exported, in native code,
# compiled and not; the other implementations are the same Python everywhere.
TESTS = (
    "tests/every_op/test_values.py",
    *("tests/ops", "tests/nn", "tests/optim", "tests/distributed/test_checkpoint.py"),
    *("tests/export/test_export.py", "tests/export/test_aot_inductor.py"),
)
LEFT_OUT = "not triton and not reference and not opcheck and not sharded"
IMPORT = (
    "import time, torch; begin = time.perf_counter(); import reg_kernels; "
    "print(torch.__version__, reg_kernels.__file__, round(time.perf_counter() - begin, 2))"
)
NONE_THERE = "No matching distribution found"  # what pip says
COLUMNS = ("Python", "torch", "outcome", "import, s", "s")


class Row(NamedTuple):
    python: str
    torch: str
    outcome: str
    imported: str = ""
    seconds: str = ""

    @property
    def is_bad(self) -> bool:
        return self.outcome.startswith("FAILED")


def interpreter(version: str) -> str | None:
    """A Python of this version that starts, from PATH or pyenv's folder."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(
        map(str, (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    )
    for candidate in filter(None, candidates):
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        said = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip() == version:
            return candidate
    return None


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command, environment = [str(word) for word in words], os.environ | {"PYTHONPATH": str(SUITE)}
    return subprocess.run(command, cwd=SUITE, env=environment, text=True, capture_output=True)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]


def environment(python: str, version: str, torch: str) -> tuple[Path, str | None]:
    """The Python of an environment with this torch, and why there is none, or None."""
    folder = FOLDER / f"{version}-{torch}"
    inside, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        made = call(python, "-m", "venv", folder)
        if made.returncode:
            return inside, last_line(made.stdout + made.stderr)
        ready.touch()
    # The newest one may be another by now.
    wanted = ["--upgrade", "torch"] if torch == "newest" else [f"torch=={torch}"]
    done = call(inside, "-m", "pip", "install", "--quiet", "--no-compile", *wanted)
    if NONE_THERE in done.stderr:
        return inside, f"pip finds no {wanted[-1]} for it"
    pins = [pin for pin in pinned() if pin.partition("==")[0] in NEEDED]
    for step in (done, call(inside, "-m", "pip", "install", "--quiet", *pins)):
        if step.returncode:
            raise RuntimeError(last_line(step.stderr))
    return inside, None


def pinned() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"]["dev"]


def run(version: str, torch: str, wheel: Path, tests: list[str]) -> Row:
    begin = time.monotonic()
    python = interpreter(version)
    if python is None:
        return Row(version, torch, f"skipped: there is no Python {version} here")
    try:
        inside, reason = environment(python, version, torch)
    except RuntimeError as error:
        return Row(version, torch, f"FAILED: {error}")
    if reason is not None:
        return Row(version, torch, f"skipped: {reason}")
    installed = call(
        *(inside, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    )
    if installed.returncode:
        return Row(version, torch, f"FAILED: {last_line(installed.stderr)}")
    tries = [call(inside, "-P", "-c", IMPORT) for _ in range(6)]  # the first one compiles
    for imported in tries:
        if imported.returncode:
            return Row(version, torch, f"FAILED: {last_line(imported.stderr)}")
    found, file, seconds = min((x.stdout.split() for x in tries), key=lambda x: float(x[2]))
    if float(seconds) > MOST_SECONDS:
        return Row(version, found, f"FAILED: importing takes {seconds} s beside torch", seconds)
    if not Path(file).is_relative_to(inside.parents[1]):
        return Row(version, found, f"FAILED: {file} was imported, not what was installed")
    paths = "pythonpath=tests tests/emulation tests/triton_kernels"
    suite = call(inside, "-P", "-m", "pytest", "-q", "-o", paths, *tests, "-k", LEFT_OUT)
    (FOLDER / f"{version}-{torch}.txt").write_text(suite.stdout + suite.stderr)
    outcome = re.sub(r" in .*", "", last_line(suite.stdout)).strip("= ")
    if suite.returncode:
        outcome = f"FAILED: {outcome}, see build/matrix/{version}-{torch}.txt"
    return Row(version, found, outcome, seconds, f"{time.monotonic() - begin:.0f}")


def keep(version: str, torch: str, wheel: Path, row: Row) -> None:
    """For a later run, of which the rows of other environments are."""
    text = json.dumps({"wheel": digest(wheel), "row": row})
    (FOLDER / f"{version}-{torch}.json").write_text(text)


def kept(version: str, torch: str, wheel: Path) -> Row | None:
    path = FOLDER / f"{version}-{torch}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return Row(*found["row"]) if found.get("wheel") == digest(wheel) else None


def digest(wheel: Path) -> str:
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def write(rows: list[Row], wheel: Path) -> None:
    size = wheel.stat().st_size / 2**20
    lines = [
        "# The wheel in other environments",
        "",
        f"`make test-matrix` wrote this on {time.strftime('%Y-%m-%d')} of `{wheel.name}`, "
        f"{size:.1f} MiB. `import`: the seconds beside torch's own.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    RESULT.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.matrix", description=__doc__)
    parser.add_argument("--only", metavar="PYTHON-TORCH", nargs="+", help="as 3.12-2.11.0")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="default: %(default)s")
    options = parser.parse_args(arguments)
    pairs = [pair for pair in PAIRS if options.only is None or "-".join(pair) in options.only]
    wheels = [path for path in (ROOT / "dist").glob("*.whl") if "+" not in path.name]
    if not wheels or not pairs:
        what = "no such environment" if wheels else "no wheel in dist/: run `make wheel` first"
        parser.error(what)
    wheel = max(wheels, key=lambda path: path.stat().st_mtime)
    SUITE.mkdir(parents=True, exist_ok=True)
    for name in OF_SUITE:
        if not (SUITE / name).exists():
            (SUITE / name).symlink_to(ROOT / name)
    rows = []
    for i, (version, torch) in enumerate(pairs, start=1):
        print_lines([f"{i} of {len(pairs)}: Python {version}, torch {torch}"])
        rows.append(run(version, torch, wheel, options.tests))
        keep(version, torch, wheel, rows[-1])
    print_table(wheel.name, COLUMNS, rows)
    write([row for pair in PAIRS if (row := kept(*pair, wheel))], wheel)
    return int(any(row.is_bad for row in rows) or all(not row.seconds for row in rows))


if __name__ == "__main__":
    sys.exit(main())
