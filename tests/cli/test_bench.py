"""The `bench` command and what it is made of: arithmetic, checks, files, errors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import readme_table as table
from bench import report
from reg_kernels import backends, bench, ops
from reg_kernels.bench import (
    _clock,
    _elementwise,
    _environment,
    _isas,
    _measure,
    _memory,
    _report,
    _results,
    _run,
    dropout,
)
from reg_kernels.cli import bench as command
from reg_kernels.cli import main

from support import run_program

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NATIVE = backends.why_not("native", "cpu", torch.float32) is None
TINY = bench.Budget(seconds=0.0, least=3, most=3, sample=0.0)
P = dropout.P


def case(*contenders: bench.Contender | bench.Skipped, **fields: Any) -> bench.Benchmark:
    """A benchmark of 256 floats with these contenders beside the copy."""
    described = {"op": "toy", "direction": "forward", "dtype": torch.float32, "shape": (256,)}
    described |= {"bytes": 2048, "requires_grad": False}
    return bench.Benchmark(**(described | fields), prepare=lambda device, pool: list(contenders))


def contender(name: str, call: Callable[[int], object], **fields: Any) -> bench.Contender:
    return bench.Contender(name, call, fields.pop("check", lambda: None), **fields)


def measured(subject: bench.Benchmark, budget: bench.Budget = TINY) -> dict[str, dict[str, Any]]:
    result = bench.measure(subject, CPU, budget)
    return {row["name"]: row for row in result["contenders"]}


# The measuring engine


def test_figures_are_medians_over_rounds_of_ratios_within_a_round():
    # The second round is slow for both, which a ratio of medians would not see through.
    samples = {
        "copy": [1.0, 8.0, 2.0],
        "native": [2.0, 16.0, 8.0],
        "eager": [8.0, 80.0, 16.0],
    }
    row = _measure.figures(samples["native"], samples, 1000)
    assert row["median"] == 8.0
    assert row["quartiles"] == [5.0, 12.0]
    assert row["fastest"] == 2.0
    assert row["bytes_per_second"] == 125.0
    assert row["time_over_copy"] == 2.0
    assert row["share_of_copy"] == 0.5
    assert row["time_over_eager"] == 0.25
    assert row["speedup_over_eager"] == 4.0
    assert not any("compile" in key for key in row)


def test_figures_set_a_contender_against_its_cases_peers():
    samples = {"native": [2.0, 2.0], "fused": [4.0, 4.0], "other": [1.0, 1.0]}
    row = _measure.figures(samples["native"], samples, 1000, ("fused", "absent"))
    assert (row["time_over_fused"], row["speedup_over_fused"]) == (0.5, 2.0)
    assert not any(name in key for key in row for name in ("other", "absent"))


def test_contenders_run_interleaved_and_nobody_always_first():
    log: list[str] = []
    names = ("a", "b", "c")
    ways = [contender(n, lambda i, n=n: log.append(n)) for n in names]
    budget = bench.Budget(seconds=0.0, least=6, most=6, sample=0.0)
    rows = measured(case(*ways), budget)
    assert all(len(rows[n]["seconds"]) == 6 for n in (*names, "copy"))
    # Two guesses each, then in each round two calls to lead in and a sample of one.
    rounds = [log[i : i + 9] for i in range(6, 6 + 54, 9)]
    assert all(sorted(part) == sorted(names * 3) for part in rounds)
    assert all(part[i] == part[i + 1] == part[i + 2] for part in rounds for i in (0, 3, 6))
    assert {part[0] for part in rounds} == set(names)


def test_each_call_gets_the_next_input():
    seen: list[int] = []
    measured(case(contender("a", seen.append)))
    assert len(set(seen)) == len(seen)


def test_short_calls_fill_a_sample():
    budget = bench.Budget(seconds=0.0, least=3, most=3, sample=1e-3)
    calls = []
    rows = measured(case(contender("a", calls.append)), budget)
    assert 1 < rows["a"]["calls_per_sample"] <= 2000
    assert len(calls) >= 3 * rows["a"]["calls_per_sample"]


def test_within_surrounds_every_call():
    inside = []

    class Within:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *error: object) -> None:
            inside.pop()

    def call(i: int) -> None:
        assert inside

    measured(case(contender("a", call, check=lambda: call(0), within=Within)))
    assert not inside


def test_a_contender_of_wrong_values_is_not_timed_and_the_others_are():
    def check() -> None:
        raise bench.WrongValues("toy: off by one")

    def crash() -> None:
        raise RuntimeError("no kernel\nand a traceback")

    rows = measured(
        case(
            contender("wrong", lambda i: None, check=check),
            contender("crashing", lambda i: None, check=crash),
            contender("optional", lambda i: None, check=crash, may_fail=True),
            bench.Skipped("absent", "not built"),
            contender("right", lambda i: None),
            goals=(bench.Goal("wrong", "fast", "time_over_copy", 1.0),),
        )
    )
    assert rows["wrong"]["wrong"] == "toy: off by one"
    assert rows["wrong"]["goals"][0]["met"] is None
    assert rows["crashing"]["wrong"] == "RuntimeError: no kernel"
    assert rows["optional"]["skipped"] == "RuntimeError: no kernel"
    assert rows["absent"]["skipped"] == "not built"
    assert "seconds" not in rows["wrong"] and len(rows["right"]["seconds"]) == 3


def test_the_copy_moves_the_bytes_of_the_case():
    (copy,) = bench.contenders(case(bytes=4096, dtype=torch.bfloat16), CPU)
    assert copy.call(0).nbytes == 2048


def test_kept_bytes_count_each_storage_once():
    x = torch.ones(256, requires_grad=True)
    rows = measured(
        case(contender("square", lambda i: x * x), requires_grad=True),
    )
    assert rows["square"]["kept_bytes"] == 1024


def test_the_peak_is_beyond_what_a_call_returns():
    x, into = torch.ones(256), torch.ones(256)
    rows = measured(
        case(
            contender("two steps", lambda i: x.mul(x).add(x)),
            contender("a pair", lambda i: (x.mul(x), x.add(x))),
            contender("in place", lambda i: into.copy_(x)),
        )
    )
    peaks = {name: row["peak_bytes"] for name, row in rows.items()}
    assert peaks == {"copy": 0, "two steps": 1024, "a pair": 0, "in place": 0}


def test_the_peak_on_a_gpu_is_that_of_its_allocator(monkeypatch: pytest.MonkeyPatch):
    allocated = iter((1000, 1000 + 1024))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + 1024 + 48)
    call = lambda i: torch.ones(256)  # noqa: E731
    assert _memory.peak_bytes(call, torch.device("cuda")) == 48


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(0.9, False, True), (1.1, False, False), (1.1, True, True)]
)
def test_goals(value: float, at_least: bool, met: bool):
    goal = bench.Goal("native", "text", "time_over_copy", 1.0, at_least)
    assert goal.result(value)["met"] is met
    assert goal.result(None)["met"] is None


def test_cuda_samples_are_timed_by_events(monkeypatch: pytest.MonkeyPatch):
    log: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, other: Event) -> float:
            return 6.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    assert _clock._event_seconds(log.append, 3, 7) == pytest.approx(2e-3)
    assert log == ["sleep", "record", 7, 8, 9, "record", "synchronize"]


@pytest.mark.parametrize(("size", "pool"), [(2**20, 200), (2**26, 4), (2**30, 1)])
def test_inputs_outgrow_the_l2_cache(size: int, pool: int, monkeypatch: pytest.MonkeyPatch):
    properties = argparse.Namespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    subject = case(shape=(size // 4,))
    assert _measure.pool_size(subject, torch.device("cuda")) == pool
    assert _measure.pool_size(subject, CPU) == 1


def test_every_op_has_benchmarks():
    """One of the random elementwise family may do without: its loops are those of dropout."""
    names = {m.name for m in pkgutil.iter_modules(ops.__path__) if not m.name.startswith("_")}
    headers = Path(__file__).parents[2] / "csrc" / "include" / "reg_kernels" / "elementwise"
    family = {path.stem for path in headers.glob("*.h")} - {"dropout"}
    assert family and names - family <= set(bench.modules()) <= names


def test_ops_take_turns_and_every_case_has_its_own_label():
    cases = bench.all_cases(bench.Scope(CPU, (torch.float32, torch.bfloat16)))
    first = [case.op for case in cases[: 2 * len(bench.modules())]]
    assert first == bench.modules() * 2
    assert len({case.label for case in cases}) == len(cases)


# Dropout's benchmarks


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["dropout", "dropout2d"])
def test_every_contender_computes_dropout(op: str, layout: str, dtype: torch.dtype):
    scope = bench.Scope(CPU, (dtype,), compiled=False)
    for direction in ("forward", "backward"):
        subject = dropout._case(op, direction, dtype, (32, 16, 4, 4), layout, scope)
        for entry in bench.contenders(subject, CPU):
            if isinstance(entry, bench.Contender):
                with entry.within():
                    entry.check()


def test_compiled_dropout_can_repeat_its_backward():
    scope = bench.Scope(CPU, (torch.float32,))
    subject = dropout._case("dropout", "backward", torch.float32, (512,), "contiguous", scope)
    rows = measured(subject)
    assert len(rows["compile"]["seconds"]) == 3, rows["compile"]


def test_the_cases_cover_what_is_promised():
    full = bench.Scope(CPU, backends.DTYPES, everything=True)
    default = bench.Scope(CPU, (torch.float32, torch.bfloat16))
    labels = [c.label for c in dropout.cases(default)]
    assert len(set(labels)) == len(labels)
    assert set(labels) < {c.label for c in dropout.cases(full)}
    goals = {c.label: [g.text for g in c.goals] for c in dropout.cases(default)}
    level = ["at most 1 of copy_'s time", "at most 0.85 of copy_'s time"]
    assert goals["dropout forward float32 64 MiB"] == [
        *level,
        "at least 50 times eager's speed",
        "keeps 16 bytes for backward",
    ]
    assert goals["dropout backward float32 64 MiB"] == level
    assert goals["dropout forward bfloat16 32 MiB"] == ["at most 1.5 of copy_'s time"]
    assert goals["dropout backward bfloat16 64 MiB"] == ["at most 1.3 of copy_'s time"]
    host = "dropout {} float32 16 elements{} host time"
    assert goals[host.format("forward", " no grad")] == ["at most 1.5 of nn.Dropout's time"]
    for direction in ("forward", "backward"):
        assert goals[host.format(direction, "")] == ["at most 1.3 of nn.Dropout's time"]
    assert all(c.goals == () for c in dropout.cases(default) if "1 MiB" in c.label)
    assert all(c.bytes == 2 * c.shape[0] * c.dtype.itemsize for c in dropout.cases(full)[:8])


def test_the_gpu_cases_fit_its_memory(monkeypatch: pytest.MonkeyPatch):
    properties = argparse.Namespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    scope = bench.Scope(torch.device("cuda"), (torch.float32, torch.bfloat16))
    cases = {c.label: [g.text for g in c.goals] for c in dropout.cases(scope)}
    assert not any("GiB" in label for label in cases)
    for dtype in ("float32", "bfloat16"):
        for size in ("64 MiB", "256 MiB"):
            assert cases[f"dropout backward {dtype} {size}"] == [
                "at least 0.92 of copy bandwidth",
                "ahead of eager",
                "ahead of torch.compile",
            ]
    assert cases["dropout forward float32 16 elements host time"] == ["at most 1.3 of eager's time"]


@pytest.fixture
def dropped() -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """An input, its dropout by eager PyTorch, and the scale of what was kept."""
    torch.manual_seed(0)
    x = torch.rand(64, 64, 8) + 1
    yield x, torch.nn.functional.dropout(x, P), 1 / (1 - P)


def test_check_accepts_the_right_values(dropped: Any):
    x, y, scale = dropped
    _elementwise.check_forward("eager", None, (x,), y, scale)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: y * 1.00001, "output is off by 1.0"),
        (lambda x, y: x, "0.0000% of 32768 were dropped"),
        (lambda x, y: y * torch.nn.functional.dropout(torch.ones_like(y), 0.05), "were dropped"),
        (lambda x, y: torch.where(y == y.max(), float("nan"), y), "off by nan"),
    ],
    ids=["scale", "identity", "too many", "nan"],
)
def test_check_finds_wrong_values(dropped: Any, spoil: Any, message: str):
    x, y, scale = dropped
    with pytest.raises(bench.WrongValues, match=message):
        _elementwise.check_forward("spoilt", None, (x,), spoil(x, y), scale)


@pytest.mark.parametrize("as_one", [1, 2])
def test_check_finds_what_is_dropped_in_part(dropped: Any, as_one: int):
    x, y, scale = dropped
    with pytest.raises(bench.WrongValues, match="dropped in part"):
        _elementwise.check_forward("spoilt", as_one, (x,), y, scale)


def test_check_finds_another_mask_in_the_gradient(dropped: Any):
    x, y, scale = dropped
    g = torch.rand_like(x) + 1
    gradient = g * (y != 0) * scale
    _elementwise.check_backward("eager", (x,), y, g, (gradient,), scale)
    with pytest.raises(bench.WrongValues, match="gradient is off by"):
        _elementwise.check_backward("spoilt", (x,), y, g, (gradient.roll(1),), scale)


def test_check_finds_a_residual_that_is_lost_or_scaled(dropped: Any):
    x, y, scale = dropped
    r, g = torch.rand_like(x) + 1, torch.rand_like(x) + 1
    gradient = g * (y != 0) * scale
    _elementwise.check_forward("eager", None, (x, r), r + y, scale)
    _elementwise.check_backward("eager", (x, r), r + y, g, (gradient, g), scale)
    for spoilt in (y, scale * r + y):
        with pytest.raises(bench.WrongValues):
            _elementwise.check_forward("spoilt", None, (x, r), spoilt, scale)
    with pytest.raises(bench.WrongValues, match="the residual's gradient"):
        _elementwise.check_backward("spoilt", (x, r), r + y, g, (gradient, gradient), scale)


@pytest.mark.skipif(not NATIVE, reason="the native code is not built")
def test_each_instruction_set_runs_and_is_put_back():
    from reg_kernels import _C

    before = _C.isa()
    case = dropout._case(
        "dropout", "forward", torch.float32, (64,), "contiguous", bench.Scope(CPU, ())
    )
    for isas in ((), _isas.here(), _isas.here()[::-1]):
        entries = bench.contenders(dataclasses.replace(case, isas=isas), CPU)
        ours = [entry for entry in entries if entry.name.startswith("native")]
        assert [entry.isa for entry in ours] == list(isas or _isas.here()[:1])
        first, *others = ours
        assert first.name == "native"
        assert [entry.name for entry in others] == [f"native[{entry.isa}]" for entry in others]
        for entry in ours:
            with entry.within():
                assert _C.isa() == entry.isa
            assert _C.isa() == before


# The command


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small benchmarks in place of all, in a process that counts as started again."""
    for name, value in _environment.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_run, "QUICK", TINY)

    def cases(scope: bench.Scope) -> list[bench.Benchmark]:
        goal = bench.Goal("native", "at least as fast as light", "share_of_copy", 1e9, True)
        make = dropout._case
        args = ("dropout", "forward", torch.float32)
        return [
            make(*args, (2048,), "contiguous", scope, goals=(goal,)),
            make(*args, (16,), "contiguous", scope, host=True),
        ]

    monkeypatch.setattr(bench, "all_cases", cases)


