"""What sources may not do: run what a file says, or read what docs/security.md does not name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "reg_kernels").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "bench").rglob("*.py")), ROOT / "setup.py"]
PAGE = ROOT / "docs" / "security.md"

MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
    *("yaml", "ruamel", "jsonpickle", "code", "codeop", "runpy", "xmlrpc", "telnetlib", "ftplib"),
    *("requests", "httpx", "urllib", "http", "aiohttp"),
}
# Python's own functions, and those of other modules.
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"}
# What runs what a file says, whatever it is handed: not to be named at all.
NAMES = re.compile(
    r"torch\.distributed\.checkpoint(\.state_dict_loader)?\.(load|load_state_dict|_load_state_dict\w*)"
    r"|torch\.distributed\.checkpoint\.format_utils(\.\w+)?"
    r"|torch\.serialization\.(_load|_legacy_load)"
    r"|torch\.(jit\.load|hub\.\w+|package\.\w+)|(pd|pandas)\.read_pickle"
)
TORCHS_LOADER = "torch.distributed.checkpoint.state_dict_loader"
LOADS = {"torch.load", "torch.serialization.load"}
NUMPYS = re.compile(r"(np|npy|numpy(\.\w+)*)\.(load|read_array)")
IMAGES = re.compile(r"(PIL\.)?Image\.open")
# What starts a program, connects or loads a library, and the files of the package that name it.
# What builds, measures and tests the package calls compilers.
OUTSIDE = re.compile(
    r"(subprocess|socket|ctypes|multiprocessing|asyncio|cffi|pty|torch\.multiprocessing)(\.\w+)*"
    r"|os\.(exec|spawn|posix_spawn|fork)\w*|torch\.(ops\.load_library|utils\.cpp_extension)(\.\w+)*"
)
REACHES = {
    "reg_kernels/backends.py": {"ctypes", "torch.ops.load_library"},  # the package's own libraries
    "reg_kernels/bench/_environment.py": {"subprocess"},
    "reg_kernels/bench/_run.py": {"os.execve"},
    "reg_kernels/cli/_study.py": {"multiprocessing", "socket"},  # of socket the host's name
    "reg_kernels/distributed/_connections.py": {"socket"},  # ends those that torch has made
}
# By file: why it is right there.
ALLOWED = {
    "reg_kernels/convert/_block.py": {"exec", "compile"},  # the forward that was written there
    # The loader that torch has, with a reader and a planner of ours.
    "reg_kernels/distributed/_checkpoint.py": {
        "torch.distributed.checkpoint.state_dict_loader.load"
    },
}


def keyword(call, name):
    """The value of a call's keyword as written, or None."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def imported(tree):
    """By a name of the module, what it is imported from: `os.system` for `from os import system as
    run`, wherever in the module that stands."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def whole_names(node):
    """What an import names, of this package nothing; none where a node imports nothing."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def wrongs(text, allowed=frozenset()):
    """What is not to be in the source of a module, with its line."""
    tree = ast.parse(text)
    origins = imported(tree)

    def whole(node):
        """An expression as written, its first name by what that was imported from."""
        first, dot, rest = ast.unparse(node).partition(".")
        return (origins.get(first, first) + dot + rest).removeprefix("builtins.")

    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        names = whole_names(node)
        for name in names:
            if name.split(".")[0] in MODULES:
                yield node.lineno, f"imports {name}"
        if isinstance(node, ast.Name | ast.Attribute):
            names = [whole(node)]
            if is_dangerous(names[0], allowed) and id(node) not in called:
                yield node.lineno, f"hands {names[0]} on"
        for name in names:
            if NAMES.fullmatch(name) and name not in allowed:
                yield node.lineno, f"names {name}"
        if not isinstance(node, ast.Call):
            continue
        written = whole(node.func)
        if written in CALLS - allowed:
            yield node.lineno, f"calls {written}"
        if written in LOADS and keyword(node, "weights_only") != "True":
            yield node.lineno, f"calls {written} without weights_only=True"
        if NUMPYS.fullmatch(written) and keyword(node, "allow_pickle") != "False":
            yield node.lineno, f"calls {written} without allow_pickle=False"
        if keyword(node, "shell") not in (None, "False") or keyword(node, "pickle_module"):
            yield node.lineno, f"calls {written} with a shell or a pickle"
        if IMAGES.fullmatch(written) and keyword(node, "formats") is None:
            yield node.lineno, "opens images of any format"


