"""README and docs/: what they show runs, and the site builds."""

import ast
import doctest
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

from reg_kernels.cli import main

from support import run_program

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def check_shell(example):
    """Of each command: a target that there is, or options that are taken; `info` runs."""
    targets = re.search(r"^\.PHONY:(.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    for line in example.parsed.splitlines():
        words = shlex.split(line, comments=True)
        command, *words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
        if command == "torchrun":
            module, *words = words[words.index("-m") + 1 :]
            assert module == "reg_kernels"
            command = "reg-kernels"
        assert command in ("make", "pip", "reg-kernels"), f"{example.path}: nothing checks {line}"
        if command == "make":
            assert set(words) <= set(targets), f"{example.path}: {line}"
        elif command == "reg-kernels":
            with pytest.MonkeyPatch.context() as patch:
                if words != ["info"]:
                    module = importlib.import_module(f"reg_kernels.cli.{words[0]}")
                    patch.setattr(module, "run", lambda args: 0)
                assert main(words) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page, tmp_path, monkeypatch):
    pytest.importorskip("sybil")
    from sybil.document import Document
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

    monkeypatch.chdir(tmp_path)
    python = PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS)
    for example in Document.parse(str(page), python, CodeBlockParser("sh", check_shell)):
        example.evaluate()


def named(expression):
    """What a dotted name is, as `nn.Dropout` below reg_kernels, or torch's own; None where its
    package is not installed."""
    words = ast.unparse(expression).split(".")
    root = words[0] if words[0] in ("torch", "timm", "torchvision") else "reg_kernels"
    needed = "lightning" if "lightning" in words else root
    if importlib.util.find_spec(needed) is None:
        return None
    thing = importlib.import_module(root)
    for word in words[root == words[0] :]:
        if not hasattr(thing, word):
            importlib.import_module(".".join([thing.__name__, word]))
        thing = getattr(thing, word)
    return thing


def test_names_that_others_are_migrated_to_exist_and_take_these_arguments():
    page = (ROOT / "docs" / "migration.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    found = 0
    for _, theirs, ours, *_ in rows:
        of_theirs = re.findall(r"`((?:torch|timm|torchvision)\.[\w.]+)[`(]", theirs)
        for code in [*of_theirs, *re.findall(r"`([^`\"]+(?:\(.*?\))?)`", ours)]:
            call = ast.parse(code, mode="eval").body
            thing = named(call.func if isinstance(call, ast.Call) else call)
            if thing is not None and isinstance(call, ast.Call):
                taken = inspect.signature(thing).parameters
                unknown = {word.arg for word in call.keywords} - set(taken)
                assert not unknown or "options" in taken, f"{code}: {unknown}"
            found += thing is not None
    assert found > 100


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs" / "conf.py").read_text().split("{toctree}")[1].split()
    assert {f"docs/{page.stem}" for page in PAGES[1:]} <= set(contents)


def test_readme_is_short_and_says_first_what_has_not_run():
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 150
    assert "not run on a GPU" in " ".join(lines[:10])


def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path):
    for module in ("sphinx", "furo", "myst_parser", "sphinx_argparse_cli"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = run_program([*command, "-c", "docs", ".", str(tmp_path)], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    reference = "".join(page.read_text() for page in tmp_path.glob("docs/reference/*.html"))
    parts = ("adversarial", "augment", "distributed", "export", "functional", "nn", "optim")
    for part in ("", *(f".{part}" for part in (*parts, "training"))):
        module = importlib.import_module(f"reg_kernels{part}")
        for name in module.__all__:
            assert re.search(rf'id="(module-)?{module.__name__}\.{name}"', reference), name
    for name in (
        *("backends.choose", "backends.why_not"),
        *("integrations.timm.register", "integrations.lightning.EarlyStopping"),
    ):
        assert f'id="reg_kernels.{name}"' in reference, name