def run(*words: object) -> int:
    return main(["bench", "--device", "cpu", "--quick", *map(str, words)])


def test_json_holds_conditions_raw_times_and_figures(few: None, tmp_path: Path):
    threads = torch.get_num_threads()
    assert run("--json", tmp_path / "{device}" / "bench.json") == 0
    name = _environment.folder_name(_environment.facts_of(CPU))
    data = json.loads((tmp_path / name / "bench.json").read_text())
    assert data["schema"] == _results.SCHEMA
    assert data["device"]["type"] == "cpu" and data["device"]["name"]
    assert data["versions"]["torch"] == torch.__version__
    assert data["threads"] == threads
    assert data["allocator"] == _environment.ALLOCATOR
    assert (data["device"]["isa"] is not None) is NATIVE
    assert data["commit"] is None or len(data["commit"]["hash"]) == 40
    assert data["left_out"] == []
    first = data["benchmarks"][0]
    assert {k: first[k] for k in ("op", "direction", "dtype", "shape", "bytes")} == {
        "op": "dropout",
        "direction": "forward",
        "dtype": "float32",
        "shape": [2048],
        "bytes": 16384,
    }
    rows = {row["name"]: row for row in first["contenders"]}
    assert {"copy", "native", "triton", "reference", "eager", "compile"} <= set(rows)
    assert "left out" in rows["compile"]["skipped"]
    for row in rows.values():
        if "skipped" not in row:
            assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
            assert row["time_over_copy"] * row["share_of_copy"] == pytest.approx(1)
    if NATIVE:
        assert rows["native"]["kept_bytes"] == 16
        assert rows["native"]["goals"][0]["met"] is False
        assert rows["native"]["speedup_over_eager"] > 0