def is_dangerous(name, allowed):
    """Whether a function may be called alone, where it is seen what it is handed."""
    is_one = name in (CALLS | LOADS) - allowed
    return is_one or bool(NUMPYS.fullmatch(name) or IMAGES.fullmatch(name))


def outside(text):
    """What a module names that starts a program, connects or loads a library."""
    tree = ast.parse(text)
    origins = imported(tree)
    for node in ast.walk(tree):
        names = whole_names(node)
        if isinstance(node, ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            names = [origins.get(first, first) + dot + rest]
        yield from (name for name in names if OUTSIDE.fullmatch(name))


def test_the_sources_run_nothing_that_a_file_says():
    assert len(SOURCES) > 200
    found = []
    for path in SOURCES:
        where = str(path.relative_to(ROOT))
        lines = wrongs(path.read_text(), ALLOWED.get(where, frozenset()))
        found += [f"{where}:{line} {what}" for line, what in lines]
    assert not found, "\n".join(found)


def test_the_package_reaches_outside_where_the_page_says():
    found = {}
    for path in PACKAGE:
        names = set(outside(path.read_text()))
        if names:
            found[str(path.relative_to(ROOT))] = {
                name if name.startswith(("os.", "torch.")) else name.split(".")[0] for name in names
            }
    assert found == REACHES


@pytest.mark.parametrize(
    "text",
    [
        "import subprocess",
        "from subprocess import run",
        "import os\nos.execvp('ls', ['ls'])",
        "from os import posix_spawn as start",
        "import torch as t\nt.ops.load_library(path)",
        "from socket import create_connection",
        "from torch.utils.cpp_extension import load",
    ],
)
def test_what_reaches_outside_is_found(text):
    assert list(outside(text))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "npy.read_array(file, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "Image.open(path)",
        "from urllib.request import urlopen",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path, weights_only=False)",
        "import torch as t\nt.load(path)",
        "def f():\n    from torch.serialization import load\n    load(path)",
        "from os import system\nsystem('ls')",
        "from os import popen as p\np('ls')",
        "import builtins as b\nb.eval('1')",
        "from numpy import load\nload(path)",
        "from PIL.Image import open\nopen(path)",
        "torch.distributed.checkpoint.load(state, checkpoint_id=path)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state)",
        "from torch.distributed import checkpoint\nf = partial(checkpoint.load, state)",
        "from torch.distributed.checkpoint import load",
        "from torch.distributed.checkpoint.state_dict_loader import load as read",
        "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save",
        "import torch\nread = torch.load\nread(path)",
        "partial(torch.load, path)()",
        "run = eval\nrun(text)",
        "map(exec, texts)",
        "from numpy.lib import npyio\nnpyio.load(path)",
        "import numpy as n\nread = n.load",
        "torch.jit.load(path)",
        "torch.hub.load(a, b)",
        "import pandas\npandas.read_pickle(path)",
        "torch.load(path, weights_only=True, pickle_module=mine)",
    ],
)
def test_what_would_is_found(text):
    assert list(wrongs(text))


def test_what_is_harmless_is_not():
    text = "model.eval(); torch.compile(f); re.compile('a'); torch.load(p, weights_only=True)"
    assert not list(wrongs(text))
    text = "from torch import load; load(p, weights_only=True); from json import load as l; l(p)"
    assert not list(wrongs(text))


def test_an_allowance_is_for_one_name():
    text = "from torch.distributed.checkpoint.state_dict_loader import load\nload(state)\n"
    allowed = ALLOWED["reg_kernels/distributed/_checkpoint.py"]
    assert not list(wrongs(text, allowed))
    assert list(wrongs(text + "import pickle", allowed))
    assert list(wrongs(text))


def environment_variables(path):
    """Those that a module names: where it reads them, or in a constant of its own."""
    text = path.read_text()
    yield from re.findall(r"REG_KERNELS_[A-Z_]+[A-Z]", text)
    yield from re.findall(r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*\"(\w+)\"", text)
    yield from re.findall(r"\{((?:\"[A-Z_]+\",? ?)+)\} <= os\.environ", text)


def test_the_page_names_every_variable():
    page = PAGE.read_text()
    found = {
        name
        for path in [*PACKAGE, ROOT / "setup.py"]
        for names in environment_variables(path)
        for name in re.findall(r"\w+", names)
    }
    assert {"REG_KERNELS_BACKEND", "RANK", "LOCAL_RANK", "MAX_JOBS", "KINETO_LOG_LEVEL"} <= found
    missing = sorted(name for name in found if f"`{name}`" not in page)
    assert not missing, f"{PAGE.name} does not name {', '.join(missing)}"
