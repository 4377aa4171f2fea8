"""bench/report.py, the charts, bench/compare.py and what the README shows of a report."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from bench import compare as comparing
from bench import readme_table, report
from reg_kernels.bench import _measure, _plots, _report, _results

ROOT = Path(__file__).parents[2]
DEVICE = {"type": "cpu", "name": "Made-up CPU", "family": "6", "model": "85", "isa": "avx2"}


def case(label: str, seconds: dict[str, list[float]], **fields: Any) -> dict[str, Any]:
    """A benchmark with these seconds, by contender."""
    rows = []
    for name, own in seconds.items():
        found = _measure.figures(own, seconds, 2**21, fields.get("peers", ()))
        rows.append({"name": name, "peak_bytes": 2**20, **found})
    described = {"label": label, "op": label.split()[0], "dtype": "float32", "shape": [2**18]}
    described |= {"host": False, "wall": False, "tensors": 0, "bytes": 2**21, "items": 0}
    described |= {"unit": "", "series": "", "peers": []}
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
        "schema": _results.SCHEMA,
        "commit": {"hash": "a" * 40, "dirty": False},
        "date": "2026-01-01T00:00:00+00:00",
        "device": DEVICE,
        "versions": {"torch": "2.13.0", "triton": None},
        "threads": 2,
        "allocator": None,
        "options": {},
        "benchmarks": [kernel, network, *ladder],
        "left_out": [],
    }


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second."""
    monkeypatch.setattr(report, "CHARTS", {})


def test_a_report_has_figures_tables_and_charts(figures: Any, tmp_path: Path):
    report.write(tmp_path, report.report_of(figures))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["report.json", "report.md", *report.CHARTS]
    )
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("<!-- written by `make bench` or `make gpu-report`: do not edit -->\n")
    assert "\n# Made-up CPU\n\n- commit: aaaaaaaaaaaa\n- date: 2026-01-01" in page
    assert "- copy bandwidth, float32 1 MiB: 0.002 TB/s read and written\n" in page
    assert "| dropout forward | native | 1 ms | 1.00 | 3 ms, 3× (2.6–3) |" in page
    row = "500 ms | 32 images | 16 images, 2× | 1 MiB (1 MiB) |"
    assert f"| model resnet18 | native | {row}" in page
    assert "| dropout by size | 4096 | 4.1 µs |  | 8.19 µs, 2× |" in page
    assert "| dropout forward | twice | 1.5 MISSED |" in page
    # A network is in its own table alone, and so is a curve.
    assert page.count("| model resnet18 ") == 1 and page.count("| dropout 4096 ") == 0


@pytest.mark.usefixtures("no_charts")
def test_what_computed_something_else_is_no_end(figures: Any, tmp_path: Path):
    """A wrong copy leaves no share, and a wrong network no rate: the report says so."""
    kernel, network = figures["benchmarks"][:2]
    kernel["contenders"][0] = {"name": "copy", "wrong": "out of memory"}
    del kernel["contenders"][1]["speed_over"]["copy"]
    network["contenders"][0] = {"name": "native", "wrong": "another loss"}
    report.write(tmp_path, report.report_of(figures))
    page = (tmp_path / "report.md").read_text()
    assert "| dropout forward | native | 1 ms |  | 3 ms, 3× (2.6–3) |" in page
    assert "| model resnet18 | native | WRONG VALUES |" in page
    assert "- WRONG VALUES: another loss (1 benchmarks)" in page


@pytest.mark.usefixtures("no_charts")
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


