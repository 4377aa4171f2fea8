"""bench/gpu_report.py without a GPU: stages, limits, merging, rendering, on commands of our own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu_report as report
from reg_kernels.bench import _results

ROOT = Path(__file__).parents[2]
HANGS = 3000.0  # seconds after which a stage of these does not run slowly any more
FACTS = {
    "commit": {"hash": "a" * 40, "dirty": False},
    "date": "2026-01-01T00:00:00+00:00",
    "device": {"type": "cuda", "name": "Made-up GPU", "driver": "1.2"},
    "versions": {"torch": "2.11.0", "triton": None},
}
ROW = {"calls_per_sample": 1, "seconds": [1e-3, 1e-3], "quartiles": [1e-3, 1e-3]}  # dropped
BENCH = {
    **FACTS,
    "schema": _results.SCHEMA,
    "threads": 2,
    "allocator": None,
    "left_out": [{"label": "dropout forward float32 1 GiB", "reason": "the time was up"}],
    "benchmarks": [
        {
            "label": "dropout forward float32 64 MiB",
            "op": "dropout",
            "dtype": "float32",
            "shape": [2**24],
            "host": False,
            "tensors": 0,
            "bytes": 2**27,
            "contenders": [
                {"name": "copy", "median": 1e-3, "bytes_per_second": 4e12, **ROW},
                {
                    "name": "native",
                    "median": 1e-3,
                    "speed_over": {"copy": [0.9, 0.95, 1.0], "eager": [1.4, 1.5, 1.6]},
                    "kept_bytes": 16,
                    "peak_bytes": 48,
                    "goals": [
                        {"text": "ahead of all", "figure": "x", "limit": 1, "value": 2, "met": True}
                    ],
                    **ROW,
                },
                {"name": "triton", "skipped": "not installed"},
                {"name": "eager", "median": 1.5e-3, "peak_bytes": 2**26, **ROW},
            ],
        }
    ],
}


@pytest.fixture(autouse=True)
def any_time_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LEAST", 0.01)


def python(name: str, code: str, group: str = "group", **fields: Any) -> Any:
    return report.Stage(name, group, (sys.executable, "-S", "-c", code), HANGS, **fields)


def outcome(folder: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((folder / "report.json").read_text())["stages"]
    return {row["name"]: row for row in rows}


def test_a_stage_that_fails_is_reported_and_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stages = [
        python("good", "print('all well')"),
        python("bad", "print('a reason'); raise SystemExit(3)"),
        python("known", "raise SystemExit(5)", reasons={5: "no test was selected"}),
        report.Stage("missing", "group", ("no-such-program",), HANGS),
        python("last", "print('here')"),
    ]
    folder = tmp_path / "results" / "gpu"
    assert report.make_report(folder, FACTS, stages) == 1
    rows = outcome(folder)
    assert {name: (r["status"], r["reason"]) for name, r in rows.items()} == {
        "good": ("ok", ""),
        "bad": ("failed", "exit code 3"),
        "known": ("failed", "no test was selected"),
        "missing": ("not available", "no-such-program was not found"),
        "last": ("ok", ""),
    }
    assert rows["bad"]["tail"] == "a reason"
    page = (folder / "report.md").read_text()
    assert "| group | bad | failed |" in page and "a reason" in page
    assert page[-100:] in capsys.readouterr().out


def test_success_and_missing_tools_exit_0(tmp_path: Path):
    stages = [
        python("good", ""),
        report.Stage("missing", "group", ("no-such-program",), HANGS),
    ]
    assert report.make_report(tmp_path, FACTS, stages) == 0


def test_a_stage_is_stopped_at_its_limit_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pid = tmp_path / "pid"
    code = (
        "import os, subprocess, sys, time; print('begun', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(3600)'])\n"
        f"open({str(pid)!r} + '.new', 'w').write(str(child.pid))\n"
        f"os.replace({str(pid)!r} + '.new', {str(pid)!r}); time.sleep(3600)"
    )

    class Process(subprocess.Popen):
        """Its time is up as soon as all has begun, however long that takes here."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            assert timeout == 3.0
            while not pid.exists():
                assert self.poll() is None
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(report.subprocess, "Popen", Process)
    row = report.run_stage(python("slow", code), 3.0)
    assert (row["status"], row["reason"]) == ("timed out", "stopped after 3 s")
    assert row["tail"] == "begun"
    deadline = time.monotonic() + HANGS
    while _alive(int(pid.read_text())):
        assert time.monotonic() < deadline, "the grandchild runs on"
        time.sleep(0.01)


