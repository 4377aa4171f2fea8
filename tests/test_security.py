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
# By file: why it is right there.
ALLOWED = {
    "reg_kernels/convert/_block.py": {"exec", "compile"},  # the forward that was written there
    "reg_kernels/distributed/_checkpoint_reader.py": {"pickle"},  # that knows its classes alone
}


def keyword(call, name):
    """The value of a call's keyword as written, or None."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def wrongs(text, allowed=frozenset()):
    """What is not to be in the source of a module, with its line."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            if (top := name.split(".")[0]) in MODULES and top not in allowed:
                yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        written = ast.unparse(node.func).removeprefix("builtins.")
        if written in CALLS - allowed:
            yield node.lineno, f"calls {written}"
        if written == "torch.load" and keyword(node, "weights_only") != "True":
            yield node.lineno, "calls torch.load without weights_only=True"
        is_numpys = re.fullmatch(r"(np|numpy|npy)\.(load|read_array)", written)
        if is_numpys and keyword(node, "allow_pickle") != "False":
            yield node.lineno, f"calls {written} without allow_pickle=False"
        if keyword(node, "shell") not in (None, "False"):
            yield node.lineno, f"calls {written} with a shell"
        if written == "Image.open" and keyword(node, "formats") is None:
            yield node.lineno, "opens images of any format"


def test_the_sources_run_nothing_that_a_file_says():
    assert len(SOURCES) > 200
    found = []
    for path in SOURCES:
        where = str(path.relative_to(ROOT))
        lines = wrongs(path.read_text(), ALLOWED.get(where, frozenset()))
        found += [f"{where}:{line} {what}" for line, what in lines]
    assert not found, "\n".join(found)


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
    ],
)
def test_what_would_is_found(text):
    assert list(wrongs(text))


def test_what_is_harmless_is_not():
    text = "model.eval(); torch.compile(f); re.compile('a'); torch.load(p, weights_only=True)"
    assert not list(wrongs(text))


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