def test_charts_name_what_they_are_of(figures: Any, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(_plots, "_write", lambda figure, path: drawn.setdefault(path.stem, figure))
    for name, draw in report.CHARTS.items():
        draw(Path(name), figures)
    texts = {
        name: [text.get_text() for text in figure.findobj(Text)] for name, figure in drawn.items()
    }
    for found in texts.values():
        (title,) = (text for text in found if "commit" in text)
        assert "Made-up CPU, family 6, model 85" in title and "aaaaaaaaaaaa" in title
        assert "torch 2.13.0" in title
    assert {"dropout forward", "model resnet18", "3×"} <= set(texts["overview"])
    assert "dropout forward" in texts["shares"] and "model resnet18" in texts["speedups"]
    # Each curve is named at its end.
    assert {"dropout by size", "ours", "eager"} <= set(texts["growth"])


def test_the_growth_chart_has_a_panel_for_each_op_and_axis(figures: Any):
    curves = ("dropout backward", "dropout forward", "AdamW by tensors", "SGDW by tensors")
    figures["benchmarks"] = [
        case(f"{op} x", {"native": [1.0] * 2}, op=op, series=series, tensors="tensors" in series)
        for op, series in zip(("dropout", "dropout", "step", "step"), curves, strict=True)
    ]
    assert list(_plots._panels(figures)) == ["dropout forward", "AdamW by tensors"]


def test_the_overview_has_a_row_an_op(figures: Any):
    seconds = {"native": [1e-3] * 3, "eager": [2e-3] * 3}
    more = {
        "step small": {"shape": [8]},
        "step large": {"shape": [2**22]},
        "step in 16 bits": {"shape": [2**24], "dtype": "bfloat16"},
        "step of the host": {"shape": [2**24], "host": True},
        "dropout of no goal": {"shape": [2**24]},
    }
    figures["benchmarks"] += [case(label, seconds, **fields) for label, fields in more.items()]
    rows = _report.overview_table(figures).rows
    assert [row[0] for row in rows] == ["dropout forward", "model resnet18", "step large"]
    assert rows[2][1:] == ("1 ms", "2 ms", "", "2×")


def test_a_user_is_shown_the_implementation_that_runs(figures: Any):
    seconds = {"native": [1e-3] * 3, "native[baseline]": [3e-3] * 3, "eager": [2e-3] * 3}
    wrong = case("wrong", seconds)
    wrong["contenders"][0] = {"name": "native", "wrong": "off by one"}
    figures["benchmarks"] = [
        case("right", seconds),
        wrong,
        case("eager alone", {"eager": [1.0] * 3}),
    ]
    assert _report.short_table(figures).rows == [
        ("right, avx2", "1 ms", "2 ms", "", "2×"),
        ("right, baseline", "3 ms", "2 ms", "", "0.67×"),
        ("wrong, avx2", "WRONG VALUES", "", "", ""),
        ("wrong, baseline", "3 ms", "2 ms", "", "0.67×"),
    ]
    figures["benchmarks"] = [case("right", {k: v for k, v in seconds.items() if "[" not in k})]
    assert _report.short_table(figures).rows == [("right", "1 ms", "2 ms", "", "2×")]


def test_what_has_goals_is_shown_by_instruction_set(figures: Any):
    """Older reports name them by their contenders alone: `native` is the device's own."""
    seconds = {"copy": [1e-3] * 3, "native": [1e-3] * 3, "native[baseline]": [2e-3] * 3}
    further = case("penalty l1", {**seconds, "eager": [3e-3] * 3})
    further["contenders"][1]["isa"] = "avx2"
    for row, (value, met) in zip(further["contenders"][1:3], ((2, True), (1, False)), strict=True):
        row["goals"] = [{"text": "twice", "figure": "f", "value": value, "met": met}]
    figures["benchmarks"] += [further, case("of no goal", seconds)]
    table = _report.isa_table(figures)
    names = ("avx2: eager", "avx2: copy", "baseline: eager", "baseline: copy")
    assert table.columns == ("benchmark", *names)
    assert table.rows == [
        ("dropout forward", "3× (2.6–3)", "1.00", "", ""),
        ("penalty l1", "3×", "1.00", "1.5×", "0.50"),
    ]
    assert table.markdown() in _report.headline(figures)
    assert _report.goal_table(figures).columns[2:] == ("avx2", "baseline")
    assert _report.goal_table(figures).rows == [
        ("dropout forward", "twice", "1.5 MISSED", ""),
        ("penalty l1", "twice", "2 met", "1 MISSED"),
    ]
    assert "native[baseline]" not in _report.result_table(figures, _report.SHOWN).markdown()
    further["contenders"][1]["isa"] = "sse4"  # what --isa asked for
    figures["benchmarks"] = [further]
    assert "2 threads, sse4, malloc" in "\n".join(_report.conditions(figures))


def test_without_matplotlib_there_are_no_charts(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "growth.png").touch()  # of an earlier run
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.write(tmp_path, report.report_of(figures))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert ".png" not in (tmp_path / "report.md").read_text()


def test_charts_of_nothing(figures: Any, tmp_path: Path):
    report.write(tmp_path, report.report_of({**figures, "benchmarks": []}))
    assert (tmp_path / "growth.png").exists()


@pytest.mark.usefixtures("no_charts")
def test_a_report_keeps_ratios_and_a_line_a_benchmark(figures: Any, tmp_path: Path):
    report.write(tmp_path, report.report_of(figures))
    text = (tmp_path / "report.json").read_text()
    assert '"seconds"' not in text and "do not edit" in text.splitlines()[1]
    lines = [line for line in text.splitlines() if '"label"' in line]
    assert len(lines) == len(figures["benchmarks"])
    copy, native, eager = json.loads(lines[0].strip().rstrip(","))["contenders"]
    assert native["speed_over"] == {"copy": [0.875, 1.0, 1.0], "eager": [2.625, 3.0, 3.0]}
    assert native["median"] == 1e-3 and copy.keys() == eager.keys() == {
        *("name", "median", "peak_bytes"),
    }


def test_a_report_can_be_made_again_from_its_file(figures: Any, tmp_path: Path):
    figures["benchmarks"][0]["contenders"][0]["median"] = 1 / 3
    report.write(tmp_path / "one", report.report_of(figures))
    report.write(tmp_path / "two", report.read(tmp_path / "one" / "report.json"))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[]", "got None"), ('{"schema": 2}', "schema 3, got 2")],
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
    set_ratios(changed)
    return changed


def set_ratios(figures: dict[str, Any]) -> None:
    """Makes the ratios of the first benchmark those of its seconds."""
    rows = figures["benchmarks"][0]["contenders"]
    seconds = {row["name"]: row["seconds"] for row in rows}
    for row in rows:
        row |= _measure.figures(row["seconds"], seconds, 2**21)


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
    set_ratios(figures)
    assert compare_files(figures, slower(figures, 1.08, "native"), *words) == code


def test_rounds_that_scatter_are_no_regression(compare_files: Any, figures: Any):
    row = figures["benchmarks"][0]["contenders"][1]
    row["seconds"] = [1e-3, 1e-3, 5e-3, 5e-3]
    set_ratios(figures)
    changed = copy.deepcopy(figures)
    changed["benchmarks"][0]["contenders"][1]["seconds"] = [1e-3, 4e-3, 5e-3, 5e-3]
    set_ratios(changed)
    assert compare_files(figures, changed) == 0


def test_what_is_no_longer_measured_is_named(
    compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    fewer = {**figures, "benchmarks": figures["benchmarks"][1:]}
    assert compare_files(figures, fewer) == 1
    out = capsys.readouterr().out
    assert "no longer measured: dropout forward: native over eager" in out


@pytest.mark.parametrize("what", ["name", "family", "model", "isa"])
def test_another_device_is_refused(
    what: str, compare_files: Any, figures: Any, capsys: pytest.CaptureFixture[str]
):
    other = {**figures, "device": {**DEVICE, what: "other"}}
    assert compare_files(figures, other) == 2
    assert f"expected two reports of one device, got {what} '" in capsys.readouterr().err
    # What nobody wrote down, nobody can tell apart.
    assert compare_files({**figures, "device": {**DEVICE, what: None}}, figures) == 0


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
