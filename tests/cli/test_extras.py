"""What a base install, of torch alone, does without, and what it says of it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from reg_kernels import _extras
from reg_kernels.bench import _environment
from reg_kernels.cli import COMMANDS, main

from support import run_program

# A module that is None in sys.modules is as one that is not installed.
WITHOUT = """
import sys
LACKING = ("numpy", "rich", "matplotlib", "PIL", "sklearn", "optuna", "tensorboard", "triton")
sys.modules.update(dict.fromkeys(LACKING))
import torch
"""
USE = """
import reg_kernels
from reg_kernels import augment, bench, functional, nn, optim

model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.Dropout(0.5))
model = reg_kernels.convert(torch.nn.Sequential(model, torch.nn.Flatten()), fuse=True)
model.append(torch.nn.Linear(12, 5))
optimizer = optim.AdamW(optim.param_groups(model, weight_decay=0.1), max_grad_norm=1.0)
mixup = augment.Mixup(0.2, num_classes=5)
images, target = mixup(torch.ones(4, 3, 2, 2), torch.arange(4))
nn.CrossEntropyLoss()(model(images), target).backward()
optimizer.step()
print("works")
"""
INFO = """
from reg_kernels.cli import main

sys.exit(main(["info"]))
"""


def test_torch_alone_is_enough_for_the_package_and_info_says_what_to_install():
    done = run_program([sys.executable, "-c", WITHOUT + USE + INFO])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("works\n")
    said = re.sub(" +", " ", done.stdout)
    assert "extra cli: lacks rich: pip install rich\n" in said
    lacking = "PIL, matplotlib, numpy, rich, sklearn"
    remedy = "pip install pillow matplotlib numpy rich scikit-learn"
    assert f"extra train: lacks {lacking}: {remedy}\n" in said
    assert "  triton      no: triton is not installed\n" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_needs_no_more_than_its_extra(command: str):
    """As a program of its own, in which no test has imported anything."""
    had = _extras.EXTRAS.get(COMMANDS[command].extra or "", ())
    code = WITHOUT.replace("LACKING))", f"set(LACKING) - {set(had)!r}))")
    code += f"from reg_kernels.cli import main\nsys.exit(main([{command!r}, '--help']))"
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: reg-kernels {command}")


@pytest.mark.parametrize("command", [name for name, of in COMMANDS.items() if of.extra])
def test_a_command_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    extra = COMMANDS[command].extra
    lacking = _extras.EXTRAS[extra][-1]
    monkeypatch.setitem(sys.modules, lacking, None)
    assert main([command]) == 2
    remedy = _extras.remedy([lacking])
    expected = f"reg-kernels {command}: it needs {lacking}, not installed here: {remedy}\n"
    assert capsys.readouterr().err == expected


def test_a_plot_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # which a chart is drawn without
    for name, value in _environment.ALLOCATOR.items():
        monkeypatch.setenv(name, value)  # or it would become another process
    words = ["--device", "cpu", "--op", "dropout", "--plot", str(tmp_path / "chart.png")]
    assert main(["bench", *words]) == 2
    remedy = "pip install matplotlib"
    expected = f"reg-kernels bench: --plot needs matplotlib, not installed here: {remedy}\n"
    assert capsys.readouterr().err == expected


def test_the_extras_are_those_of_the_package():
    """And the base install is torch alone."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]

    def names(requirements: list[str]) -> list[str]:
        found = sorted(re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
        imported = {pip: name for name, pip in _extras._DISTRIBUTIONS.items()}
        return sorted(imported.get(name, name) for name in found)

    assert names(project["dependencies"]) == ["torch"]
    optional = project["optional-dependencies"]
    for extra, modules in _extras.EXTRAS.items():
        assert names(optional[extra]) == sorted(modules)
        assert set(modules) <= set(names(optional["dev"]))
