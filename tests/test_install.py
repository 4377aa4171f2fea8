"""Installing with what a machine has: no nvcc, no compiler, a CUDA build asked for in vain."""

import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from reg_kernels import backends

from support import run_program

ROOT = Path(__file__).parents[1]
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "reg_kernels"]


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources with nothing built in it."""
    target = tmp_path / "tree"
    target.mkdir()
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy(source, target / name)
    return target


def run(tree, *arguments, path=None, **environment):
    environment = os.environ | environment
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PATH"] = str(path)
    return run_program([sys.executable, *arguments], cwd=tree, env=environment)


def build(tree, **environment):
    return run(tree, "setup.py", "-q", "build_ext", "--inplace", **environment)


def info(tree):
    result = run(tree, "-m", "reg_kernels", "info")
    assert result.returncode == 0, result.stderr
    return " ".join(result.stdout.split())


def test_without_any_compiler_everything_works_and_info_says_what_is_missing(tree, tmp_path):
    result = build(tree, path=tmp_path, REG_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert not list(tree.glob("reg_kernels/*.so"))
    assert "native CPU: missing: installed with REG_KERNELS_BUILD=none" in info(tree)
    code = (
        "import torch, reg_kernels\n"
        "layer = reg_kernels.nn.Dropout(0.5)\n"
        "print(sorted(set(layer(torch.ones(100)).tolist())))"
    )
    assert run(tree, "-c", code).stdout.strip() == "[0.0, 2.0]"


def test_a_wheel_without_any_compiler(tree, tmp_path):
    # `pip wheel` in an isolated environment would ask the network for setuptools.
    result = run(
        tree,
        *("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."),
        REG_KERNELS_BUILD="none",
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "reg_kernels/ops/dropout.py" in names
    assert "reg_kernels/_build.json" in names
    assert {"reg_kernels/py.typed", "reg_kernels/_C.pyi"} <= set(names)  # for type checkers
    assert not [n for n in names if n.endswith(".so")]
    assert [n for n in names if n.endswith("licenses/LICENSE")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_without_nvcc_the_cpu_kernels_are_built(tree):
    # One op of all, since each source is found by its place and the others would take minutes.
    for source in (tree / "csrc" / "cpu").glob("*.cpp"):
        if source.name.split(".")[0] not in ("isa", "penalty"):
            source.unlink()
    # Whether nvcc is there or not, NVCC names one that is not. Of the instruction sets one: all of
    # them is what the other tests run with.
    nowhere = {"NVCC": "no-such-nvcc", "CUDA_HOME": ""}
    result = build(tree, **nowhere, REG_KERNELS_CUDA="0", REG_KERNELS_ISA="native")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tree.glob("reg_kernels/*.so")} == {
        *("_C.abi3.so", "libreg_kernels.so", "libreg_kernels_cpu.so")
    }
    facts = json.loads((tree / "reg_kernels/_build.json").read_text())
    assert facts["native_missing"] is None
    assert "REG_KERNELS_CUDA=0" in facts["cuda_missing"]
    assert "built by g++" in info(tree)
    code = "from reg_kernels import _C; print(_C.isa(), *_C.isas()); _C.set_isa('any')"
    result = run(tree, "-c", code)
    isa, only = result.stdout.split()
    assert isa == only
    had = f"set_isa: name must be one that was built and that this CPU has ({only}), got any"
    assert had in result.stderr

    # A compiler whose target nobody knows: the same one, but for what it says of that.
    compiler = tree / "g++-unknown"
    compiler.write_text(
        f'#!/bin/sh\n{shutil.which("g++")} "$@" | sed "/__x86_64__\\|__aarch64__/d"\n'
    )
    compiler.chmod(0o755)
    result = build(tree, CXX=str(compiler), REG_KERNELS_CUDA="0")
    assert result.returncode == 0, result.stderr
    note = f"portable code alone: {compiler} compiles for none of the architectures whose"
    assert f"reg_kernels: native: {note}" in result.stdout
    assert "native CPU: baseline (of baseline), built by g++-unknown" in info(tree)
    assert note in info(tree)


@pytest.mark.skipif(
    backends.why_not("native", "cpu", torch.float32) is not None, reason="nothing is built"
)
def test_a_wheel_for_every_python_and_torch(tmp_path):
    for module in ("build", "auditwheel"):
        pytest.importorskip(module)
    from bench.wheels import build_wheel

    # Of what is compiled here already.
    wheel = build_wheel(tmp_path, {})
    assert re.fullmatch(r"reg_kernels-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        libraries = {name for name in file.namelist() if name.endswith(".so")}
        names = {"_C.abi3.so", "libreg_kernels.so", "libreg_kernels_cpu.so"}
        assert libraries == {f"reg_kernels/{name}" for name in names}
        file.extractall(tmp_path / "installed")
    code = (
        "import torch, reg_kernels\n"
        "from reg_kernels import _C, backends\n"
        "print(reg_kernels.__file__, backends.why_not('native', 'cpu', torch.float32))\n"
        "print(*_C.isas(), *sorted({*reg_kernels.nn.Dropout(0.5)(torch.ones(100)).tolist()}))"
    )
    path = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = run_program([sys.executable, "-P", "-c", code], cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{tmp_path / 'installed' / 'reg_kernels' / '__init__.py'} None"
    assert second.endswith(" 0.0 2.0")


def test_a_source_distribution_holds_the_sources_alone(tree, tmp_path):
    (tree / "reg_kernels" / "libreg_kernels_cpu.so").touch()
    (tree / "reg_kernels" / "_build.json").touch()
    (tree / "tests").mkdir()
    (tree / "tests" / "test_install.py").touch()
    result = run(tree, "setup.py", "-q", "sdist", "-d", str(tmp_path))
    assert result.returncode == 0, result.stderr
    with tarfile.open(*tmp_path.glob("*.tar.gz")) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[chi]*")}
    assert {"setup.py", "pyproject.toml", "reg_kernels/ops/dropout.py", *sources} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]
    assert not [name for name in names if name.startswith("tests")]


def test_what_a_build_of_its_own_needs_there(tree):
    done = run(tree, "-c", HOOK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch>=2.11", "ninja"]
    done = run(tree, "-c", HOOK, REG_KERNELS_BUILD="none")
    assert done.stdout.split() == []


def test_an_editable_install_without_a_build_keeps_what_was_built(tree, tmp_path):
    editable = "import sys, setuptools.build_meta as hooks; hooks.build_editable(sys.argv[1])"
    package = tree / "reg_kernels"
    for built in (package / "libreg_kernels_cpu.so", package / "_build.json"):
        built.touch()
    done = run(tree, "-c", editable, str(tmp_path), REG_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert (package / "libreg_kernels_cpu.so").exists()
    assert (package / "_build.json").read_text() == ""
    done = build(tree, REG_KERNELS_BUILD="none")  # which asks for none
    assert done.returncode == 0, done.stderr
    assert not (package / "libreg_kernels_cpu.so").exists()


# What pip calls.
HOOK = (
    "import contextlib, io, setuptools.build_meta as hooks\n"
    "with contextlib.redirect_stdout(io.StringIO()):\n"
    "    needed = hooks.get_requires_for_build_wheel()\n"
    "print(*needed, sep='\\n')"
)


def test_importing_leaves_out_what_takes_long():
    slow = ["torch._dynamo", "torch.distributed.tensor", "triton", "numpy", "sklearn", "matplotlib"]
    code = (
        "import sys, torch\n"
        "there = {*sys.modules}\n"
        "import reg_kernels\n"
        f"print(*({{*{slow!r}}} & {{*sys.modules}} - there))"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def bare_path(tmp_path, *programs):
    """A directory to be the whole PATH, with these programs alone."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for program in programs:
        (directory / program).symlink_to(shutil.which(program))
    return directory


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_cuda_asked_for_without_nvcc_is_an_error_with_the_remedy(tree, tmp_path):
    result = build(
        tree,
        path=bare_path(tmp_path, "g++"),
        REG_KERNELS_CUDA="1",
        NVCC="no-such-nvcc",
        CUDA_HOME="",
    )
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("reg_kernels: REG_KERNELS_CUDA=1, but 'no-such-nvcc' was not found")
    assert "install the CUDA toolkit" in message