def test_a_stage_that_outlives_its_limit_is_stopped_by_the_clock():
    row = report.run_stage(python("slow", "import time; time.sleep(3600)"), 0.5)
    assert (row["status"], row["reason"]) == ("timed out", "stopped after 0 s")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_the_budget_has_not_room_for_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "LEAST", 1.0)
    stages = [python("one", ""), python("two", "")]
    assert report.make_report(tmp_path, FACTS, stages, budget=0.5) == 0
    assert {r["status"] for r in outcome(tmp_path).values()} == {"skipped"}


def test_time_is_kept_for_a_stage_that_was_promised_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: 0.0))
    stages = [
        python("long", "import time; time.sleep(3600)"),
        python("promised", "import sys; print(sys.argv)", promised=HANGS),
    ]
    assert report.make_report(tmp_path, FACTS, stages, budget=HANGS + 1) == 1
    rows = outcome(tmp_path)
    assert rows["long"]["status"] == "timed out" and rows["promised"]["status"] == "ok"


def test_a_command_learns_what_it_may_take():
    stage = python("x", "import sys; print(sys.argv[1])")
    stage = report.Stage("x", "group", (*stage.command, "{seconds}"), HANGS)
    assert report.run_stage(stage, HANGS)["tail"] == f"{0.75 * HANGS:.0f}"


def test_the_report_is_there_after_every_stage(tmp_path: Path):
    path = tmp_path / "report.json"
    code = f"import json; print(len(json.load(open({str(path)!r}))['stages']))"
    stages = [python(name, code) for name in ("a", "b", "c")]
    assert report.make_report(tmp_path, FACTS, stages) == 0
    assert [row["tail"] for row in outcome(tmp_path).values()] == ["0", "1", "2"]