def test_json_has_a_line_for_each_dictionary_of_a_list():
    data = {"facts": {"a": 1.23456789}, "rows": [{"seconds": [1e-05, 2.5]}, {"names": ["é, ["]}]}
    text = _results.to_json(data)
    assert text.splitlines() == [
        *("{", ' "facts": {"a":1.234568},', ' "rows": ['),
        *('  {"seconds":[1e-05,2.5]},', '  {"names":["é, ["]}', " ]", "}"),
    ]
    assert json.loads(text) == {**data, "facts": {"a": 1.234568}}


def test_tables(few: None, capsys: pytest.CaptureFixture[str]):
    assert run() == 0
    out = capsys.readouterr().out
    assert "dropout forward float32 8 KiB" in out
    assert "dropout forward float32 16 elements" in out and "host time" in out
    assert "triton was not measured: " in out
    assert "MISSED" not in out
    table = [line for line in out.splitlines() if line[:1] in tuple("│┃┏└")]
    assert table and max(map(len, table)) <= 100


def test_details(few: None, capsys: pytest.CaptureFixture[str]):
    assert run("--details") == 0
    out = capsys.readouterr().out
    assert "dropout forward float32 16 elements host time" in out and "reference" in out
    if NATIVE:
        assert "at least as fast as light" in out and "MISSED" in out


