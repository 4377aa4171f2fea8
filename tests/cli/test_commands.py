"""The command line as a user meets it: help, info, check."""

import json
import subprocess
import sys

import pytest
import torch

from reg_kernels import __version__, backends, cases
from reg_kernels.cli import COMMANDS, check, main

from support import run_program


def test_help_on_everything(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "usage: reg-kernels" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["check", "--backend", "gpu"], ["info", "-x"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("reg-kernels")
    assert "--help" in error
    assert len(error.splitlines()) == 1


def test_a_wrong_option_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["info", "-x"])
    expected = "reg-kernels info: unrecognized arguments: -x; see reg-kernels info --help\n"
    assert capsys.readouterr().err == expected


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"reg-kernels {__version__}\n"


def test_an_output_that_nobody_reads_is_no_traceback():
    command = [sys.executable, "-m", "reg_kernels", "info"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.communicate(timeout=120)[1] == ""
    assert run.returncode == 141


def test_another_pipe_that_breaks_is_said():
    code = (
        "from reg_kernels.cli import info, main\n"
        "def run(args): raise BrokenPipeError('theirs')\n"
        "info.run = run\n"
        "main(['info'])"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 1
    assert "BrokenPipeError: theirs" in done.stderr


def test_as_a_module():
    result = run_program([sys.executable, "-m", "reg_kernels", "info"])
    assert result.returncode == 0, result.stderr
    for word in ("torch", torch.__version__, "dropout", "native", "triton", "reference"):
        assert word in result.stdout


def test_info_says_why_not_and_says_it_once(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count(f"{backends.choose('info', 'cpu', torch.float32)} used") == 1
    why = backends.why_not("triton", "cpu", torch.float32)
    assert text.count(f"triton no: {why}") == 1
    if torch.version.cuda is None:
        assert "CUDA C++: missing: this torch is a CPU build" in text


def test_check_passes_and_writes_json(tmp_path, capsys):
    path = tmp_path / "check.json"
    arguments = ["check", "--device", "cpu", "--op", "dropout", "--backend", "reference"]
    assert main([*arguments, "--json", str(path)]) == 0
    assert "4 passed, 0 failed" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert {r["dtype"] for r in results} == {"float64", "float32", "float16", "bfloat16"}
    for result in results:
        assert result["ok"]
        assert result["error"] <= result["allowed"]
        assert result["cases"] > 10
        assert result["gradcheck"] is (True if result["dtype"] == "float64" else None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: y * 1.01,  # outside the allowance
        lambda y: y + float("nan"),
        lambda y: y + 0.5,
    ],
)
def test_check_finds_a_wrong_result(wrong, monkeypatch, capsys):
    good = next(c for c in cases.all_cases() if c.name == "1024 contiguous")
    bad = cases.Case(
        good.op,
        good.name,
        good.inputs,
        lambda x, backend=None: wrong(good.function(x, backend=backend)),
        good.oracle,
    )
    monkeypatch.setattr(check, "all_cases", lambda: [bad])
    assert main(["check", "--device", "cpu", "--backend", "reference"]) == 1
    assert "0 passed, 4 failed" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_check_finds_a_wrong_gradient(monkeypatch, factor):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    good = next(c for c in cases.all_cases() if c.name == "1024 contiguous")
    bad = cases.Case(
        good.op,
        good.name,
        good.inputs,
        lambda x, backend=None: Wrong.apply(good.function(x, backend=backend)),
        good.oracle,
    )
    monkeypatch.setattr(check, "all_cases", lambda: [bad])
    assert main(["check", "--device", "cpu", "--backend", "reference"]) == 1


def test_a_crash_is_a_failed_check(monkeypatch, capsys):
    def crash(*tensors, backend=None):
        raise RuntimeError("kernel went away")

    good = cases.all_cases()[0]
    bad = cases.Case(good.op, good.name, good.inputs, crash, good.oracle)
    monkeypatch.setattr(check, "all_cases", lambda: [bad])
    assert main(["check", "--device", "cpu", "--backend", "reference"]) == 1
    assert "kernel went" in capsys.readouterr().out


def test_an_op_that_works_in_place_is_named_without_its_underscore(capsys):
    arguments = ["check", "--device", "cpu", "--backend", "reference"]
    assert main([*arguments, "--op", "optimizer_step"]) == 0
    assert "optimizer_step_" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert ", optimizer_step, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "conv"], "--op must be one of adversarial_step_, augment, "),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:9"], "--device cuda:9: torch sees"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--json", "/dev/null/x.json"], "--json: cannot write /dev/null/x.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["check", "--backend", "reference", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reg-kernels check: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_bad_environment_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_forced", "fast")
    assert main(["info"]) == 2
    expected = "REG_KERNELS_BACKEND must be one of native, triton, reference, got 'fast'"
    assert capsys.readouterr().err == f"reg-kernels info: {expected}\n"


def test_check_takes_what_the_environment_forces(monkeypatch, capsys):
    arguments = ["check", "--device", "cpu", "--op", "dropout"]
    with backends.backend("reference"):
        assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "\n4 passed, 0 failed" in said
    assert "not checked" not in said
    # The interpreter of Triton runs where the tests do: it is said to be missing.
    monkeypatch.setattr(backends, "why_not", lambda *_: "it is not there")
    with backends.backend("triton"):
        assert main(arguments) == 2
    said = capsys.readouterr()
    blamed = "reg-kernels check: REG_KERNELS_BACKEND=triton"
    assert said.err == f"{blamed} cannot run on cpu: it is not there\n"
    assert said.out == ""


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check", stop)
    assert main(["check", "--device", "cpu", "--backend", "reference"]) == 130
    assert capsys.readouterr().err.endswith("reg-kernels check: interrupted\n")
