"""README and docs/: what they show runs, what they quote is said, and the site builds."""

import ast
import doctest
import importlib
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


def messages(path):
    """Patterns of the messages that a file can print: its strings, anything for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(text) for text in texts if isinstance(text, str)) >= 20:
            yield "".join(".+" if text is None else re.escape(text) for text in texts)


def test_quoted_messages_are_in_the_sources():
    paths = [ROOT / "setup.py", *(ROOT / "reg_kernels").glob("cli/*.py")]
    paths.append(ROOT / "reg_kernels" / "backends.py")
    patterns = [re.compile(pattern) for path in paths for pattern in messages(path)]
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "docs/errors.md").read_text(), re.S)
    quoted = [line for block in blocks for line in block.splitlines()]
    assert len(quoted) > 5
    for line in quoted:  # who speaks may come first: "reg_kernels: ", "reg-kernels check: "
        ends = [line, *(line[found.end() :] for found in re.finditer(": ", line))]
        assert any(pattern.fullmatch(end) for pattern in patterns for end in ends), line


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
    parts = ("adversarial", "augment", "export", "functional", "nn", "optim", "training")
    for part in ("", *(f".{part}" for part in parts)):
        module = importlib.import_module(f"reg_kernels{part}")
        for name in module.__all__:
            assert re.search(rf'id="(module-)?{module.__name__}\.{name}"', reference), name