@pytest.mark.skipif(not NATIVE, reason="the native code is not built")
def test_an_instruction_set_is_asked_for(
    few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    *_, last = here = _isas.here()
    assert run("--isa", last, "--json", tmp_path / "one.json") == 0
    assert f" threads, {last}, malloc" in (out := capsys.readouterr().out)
    assert "host time, " not in out
    data = json.loads((tmp_path / "one.json").read_text())
    assert data["options"]["isa"] == [last] and data["device"]["isa"] == here[0]
    found = [
        (row["name"], row["isa"], [goal["met"] for goal in row.get("goals", ())])
        for row in data["benchmarks"][0]["contenders"]
        if "isa" in row
    ]
    assert found == [("native", last, [False])]
    if len(here) > 1:
        assert run("--details", *(f"--isa={name}" for name in (last, here[0], last))) == 0
        assert f"native[{here[0]}]" in (out := capsys.readouterr().out)
        assert "at least as fast as light" in out and out.count("MISSED") >= 2
        assert run(*(f"--isa={name}" for name in (last, here[0]))) == 0
        assert here[0] in capsys.readouterr().out


@pytest.mark.skipif(NATIVE, reason="the native code is built")
def test_no_native_code_has_no_instruction_set(few: None, capsys: pytest.CaptureFixture[str]):
    assert run("--isa", "avx2") == 2
    assert "--isa: the native CPU code is not built" in capsys.readouterr().err


def test_wrong_values_are_an_error(
    few: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training: x * 1)
    assert run("--json", tmp_path / "bench.json") == 1
    captured = capsys.readouterr()
    assert "wrong values: dropout, eager: 0.0000% of 2048 were dropped" in captured.err
    assert "WRONG VALUES: dropout, eager" in captured.out
    first = json.loads((tmp_path / "bench.json").read_text())["benchmarks"][0]
    rows = {row["name"]: row for row in first["contenders"]}
    assert "seconds" not in rows["eager"]
    assert "seconds" in rows["reference"] and "time_over_eager" not in rows["reference"]


def test_plot(few: None, tmp_path: Path):
    assert run("--plot", tmp_path / "shares.png") == 0
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_time_limit_names_what_is_left_out(few: None, capsys: pytest.CaptureFixture[str]):
    assert run("--time-limit", 1e-9) == 0
    assert "left out: dropout forward float32 8 KiB: the time was up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "dropuot"], "--op must be one of dropout, got 'dropuot'"),
        pytest.param(
            ["--isa", "sse9"],
            "--isa must be one that was built (REG_KERNELS_ISA) and that this machine has, "
            f"{', '.join(_isas.here())}, got 'sse9'",
            marks=pytest.mark.skipif(not NATIVE, reason="the native code is not built"),
        ),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--time-limit", "0"], "--time-limit must be above 0, got 0.0"),
        (["--time-limit", "nan"], "--time-limit must be above 0, got nan"),
        (["--json", "{tmp}"], "--json: must be a file, got the directory {tmp}"),
        (["--json", "{tmp}/file/b.json"], "--json: cannot write {tmp}/file/b.json: "),
        (["--plot", "{tmp}/a.doc"], "--plot: must end in .png, .svg, .pdf, got a.doc"),
    ],
)
def test_bad_input(
    words: list[str],
    message: str,
    few: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "file").write_text("in the way")
    assert run(*(w.replace("{tmp}", str(tmp_path)) for w in words)) == 2
    captured = capsys.readouterr()
    assert message.replace("{tmp}", str(tmp_path)) in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_interruption_writes_nothing(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "measure", interrupted)
    assert run("--json", tmp_path / "bench.json") == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not _environment.has_glibc(), reason="malloc's settings are glibc's")