def test_no_compiler_is_an_error_with_the_remedy(tree, tmp_path):
    result = build(tree, path=bare_path(tmp_path))
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert "no C++ compiler: 'g++' was not found" in message
    assert "REG_KERNELS_BUILD=none" in message


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_no_ninja_is_an_error_with_the_remedy(tree):
    hides = "import runpy, sys; sys.modules['ninja'] = None; sys.argv[:1] = []; "
    hides += "runpy.run_path('setup.py', run_name='__main__')"
    result = run(tree, "-c", hides, "setup.py", "build_ext", "--inplace", REG_KERNELS_CUDA="0")
    assert result.returncode != 0
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("reg_kernels: the Python package ninja is missing")
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("REG_KERNELS_BUILD", "maybe", "REG_KERNELS_BUILD must be one of auto, none, got 'maybe'"),
        ("REG_KERNELS_ISA", "avx", "REG_KERNELS_ISA must be one of all, native, "),
        ("MAX_JOBS", "0", "MAX_JOBS must be a number from 1 on, got '0'"),
        ("CXX", "false", "CXX must be a C++ compiler as g++ is, got 'false'"),
        ("REG_KERNELS_CUDA", "yes", "REG_KERNELS_CUDA must be one of auto, 0, 1, got 'yes'"),
    ],
)
def test_bad_settings(tree, name, value, expected):
    result = build(tree, **{name: value})
    assert result.returncode != 0
    assert expected in result.stderr
