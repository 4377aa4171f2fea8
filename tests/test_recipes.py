"""docs/recipes/: each trains for a few steps, where what it imports is installed."""

import ast
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "digits")


def packages(path):
    """The packages that a script imports, but for what every install and this folder have."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"digits", "reg_kernels", "torch"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_trains(path, monkeypatch, tmp_path, capsys):
    for name in sorted(packages(path) | {"sklearn"}):
        # timm may be there without the torchvision that it imports.
        pytest.importorskip(name, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [path.name, "--steps", "3"])
    # The C++ compiler alone would take half a minute; `make recipes` calls it.
    compiled, traced = torch.compile, {"mode": None, "backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda *args, **o: compiled(*args, **o | traced))
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        if state := sys.modules.get("accelerate.state"):  # which is the process's
            state.AcceleratorState._reset_state(True)
    losses = re.findall(r"test[ _]loss\W+([\d.]+)", capsys.readouterr().out)
    assert losses
    assert all(math.isfinite(float(loss)) for loss in losses)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_has_its_line_in_the_docs(path):
    assert len(path.read_text().splitlines()) <= 80
    assert f"](recipes/{path.name})" in (FOLDER.parent / "recipes.md").read_text()