def test_starts_again_with_a_warm_allocator(
    few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Started(Exception):
        pass

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        assert environment.items() >= _environment.ALLOCATOR.items()
        raise Started(words)

    monkeypatch.delenv("MALLOC_TOP_PAD_")
    monkeypatch.setattr(_run.os, "execve", execve)
    with pytest.raises(Started) as started:
        words = ["--op", "dropout", "--dtype", "float16", "--dtype", "float64"]
        run(*words, *(f"--isa={name}" for name in _isas.here()), "--json", "a b.json")
    assert "MALLOC_TOP_PAD_=" in capsys.readouterr().out
    assert started.value.args[0][:4] == [sys.executable, "-m", "reg_kernels", "bench"]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(started.value.args[0][4:])
    assert (args.op, args.dtype, args.quick) == (["dropout"], ["float16", "float64"], True)
    assert args.isa == (list(_isas.here()) or None)
    assert (args.device, args.json, args.all) == ("cpu", Path("a b.json"), False)


EPYC = {"name": "AMD EPYC", "family": "25", "model": "1", "isa": "avx2"}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"name": "NVIDIA H200", "driver": "1.2"}, "nvidia-h200"),
        ({"name": "AMD EPYC 9R14 (x)"}, "amd-epyc-9r14-x"),
        (EPYC, "amd-epyc-family-25-model-1-avx2"),
        ({**EPYC, "family": None, "model": None}, "amd-epyc-avx2"),
        ({**EPYC, "isa": None}, "amd-epyc-family-25-model-1"),
        ({"name": "!"}, "unknown"),
    ],
)
def test_a_folder_is_named_by_what_tells_devices_apart(facts: dict[str, Any], expected: str):
    assert _environment.folder_name(facts) == expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n",
            ("AMD EPYC", "26", "2"),
        ),
        (
            "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n",
            (None, "0x41", "0xd4f"),
        ),
        ("", (None, None, None)),
    ],
)
def test_the_processor_as_the_system_tells_it(cpuinfo: str, expected: tuple[str | None, ...]):
    found = _environment._processor(cpuinfo)
    assert found["name"]  # of the machine's kind where the system tells no other
    assert expected[0] in (None, found["name"])
    assert (found["family"], found["model"]) == expected[1:]


