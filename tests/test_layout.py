"""The house's own rules: where an op lives, and which way imports point."""

import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest
import torch

import reg_kernels.cases
from reg_kernels.ops._registry import OPS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reg_kernels"
CSRC = ROOT / "csrc"
# In-place twins, channel-wise variants, frozen forms, backwards and parts live in their op's files.
_FORMS = r"^feature_|_$|_(inference|backward|add|moments|sums)$"
FILES = sorted({re.sub(_FORMS, "", name) for name in OPS})


# An op of a family brings its element's function, include/reg_kernels/<family>/<op>.h; the loops,
# csrc/{cpu,cuda}/<family>.*, are the family's.
HEADERS = CSRC / "include" / "reg_kernels"
FAMILIES = {
    header.stem: header.parent.name
    for header in HEADERS.glob("*/*.h")
    if (CSRC / "cpu" / f"{header.parent.name}.cpp").is_file()
}

# What there has to be of an op, and of what its loops are: of its family, or of the op itself.
OF_AN_OP = ("reference/{}.py", "ops/{}.py", "cases/{}.py", "bench/{}.py")
OF_LOOPS = (
    *("csrc/cpu/{}.cpp", "csrc/cuda/{}.cu", "csrc/cuda/{}.cuh"),
    *("tests/emulation/{}.cpp", "tests/emulation/isas/{}.cpp"),
)
# And of an op that shares its loops with none. One of a family is held by its cases to be right in
# every implementation, wherever that stands, and has other files where there is more to say.
OF_A_LONE_OP = (
    "csrc/include/reg_kernels/{}_math.h",
    *("reg_kernels/triton/{}.py", "tests/ops/test_{}.py"),
)


@pytest.mark.parametrize("op", FILES)
def test_an_op_has_the_same_basename_in_every_layer(op):
    needed = [f"reg_kernels/{place}".format(op) for place in OF_AN_OP]
    needed += [place.format(FAMILIES.get(op, op)) for place in OF_LOOPS]
    needed += [place.format(op) for place in OF_A_LONE_OP if op not in FAMILIES]
    missing = [path for path in needed if not (ROOT / path).is_file()]
    assert not missing, ", ".join(missing)


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_registered_op_has_implementations_a_fake_and_cases(op):
    for backend, overload in OPS[op].overloads.items():
        name = overload.name()
        key = "CPU" if backend == "native" else "CompositeExplicitAutograd"
        if (
            backend != "native"
            or reg_kernels.backends.why_not("native", "cpu", torch.float32) is None
        ):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
        assert torch._library.utils.has_fake_kernel(overload), name
    assert any(case.op == op for case in reg_kernels.cases.all_cases())


def test_files_of_ops_that_do_not_exist():
    for directory in ("ops", "reference", "triton", "cases", "bench"):
        for path in (PACKAGE / directory).glob("*.py"):
            if not path.stem.startswith("_"):
                assert path.stem in FILES, path
    assert FAMILIES.keys() <= set(FILES)


# Python: faces -> ops -> implementations.


def module_of(path):
    """The name of the module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path):
    """Names of the reg_kernels modules that a file imports, at any depth of nesting: also inside of
    functions, and for types alone."""
    package = ["reg_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield ".".join([*base, alias.name])


def module_with(name):
    """The module of the package that has an imported name, or is it; None of others."""
    if name == "reg_kernels._C":  # of C++
        return None
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def test_no_module_reaches_itself():
    # By strings they may: ops/ finds triton/ so, which may not be installed, and the packages of
    # cases and benchmarks find their modules.
    graph = {
        module: {module_with(name) for name in imported(path)} - {None}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def layer(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "reg_kernels" else None


FACES = {
    *("nn", "functional", "adversarial", "augment", "training", "integrations"),
    *("cli", "convert", "cases", "bench"),
}
FORBIDDEN = {
    # from -> layers it must not import
    "reference": {"ops", "triton"} | FACES,
    "triton": {"ops", "reference"} | FACES,
    "ops": FACES,
    "nn": {"augment", "cli", "convert", "cases", "bench", "triton", "reference"},
    "optim": {"nn", "augment", "cli", "convert", "cases", "bench", "triton", "reference"},
    "adversarial": {"nn", "optim", "augment", "cli", "convert", "cases", "bench", "triton"},
    "augment": {"nn", "optim", "cli", "convert", "cases", "bench", "triton", "reference"},
    "distributed": {"integrations", "cli", "convert", "cases", "bench", "triton", "reference"},
    "training": {"integrations", "cli", "cases", "bench", "triton", "reference"},
    "integrations": {"cli", "cases", "bench", "triton", "reference"},
    "export": FACES | {"triton", "reference"},
    "functional": {"nn", "augment", "cli", "convert", "cases", "bench", "triton", "reference"},
}


@pytest.mark.parametrize("where", sorted(FORBIDDEN))
def test_imports_point_one_way(where):
    paths = list((PACKAGE / where).glob("*.py")) or [PACKAGE / f"{where}.py"]
    assert paths
    for path in paths:
        for module in imported(path):
            assert layer(module) not in FORBIDDEN[where], f"{path}: {module}"


def test_the_library_knows_nothing_of_the_scripts():
    for path in MODULES.values():
        assert not {name.partition(".")[0] for name in imported(path)} & {"bench", "tests"}, path


def test_nobody_edits_the_path_of_imports():
    edit = re.compile(r"sys\.path(\[.*=|\.(append|extend|insert|remove)\()")
    for folder in ("bench", "reg_kernels", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not edit.search(path.read_text()), path


def test_the_reference_imports_torch_alone():
    known = ("torch", "__future__", "collections.abc", "typing", "reg_kernels.reference")
    known += ("reg_kernels._augment_program",)  # names and numbers
    for path in (PACKAGE / "reference").glob("*.py"):
        for module in imported(path):
            assert module.startswith(known), f"{path}: {module}"


def test_public_names_exist_and_are_documented():
    parts = ("adversarial", "augment", "distributed", "export", "functional")
    parts += ("nn", "optim", "training")
    for part in ("", *(f".{part}" for part in parts)):
        name = f"reg_kernels{part}"
        module = importlib.import_module(name)
        assert module.__doc__
        for public in module.__all__:
            value = getattr(module, public)
            assert value.__doc__, f"{name}.{public}"


# C++: cpu, cuda -> torch -> include.


def includes(path):
    return re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())


def test_the_kernel_headers_know_no_torch():
    for path in (CSRC / "include").rglob("*.*"):
        for name in includes(path):
            assert not re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", name), f"{path}: {name}"


def test_cuda_and_cpu_do_not_include_each_other():
    for here, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in (CSRC / here).rglob("*.*"):
            for name in includes(path):
                assert f"{other}/" not in name, f"{path}: {name}"


@pytest.mark.parametrize("path", [*CSRC.glob("cpu/*.simd.cpp"), *CSRC.glob("cuda/*.cuh")], ids=str)
def test_kernels_are_free_of_torch(path):
    seen, todo = set(), [path]
    while todo:
        file = todo.pop()
        for name in includes(file):
            assert not re.match(r"(torch|ATen|c10)/", name), f"{file}: {name}"
            for base in (file.parent, CSRC, CSRC / "include"):
                if (base / name).is_file() and (base / name) not in seen:
                    seen.add(base / name)
                    todo.append(base / name)