def test_interruption_keeps_what_was_done(tmp_path: Path):
    """In a process of its own: an interrupt is meant for the whole of it."""
    code = f"""
import signal, sys
from pathlib import Path
from bench import gpu_report as report
from reg_kernels.bench import _results
signal.signal(signal.SIGINT, signal.default_int_handler)
report.LEAST = 0.01
interrupt = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(3600)"
stages = [
    report.Stage(name, "group", (sys.executable, "-S", "-c", text), {HANGS})
    for name, text in (("done", ""), ("stopped", interrupt), ("never", ""))
]
raise SystemExit(report.make_report(Path({str(tmp_path)!r}), {FACTS!r}, stages))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 130
    assert {n: r["status"] for n, r in outcome(tmp_path).items()} == {
        "done": "ok",
        "stopped": "interrupted",
    }


def test_only_reruns_a_part_of_the_same_commit(tmp_path: Path):
    counted = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    stages = [
        python("first", counted, group="one"),
        python("second", "raise SystemExit(1)", group="two"),
        python("third", counted, group="two"),
    ]
    assert report.make_report(tmp_path, FACTS, stages) == 1
    stages[1] = python("second", "", group="two")
    assert report.make_report(tmp_path, FACTS, stages, "second") == 0
    rows = outcome(tmp_path)
    assert list(rows) == ["first", "second", "third"]
    assert {r["status"] for r in rows.values()} == {"ok"}
    assert (tmp_path / "count").read_text() == "xx"
    assert report.make_report(tmp_path, FACTS, stages, "one,third") == 0
    assert (tmp_path / "count").read_text() == "xxxx"
    # Another commit's outcomes are none of this one.
    other = FACTS | {"commit": {"hash": "b" * 40, "dirty": False}}
    assert report.make_report(tmp_path, other, stages, "second") == 0
    assert list(outcome(tmp_path)) == ["second"]


def test_only_refuses_what_it_does_not_know(tmp_path: Path):
    stages = [python("first", "", group="one")]
    with pytest.raises(ValueError, match=r"--only must name stages of one \(first\), got 'frist'"):
        report.make_report(tmp_path / "new", FACTS, stages, "first,frist")
    assert not (tmp_path / "new").exists()


def test_a_damaged_report_is_replaced(tmp_path: Path):
    (tmp_path / "report.json").write_text("{")
    assert report.make_report(tmp_path, FACTS, [python("a", "")], "a") == 0
    assert list(outcome(tmp_path)) == ["a"]


def test_results_are_embedded_and_rendered(tmp_path: Path):
    made, wanted = tmp_path / "made.json", tmp_path / "bench.json"
    made.write_text(json.dumps(BENCH))
    copy = f"open({str(wanted)!r}, 'w').write(open({str(made)!r}).read())"
    stages = [
        python("bench", copy, "benchmarks", result="bench.json"),
        python("broken", "", result="made.json"),  # there, but none of this stage's
    ]
    assert report.make_report(tmp_path, FACTS, stages) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["results"] == {"bench": _results.condensed(BENCH, data)}
    assert "seconds" not in json.dumps(data["results"])
    page = (tmp_path / "report.md").read_text()
    assert "\n# Made-up GPU\n" in page
    assert "- commit: aaaaaaaaaaaa\n" in page and "- driver: 1.2\n" in page
    assert "- copy bandwidth, float32 64 MiB: 0.134 TB/s read and written\n" in page
    row = "1 ms | 0.95 | 1.5 ms, 1.5× (1.4–1.6) |  | 16 B | 48 B (64 MiB) | met |"
    assert f"| dropout forward float32 64 MiB | native | {row}" in page
    assert "| dropout forward float32 64 MiB | ahead of all | 2 met |" in page
    assert "- triton was not measured: not installed" in page
    assert "- left out: dropout forward float32 1 GiB: the time was up" in page


def test_a_result_that_is_no_json_fails_its_stage(tmp_path: Path):
    code = f"open({str(tmp_path / 'bench.json')!r}, 'w').write('half')"
    stages = [python("bench", code, result="bench.json"), python("next", "")]
    assert report.make_report(tmp_path, FACTS, stages) == 1
    rows = outcome(tmp_path)
    assert rows["bench"]["reason"] == "bench.json is no JSON" and rows["next"]["status"] == "ok"


def test_reports_do_not_name_the_places_of_this_machine():
    row = report.run_stage(python("x", f"print({sys.executable!r}, {str(ROOT)!r})"), HANGS)
    assert row["tail"] == "python ."
    assert sys.executable not in row["command"]


def test_the_stages_are_those_that_are_promised(tmp_path: Path):
    stages = report.stages(tmp_path)
    groups = list(dict.fromkeys(stage.group for stage in stages))
    assert groups == ["environment", "build", "suite", "sanitizer", "benchmarks"]
    by_name = {stage.name: stage for stage in stages}
    assert by_name["compile"].environment["REG_KERNELS_CUDA_ARCH"] == "native"
    assert {"memcheck", "racecheck", "initcheck"} <= set(by_name)
    assert all(by_name[t].limit <= 60 for t in ("memcheck", "racecheck", "initcheck"))
    # Whatever the others take, the benchmarks get a share worth having.
    assert by_name["bench"].promised >= 100
    for stage in stages:
        assert stage.limit <= report.BUDGET - report.RESERVE
        assert stage.result is None or str(tmp_path / stage.result) in stage.command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("sees no GPU here\n")
    assert list(tmp_path.iterdir()) == []