def test_commit_may_be_named_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_environment, "_ROOT", tmp_path)
    monkeypatch.delenv(_environment.COMMIT, raising=False)
    assert _environment.commit() is None
    monkeypatch.setenv(_environment.COMMIT, "abc")
    assert _environment.commit() == {"hash": "abc", "dirty": None}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 µs"), (3e-9, "0.003 µs")],
)
def test_format_seconds(seconds: float, text: str):
    assert _report.format_seconds(seconds) == text


def test_markdown_escapes_cells():
    assert _report.Table("", ("a", "b"), [("x|y", "z")]).markdown().splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y | z |",
    ]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_do_not_make_their_commit_look_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ("git", "-C", str(tmp_path), *identity, *words)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "source").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(_environment, "_ROOT", tmp_path.resolve())
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "bench.json").write_text("{}")
    assert _environment.commit() == {"hash": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "source").write_text("2")
    assert _environment.commit()["dirty"] is True


# The README's table and pytest-benchmark


@pytest.fixture
def pages(tmp_path: Path) -> Callable[..., int]:
    """`readme_table` in a repository of two pages."""
    (tmp_path / "docs").mkdir()
    for name in table.PAGES:
        (tmp_path / name).write_text(f"# Title\n\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    return lambda *words: table.main(["--root", str(tmp_path), *words])


def test_the_pages_get_the_results(
    few: None, pages: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run("--json", tmp_path / "figures.json") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    monkeypatch.setattr(report, "CHARTS", {})
    for name, date in (("one", "2026-01-02"), ("two", "2026-01-01")):
        device = {"type": "cpu", "name": name, "isa": "avx2"}
        folder = tmp_path / "bench" / "results" / name
        report.write(folder, report.report_of(figures | {"device": device, "date": date}))
    assert pages("--check") == 1
    assert "old" in (tmp_path / "README.md").read_text()
    assert pages() == 0
    readme, figures = ((tmp_path / name).read_text() for name in table.PAGES)
    for text in (readme, figures):
        assert text.startswith("# Title\n") and text.endswith(f"{table.END}\nafter\n")
        assert "do not edit" in text and "old" not in text
    # The README has what was measured last, a row an op; the other page has all.
    assert "\none, " in readme and "two" not in readme and "| dropout forward, 8 KiB |" in readme
    assert "## one" in figures and "## two" in figures
    assert "(../bench/results/one/report.md)" in figures
    if NATIVE:
        assert "| dropout forward float32 8 KiB | native |" in figures
        goals = (tmp_path / "bench/results/one/report.md").read_text()
        assert "at least as fast as light" in goals and "at least" not in figures
    assert "| reference |" not in figures
    assert pages("--check") == 0


def test_the_pages_show_the_charts_by_their_own_way_to_them(tmp_path: Path):
    folder = tmp_path / "bench" / "results" / "one"
    assert table._link(tmp_path / "README.md", folder) == "bench/results/one"
    assert table._link(tmp_path / "docs" / "figures.md", folder) == "../bench/results/one"


@pytest.mark.parametrize("text", ["", "{end}{begin}", "{begin}", "{begin}{end}{begin}{end}"])
def test_a_page_without_its_markers(
    text: str,
    pages: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    page = tmp_path / "docs" / "figures.md"
    page.write_text(text.format(begin=table.BEGIN, end=table.END))
    assert pages() == 2
    assert "figures.md must hold" in capsys.readouterr().err
    assert "old" in (tmp_path / "README.md").read_text()


def test_pytest_benchmark_runs_the_same_cases(tmp_path: Path):
    pytest.importorskip("pytest_benchmark")
    done = run_program(
        [
            *(sys.executable, "-m", "pytest", "bench/bench_all.py", "--benchmark-only", "-q"),
            *("-p", "no:cacheprovider", "-k", "dropout and 16-elements-no-grad and eager"),
            f"--benchmark-json={tmp_path / 'result.json'}",
        ],
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (only,) = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    assert only["group"] == "dropout forward float32 16 elements no grad host time"
    assert only["extra_info"]["bytes"] == 128


@pytest.mark.skipif(not NATIVE, reason="the native code is not built")
@pytest.mark.parametrize("forced", [None, "reference"])
def test_what_is_forced_does_not_change_who_is_measured(
    forced: str | None, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    real = dropout.fused.dropout

    def spy(*args: Any, backend: str | None) -> torch.Tensor:
        asked.append(backend)
        return real(*args, backend=backend)

    monkeypatch.setattr(dropout.fused, "dropout", spy)
    scope = bench.Scope(CPU, (torch.float32,), compiled=False)
    with backends.backend(forced):
        subject = dropout._case("dropout", "forward", torch.float32, (512,), "contiguous", scope)
        names = {entry.name for entry in bench.contenders(subject, CPU)}
        next(e for e in bench.contenders(subject, CPU) if e.name == "native").call(0)
    assert asked == [None if forced is None else "native"]
    assert {"native", "triton", "reference", "eager"} <= names
