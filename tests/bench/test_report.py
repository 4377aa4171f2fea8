"""bench/report.py, the charts, bench/compare.py and what the README shows of a report."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import compare as comparing
from bench import readme_table, report

ROOT = Path(__file__).parents[2]


def case(label: str, seconds: dict[str, list[float]], **fields: Any) -> dict[str, Any]:
    """A benchmark with these seconds, by contender."""
    from reg_kernels.bench import _measure

    rows = []
    for name, own in seconds.items():
        found = _measure.figures(own, seconds, 2**21, fields.get("peers", ()))
        rows.append({"name": name, "peak_bytes": 2**20, **found})
    described = {"label": label, "op": label.split()[0], "dtype": "float32", "shape": [2**18]}
    described |= {"host": False, "tensors": 0, "bytes": 2**21, "items": 0, "series": ""}
    return {**described, **fields, "contenders": rows}


@pytest.fixture
def figures() -> dict[str, Any]:
    """What a measurement returns, of a kernel, a network and a curve."""
    goal = {"text": "twice", "figure": "f", "limit": 2, "at_least": True, "value": 1.5}
    kernel = case(
        "dropout forward",
        {"copy": [1e-3] * 4, "native": [1e-3, 2e-3, 1e-3, 1e-3], "eager": [3e-3] * 4},
    )
    kernel["contenders"][1]["goals"] = [{**goal, "met": False}]
    ladder = [
        case(
            f"dropout {size}",
            {"native": [1e-9 * size] * 3, "eager": [2e-9 * size] * 3},
            series="dropout by size",
            shape=[size],
        )
        for size in (1024, 4096)
    ]
    network = case(
        "model resnet18",
        {"native": [0.5] * 3, "eager": [1.0] * 3},
        items=16,
        unit="images",
        bytes=None,
    )
    for row in network["contenders"]:
        row["items_per_second"] = 16 / row["median"]
    return {
        "schema": 2,
        "commit": {"hash": "a" * 40, "dirty": False},
        "date": "2026-01-01T00:00:00+00:00",
        "device": {"type": "cpu", "name": "Made-up CPU", "driver": None},
        "versions": {"torch": "2.13.0", "triton": None},
        "threads": 2,
        "allocator": None,
        "isa": "avx2",
        "options": {},
        "benchmarks": [kernel, network, *ladder],
        "left_out": [],
    }


def test_a_report_has_figures_tables_and_charts(figures: Any, tmp_path: Path):
    report.write(tmp_path, report.report_of(figures))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["report.json", "report.md", *report.CHARTS]
    )
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Made-up CPU\n\n- commit: aaaaaaaaaaaa\n- date: 2026-01-01")
    assert "- copy bandwidth, float32 1 MiB: 0.002 TB/s read and written\n" in page
    assert "| dropout forward | native | 1 ms (1–1.25 ms) | 1.00 | 3 ms (3×) |" in page
    row = "500 ms (500–500 ms) | 32 images | 16 images (2×) | 1 MiB (1 MiB) |"
    assert f"| model resnet18 | native | {row}" in page
    assert "| dropout by size | 4096 | 4.1 µs |  | 8.19 µs (2×) |" in page
    assert "| dropout forward | native: twice | 1.5 | MISSED |" in page
    # A network is in its own table alone, and so is a curve.
    assert page.count("| model resnet18 ") == 1 and page.count("| dropout 4096 ") == 0


def test_what_computed_something_else_is_no_end(figures: Any, tmp_path: Path):
    """A wrong copy leaves no share, and a wrong network no rate: the report says so."""
    kernel, network = figures["benchmarks"][:2]
    kernel["contenders"][0] = {"name": "copy", "wrong": "out of memory"}
    del kernel["contenders"][1]["share_of_copy"]
    network["contenders"][0] = {"name": "native", "wrong": "another loss"}
    report.write(tmp_path, report.report_of(figures))
    page = (tmp_path / "report.md").read_text()
    assert "| dropout forward | native | 1 ms (1–1.25 ms) |  | 3 ms (3×) |" in page
    assert "| model resnet18 | native | WRONG VALUES |" in page
    assert "- WRONG VALUES: another loss (1 benchmarks)" in page


def test_small_calls_on_a_gpu_have_their_parts(figures: Any, tmp_path: Path):
    small = figures["benchmarks"][0]
    small["contenders"][1] |= {"host_median": 2e-6, "graph_median": 3e-6}
    small["contenders"][2] |= {"host_median": 4e-6, "graph_note": "it waits"}
    report.write(tmp_path, report.report_of(figures))
    page = (tmp_path / "report.md").read_text()
    assert "| dropout forward | native | 2 µs | 1 ms | 3 µs |" in page
    assert "| dropout forward | eager | 4 µs | 3 ms | it waits |" in page
    small["wall"] = True  # what the host and the GPU take is nobody's time alone
    report.write(tmp_path, report.report_of(figures))
    assert "| dropout forward | native | 2 µs |  | 3 µs |" in (tmp_path / "report.md").read_text()


def test_charts_name_what_they_are_of_and_repeat_themselves(figures: Any, tmp_path: Path):
    for folder in ("one", "two"):
        report.write(tmp_path / folder, report.report_of(figures))
    for name in report.CHARTS:
        text = (tmp_path / "one" / name).read_text()
        assert "Made-up CPU" in text and "commit aaaaaaaaaaaa" in text and "torch 2.13.0" in text
        assert text == (tmp_path / "two" / name).read_text()
    for name, label in (("shares.svg", "dropout forward"), ("growth.svg", "dropout by size")):
        assert label in (tmp_path / "one" / name).read_text()
    assert "model resnet18" in (tmp_path / "one" / "speedups.svg").read_text()


def test_without_matplotlib_there_are_no_charts(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    report.write(tmp_path, report.report_of(figures))
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.write(tmp_path, report.report_of(figures))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert ".svg" not in (tmp_path / "report.md").read_text()


def test_charts_of_nothing(figures: Any, tmp_path: Path):
    report.write(tmp_path, report.report_of({**figures, "benchmarks": []}))
    assert (tmp_path / "growth.svg").exists()


def test_a_report_can_be_made_again_from_its_file(figures: Any, tmp_path: Path):
    figures["benchmarks"][0]["contenders"][0]["median"] = 1 / 3
    report.write(tmp_path / "one", report.report_of(figures))
    report.write(tmp_path / "two", report.read(tmp_path / "one" / "report.json"))
    for path in (tmp_path / "one").iterdir():
        assert path.read_text() == (tmp_path / "two" / path.name).read_text(), path.name


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[]", "got schema None"), ('{"schema": 1}', "schema 2, got schema 1")],
)
def test_what_is_no_report_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        report.read(tmp_path / "report.json")
    assert str(tmp_path / "report.json") in str(error.value)


def test_the_committed_reports_are_what_their_figures_give(tmp_path: Path):
    for path in report.RESULTS.glob("*/report.json"):
        data = report.read(path)
        assert (path.parent / "report.md").read_text() == report.render(data), path
        assert data["commit"] and data["commit"]["hash"]


def test_the_readme_holds_the_committed_results():
    assert readme_table.main(["--check"]) == 0, "run `python -m bench.readme_table`"


# Comparing two reports


@pytest.fixture
def compare_files(tmp_path: Path) -> Any:
    def run(old: dict[str, Any], new: dict[str, Any], *words: str) -> int:
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, data in zip(paths, (old, new), strict=True):
            path.write_text(json.dumps(report.report_of(data)))
        return comparing.main([*map(str, paths), *words])

    return run


def slower(figures: dict[str, Any], factor: float, *names: str) -> dict[str, Any]:
    """`figures` with these contenders of the first benchmark slower by a factor."""
    changed = copy.deepcopy(figures)
    for row in changed["benchmarks"][0]["contenders"]:
        if row["name"] in names:
            row["seconds"] = [factor * seconds for seconds in row["seconds"]]
    return changed


def test_equal_reports_are_not_worse(
    compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    assert compare_files(figures, figures) == 0
    assert capsys.readouterr().out == "0 worse, 0 better\n"


def test_what_got_worse_is_named(
    compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    assert compare_files(figures, slower(figures, 2.0, "native")) == 1
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "native" in line]
    assert len(rows) == 2 and all("dropout forward" in rows[0] and "-50%" in row for row in rows)
    assert "2 worse, 0 better" in out


def test_what_got_better_is_no_failure(
    compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    assert compare_files(figures, slower(figures, 0.5, "native")) == 0
    assert "0 worse, 2 better" in capsys.readouterr().out


def test_a_slower_machine_is_no_regression(compare_files: Any, figures: Any):
    assert compare_files(figures, slower(figures, 3.0, "native", "eager", "copy")) == 0


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--tolerance", "0.05"), 1)])
def test_the_tolerance(compare_files: Any, figures: Any, words: tuple[str, ...], code: int):
    for row in figures["benchmarks"][0]["contenders"]:
        row["seconds"] = [1e-3] * 4
    assert compare_files(figures, slower(figures, 1.08, "native"), *words) == code


def test_rounds_that_scatter_are_no_regression(compare_files: Any, figures: Any):
    row = figures["benchmarks"][0]["contenders"][1]
    row["seconds"] = [1e-3, 1e-3, 5e-3, 5e-3]
    changed = copy.deepcopy(figures)
    changed["benchmarks"][0]["contenders"][1]["seconds"] = [1e-3, 4e-3, 5e-3, 5e-3]
    assert compare_files(figures, changed) == 0


def test_what_is_no_longer_measured_is_named(
    compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    fewer = {**figures, "benchmarks": figures["benchmarks"][1:]}
    assert compare_files(figures, fewer) == 1
    out = capsys.readouterr().out
    assert "no longer measured: dropout forward: native over eager" in out


def test_another_device_is_refused(
    compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    other = {**figures, "device": {**figures["device"], "name": "Another"}}
    assert compare_files(figures, other) == 2
    assert "expected two reports of one device" in capsys.readouterr().err


def test_another_way_of_measuring_is_refused(
    compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    assert compare_files(figures, {**figures, "threads": 1}) == 2
    assert "two reports of the same threads, got 2 and 1" in capsys.readouterr().err


def test_a_report_at_a_git_revision(
    figures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def git(*words: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ("git", "-C", str(tmp_path), *identity, *words)
        subprocess.run(command, check=True, capture_output=True)

    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.report_of(figures)))
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    path.write_text(json.dumps(report.report_of(slower(figures, 2.0, "native"))))
    path = str(path)
    assert comparing.main(["HEAD", path]) == 1
    assert "2 worse" in capsys.readouterr().out
    assert comparing.main(["no-such-thing", path]) == 2
    assert "OLD must be a file or a git revision" in capsys.readouterr().err
    assert comparing.main([path, str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err
