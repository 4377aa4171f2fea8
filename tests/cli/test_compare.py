"""The `compare` command: what its numbers say, what it goes on with, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from reg_kernels.cli import _errors, build_parser, compare, main
from reg_kernels.cli._compare_plan import Plan, arms_of
from reg_kernels.cli._compare_results import draw_curves, draw_effects, summary, verdict
from reg_kernels.cli._data import Split, load_images, split
from reg_kernels.cli._progress import sparkline
from reg_kernels.cli._recipe import recipe_from
from reg_kernels.cli._statistics import bootstrap
from reg_kernels.cli._study import Standing
from reg_kernels.cli._study_checks import RESULT
from reg_kernels.cli._trainer.fused import fused_kernels
from reg_kernels.cli._trainer.measures import expected_calibration_error
from reg_kernels.cli._trainer.training import Training
from reg_kernels.cli._trial import Setting
from reg_kernels.training import METHODS, Recipe

RESULTS = ["compare.json", "curves.png", "effects.png", "recipe.toml", "study.log"]
EPOCHS = 2
SPENT = ("seconds_per_epoch", "peak_bytes")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny training; one test looks at the pictures."""
    for name in ("draw_effects", "draw_curves"):
        monkeypatch.setattr(compare, name, lambda path, results: path.write_bytes(b"picture"))


def command(data: Path, out: Path, *more: object) -> list[str]:
    """A journal is made sooner than an SQLite file."""
    sizes = ["--train-size", 40, "--validation-size", 30, "--epochs", EPOCHS]
    where = ["--data", data, "--out", out, "--storage", out / "study.log", "--device", "cpu"]
    given = [*where, *sizes, "--model", "mlp", "--workers", 1, "--seeds", 2, *more]
    return ["compare", *map(str, given)]


def plan_of(argv: list[str]) -> Plan:
    return compare._plan(build_parser(["compare"]).parse_args(argv))


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    """All that two runs of one result share."""
    for trial in found["trials"]:
        del trial["measures"]["seconds_per_epoch"], trial["number"]
        if "teacher" in trial:
            del trial["teacher"]["seconds"]
    for arm in found["arms"].values():
        arm["means"].pop("seconds_per_epoch", None)
    for effects in found["effects"].values():
        effects.pop("seconds_per_epoch", None)
    return found


# What it says


def test_the_numbers_are_those_of_trainings_by_hand(
    data: Path, tmp_path: Path, no_plot: None, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("dropout", "l1", "adversarial", "early_stopping", "distillation")
    (tmp_path / "my.toml").write_text("dropout = 0.3\nl1 = 1.0\nnoise = 0.1\n")
    argv = command(data, tmp_path / "out", "--methods", ",".join(reversed(methods)))
    argv += ["--recipe", str(tmp_path / "my.toml"), "--max-trials", "12"]
    assert main(argv) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == RESULTS
    found = results(out)
    base = Recipe(model="mlp", epochs=EPOCHS, noise=0.1)
    assert Recipe.from_toml((out / "recipe.toml").read_text()) == base
    on = {name: METHODS[name].on for name in methods} | {"dropout": 0.3, "l1": 1.0}
    recipes = {"base": base} | {
        name: dataclasses.replace(base, **{name: strength}) for name, strength in on.items()
    }
    assert {name: Recipe(**arm["recipe"]) for name, arm in found["arms"].items()} == recipes
    images = load_images(str(data))
    by_hand: dict[tuple[str, int], dict[str, float]] = {}
    for seed in range(2):
        training = Training(
            split(images, 40, seed, 30),
            *(images.classes, recipes, range(seed, seed + 1), torch.device("cpu")),
            fused_kernels(None),
            watch=("train", "validation"),
            attacked_by=on["adversarial"],
        )
        training.run(lambda: None)
        for name in recipes:
            by_hand[name, seed] = training.results[name]
    assert len(found["trials"]) == len(by_hand) == 12
    for trial in found["trials"]:
        expected = by_hand[trial["arm"], trial["seed"]]
        measures = trial["measures"]
        assert {name: measures[name] for name in expected} == expected
        assert measures["gap"] == expected["train_accuracy"] - expected["test_accuracy"]
        assert measures["seconds_per_epoch"] > 0
        assert measures["peak_bytes"] > 0
        assert len(trial["history"]["validation_loss"]) == expected["epochs"]
        assert {name.split("_")[0] for name in trial["history"]} == {"train", "validation"}
        assert ("teacher" in trial) == (trial["arm"] == "distillation")
    for name in methods:
        for measure in ("test_loss", "test_accuracy", "attacked_accuracy", "test_ece"):
            of = found["effects"][name][measure]
            seeds = [by_hand[name, s][measure] - by_hand["base", s][measure] for s in range(2)]
            assert list(of["seeds"].values()) == pytest.approx(seeds)
            assert of["mean"] == pytest.approx(statistics.fmean(seeds))
            assert (of["low"], of["high"]) == pytest.approx((min(seeds), max(seeds)))
    times = {(t["arm"], t["seed"]): t["measures"]["seconds_per_epoch"] for t in found["trials"]}
    ratios = [times["l1", s] / times["base", s] for s in range(2)]
    of = found["effects"]["l1"]["seconds_per_epoch"]
    assert list(of["seeds"].values()) == pytest.approx(ratios)
    assert of["mean"] == pytest.approx(statistics.geometric_mean(ratios))
    printed = capsys.readouterr().out
    assert printed.startswith("6 nets x 2 seeds: 12 trials, 0 of them done; fused kernels on cpu")
    zeros = statistics.fmean(by_hand["l1", s]["zeros"] for s in range(2))
    assert f"l1: {zeros:,.0f} of " in printed
    for said in ("early_stopping: ", "distillation: training the teacher took"):
        assert said in printed
    # Nothing is trained again, and more seeds only add their own.
    assert main(argv) == 0
    assert "12 trials, 12 of them done" in capsys.readouterr().out
    assert results(out) == found
    assert main([*argv, "--seeds", "3", "--max-trials", "18"]) == 0
    assert [t for t in results(out)["trials"] if t["seed"] < 2] == found["trials"]


def trained_on(data: Split, *recipes: Recipe, **options: Any) -> Training:
    training = Training(
        *(data, 3, {str(i): recipe for i, recipe in enumerate(recipes)}, range(1)),
        *(torch.device("cpu"), fused_kernels(None)),
        **options,
    )
    training.run(lambda: None)
    return training


def assert_same_net(ours: Training, theirs: Training) -> None:
    pairs = zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_is_chosen_on_the_test_set(data: Path) -> None:
    """Other labels there change no more than what is measured there at the end."""
    there = split(load_images(str(data)), 40, 0, 30)
    others = dataclasses.replace(there, test_y=(there.test_y + 1) % 3)
    recipe = Recipe(model="mlp", epochs=30, learning_rate=2e-3, early_stopping=4)
    ours, theirs = (
        trained_on(of, recipe, watch=("train", "validation"), attacked_by=0.1)
        for of in (there, others)
    )
    assert 4 < ours.results["0"]["best_epoch"] < ours.results["0"]["epochs"] < 30
    assert ours.history == theirs.history
    assert_same_net(ours, theirs)


def test_nets_see_the_same_batches_and_measuring_draws_nothing_from_them(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    randperm = torch.randperm

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        order = randperm(*args, **options)
        seen.append(order.tolist())
        return order

    monkeypatch.setattr(torch, "randperm", noted)
    there = split(load_images(str(data)), 40, 0, 30)
    recipes = (Recipe(model="mlp", epochs=3), Recipe(model="mlp", epochs=3, dropout=0.5, noise=0.1))
    plain = trained_on(there, *recipes)
    assert len(seen) == 6
    assert seen[:3] == seen[3:]
    assert seen[0] != seen[1]
    assert_same_net(plain, trained_on(there, *recipes, attacked_by=0.1))


def test_designs() -> None:
    recipe = Recipe(model="mlp", dropout=0.3, noise=0.1)

    def on(design: str) -> dict[str, dict[str, Any]]:
        return {
            arm.label: arm.recipe.methods()
            for arm in arms_of(recipe, ("dropout", "l1", "batch_norm"), design)
        }

    rest, dropout = {"noise": 0.1}, {"dropout": 0.3}
    l1, norm = {"l1": METHODS["l1"].on}, {"batch_norm": True}
    one_on = {"base": rest, "dropout": rest | dropout, "l1": rest | l1, "batch_norm": rest | norm}
    assert on("one-on") == one_on
    assert on("one-off") == {
        "all": rest | dropout | l1 | norm,
        "without dropout": rest | l1 | norm,
        "without l1": rest | dropout | norm,
        "without batch_norm": rest | dropout | l1,
    }
    assert on("factorial") == one_on | {
        "dropout + l1": rest | dropout | l1,
        "dropout + batch_norm": rest | dropout | norm,
        "l1 + batch_norm": rest | l1 | norm,
        "dropout + l1 + batch_norm": rest | dropout | l1 | norm,
    }


def done_by(plan: Plan, measures: Any) -> Standing:
    """A study whose trials all came out as `measures(on, seed, fold)` says."""
    trials = []
    for task in plan.tasks():
        of = measures(plan.arms[task["arm"]].on, task["seed"], task["fold"])
        history = {"train_loss": [1.0, 0.5], "validation_loss": [1.0, None]}
        trials.append(
            optuna.trial.create_trial(
                params=task,
                distributions={
                    name: optuna.distributions.CategoricalDistribution([value])
                    for name, value in task.items()
                },
                value=0.0,
                user_attrs={RESULT: {"measures": of, "history": history}},
            )
        )
    return Standing(trials, [], {}, [])


@pytest.mark.parametrize("design", ["one-on", "one-off", "factorial"])
def test_main_effects_and_interactions(data: Path, tmp_path: Path, design: str) -> None:
    """With folds, that are no seeds: their mean is one value."""
    more = ("--methods", "dropout,l1,noise", "--design", design)
    argv = [w for w in command(data, tmp_path, *more) if w not in ("--validation-size", "30")]
    plan = plan_of([*argv, "--folds", "2"])

    def measures(on: frozenset[str], seed: int, fold: int) -> dict[str, float]:
        dropout, l1, noise = (name in on for name in ("dropout", "l1", "noise"))
        accuracy = 2 * dropout + 3 * l1 + (5 + seed) * dropout * l1 + 7 * noise
        return {"test_accuracy": accuracy + 100 * seed + 10 * fold, "seconds_per_epoch": 2.0**l1}

    found = summary(plan, done_by(plan, measures))
    assert len(found["trials"]) == {"one-on": 4, "one-off": 4, "factorial": 8}[design] * 4
    # What the other one is meanwhile: off, on, or either, which counts for a half.
    share = {"one-on": 0, "one-off": 1, "factorial": 0.5}[design]
    effects = {name: of["test_accuracy"]["seeds"] for name, of in found["effects"].items()}
    assert effects["dropout"] == {"0": 2 + 5 * share, "1": 2 + 6 * share}
    assert effects["l1"] == {"0": 3 + 5 * share, "1": 3 + 6 * share}
    assert effects["noise"] == {"0": 7, "1": 7}
    assert found["effects"]["l1"]["seconds_per_epoch"]["mean"] == pytest.approx(2)
    if design == "factorial":
        interactions = {n: of["test_accuracy"] for n, of in found["interactions"].items()}
        assert interactions["dropout x l1"]["seeds"] == {"0": 5, "1": 6}
        assert interactions["dropout x l1"]["mean"] == 5.5
        assert interactions["l1 x noise"]["seeds"] == {"0": 0, "1": 0}
    else:
        assert not found["interactions"]


def test_a_fold_that_is_missing_or_no_number_leaves_its_seed_out(
    data: Path, tmp_path: Path
) -> None:
    plan = plan_of(command(data, tmp_path, "--methods", "l1", "--seeds", "4"))

    def measures(on: frozenset[str], seed: int, fold: int) -> dict[str, float | None]:
        return {"test_loss": None if on and seed == 1 else seed + len(on) / 2}

    standing = done_by(plan, measures)
    del standing.done[-1]
    found = summary(plan, standing)
    assert found["effects"]["l1"]["test_loss"]["seeds"] == {"0": 0.5, "2": 0.5}
    assert found["arms"]["l1"]["means"] == {"test_loss": None}
    json.dumps(found, allow_nan=False)


def test_the_pictures_show_the_effects_and_the_losses(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command(data, tmp_path, "--methods", "dropout,l1,early_stopping", "--seeds", 3)
    plan = plan_of(argv)
    gains = {"dropout": 0.02, "l1": -0.01, "early_stopping": 0.0}

    def measures(on: frozenset[str], seed: int, fold: int) -> dict[str, float]:
        gain = sum(gains[name] for name in on)
        spread = (seed - 1) * 0.005 * len(on)
        return {"test_accuracy": 0.9 + gain + spread, "test_loss": 1 - gain - spread}

    found = summary(plan, done_by(plan, measures))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_effects(tmp_path / "effects.png", found)
    draw_curves(tmp_path / "curves.png", found)
    accuracy, loss = drawn[0].axes
    rows = [label.get_text() for label in accuracy.get_yticklabels()]
    assert rows == ["l1", "early_stopping", "dropout"]  # upwards
    for axes, sign, scale in ((accuracy, 1, 100), (loss, -1, 1)):
        lines = axes.lines[: 3 * len(rows)]
        for row, (seeds, interval, mean) in enumerate(zip(*[iter(lines)] * 3, strict=True)):
            gain = gains[rows[row]]
            expected = sorted(sign * scale * (gain + d) for d in (-0.005, 0, 0.005))
            assert sorted(seeds.get_xdata()) == pytest.approx(expected)
            assert sorted(interval.get_xdata()) == pytest.approx([expected[0], expected[-1]])
            assert list(mean.get_xdata()) == pytest.approx([sign * scale * gain])
            assert list(mean.get_ydata()) == [row]
    signs = {name: verdict(of["test_loss"], "test_loss") for name, of in found["effects"].items()}
    assert signs == {"dropout": 1, "l1": -1, "early_stopping": 0}
    titles = [axes.get_title() for axes in drawn[1].axes]
    assert titles == list(found["arms"])
    train, validation, least, *_ = drawn[1].axes[0].lines
    assert list(train.get_ydata()) == [1.0, 0.5]
    np.testing.assert_equal(list(validation.get_ydata()), [1.0, np.nan])
    assert (list(least.get_xdata()), list(least.get_ydata())) == ([1], [1.0])


def test_bootstrap_intervals() -> None:
    assert dataclasses.astuple(bootstrap([0.1, 0.3])) == pytest.approx((0.2, 0.1, 0.3))
    assert dataclasses.astuple(bootstrap([2.0, 0.0, 1.0])) == (1.0, 0.0, 2.0)
    assert dataclasses.astuple(bootstrap([0.5] * 4)) == (0.5, 0.5, 0.5)
    values = np.random.default_rng(1).gamma(2.0, size=25)
    ours, mirrored = bootstrap(list(values)), bootstrap(list(-values))
    assert (ours.low, ours.high) == (-mirrored.high, -mirrored.low)
    tail = stats.norm.cdf(np.sqrt(25 / 24) * stats.t.ppf(0.025, 24))
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=1 - 2 * tail, method="percentile", rng=2
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)
    assert ours.high - ours.low > 1.05 * (np.mean(values) * 0 + 3.92 * values.std() / 5)


def test_expected_calibration_error() -> None:
    """Three images at a confidence of 0.6, of which one is right, and one sure and right."""
    confidence = torch.tensor([0.6, 0.6, 0.6, 1 - 1e-12], dtype=torch.float64)
    scores = torch.stack([confidence.log(), (1 - confidence).log()], 1)
    labels = torch.tensor([0, 1, 1, 0])
    error = expected_calibration_error(scores, labels)
    assert error == pytest.approx(3 / 4 * (0.6 - 1 / 3))
    # A bin holds its upper end, not its lower one: 0.6 and 0.61 are in two of five.
    scores[0] = torch.tensor([0.61, 0.39], dtype=torch.float64).log()
    error = expected_calibration_error(scores, labels, bins=5)
    assert error == pytest.approx((2 * 0.6 + (1 - 0.61)) / 4, abs=1e-9)


def test_sparkline() -> None:
    assert sparkline([1.0, 0.1, 0.01]) == "█▅▁"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁ ▁"
    assert sparkline([float("inf")]) == ""
    assert len(sparkline([1.0] * 1000)) == 20


# What it goes on with


def test_ctrl_c_and_the_same_command_again(
    data: Path,
    tmp_path: Path,
    no_plot: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    methods = ("--methods", "distillation,early_stopping")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(data, whole, *methods)) == 0
    train, calls = Setting.train, itertools.count()

    def interrupted(self: Setting, recipe: Recipe, seed: int, fold: int, after: Any) -> Any:
        def look(epoch: int, losses: list[float]) -> None:
            after(epoch, losses)
            if next(calls) in (3, 6):
                raise KeyboardInterrupt

        return train(self, recipe, seed, fold, look)

    monkeypatch.setattr(Setting, "train", interrupted)
    capsys.readouterr()
    for _ in range(2):
        assert main(command(data, parts, *methods)) == 130
        assert [path.name for path in parts.iterdir()] == ["study.log"]
        said = capsys.readouterr().err
        assert said == f"\ninterrupted: the same command goes on from {parts / 'study.log'}\n"
    # A helper, which gets the plan from another process, works on the same study.
    compare._help(pickle.loads(pickle.dumps(plan_of(command(data, parts, *methods)))), 1)
    assert main(command(data, parts, *methods)) == 0
    assert "6 trials, 6 of them done" in capsys.readouterr().out
    ours, theirs = (results(out) for out in (parts, whole))
    for found in (ours, theirs):
        found["trials"].sort(key=lambda t: (t["arm"], t["seed"]))
    assert without_times(ours) == without_times(theirs)


def test_a_crash_is_reported_at_the_end(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With real pictures, in an SQLite file, of two folds: what there is of it is shown."""
    train, tries = Setting.train, []

    def crashing(self: Setting, recipe: Recipe, *rest: Any) -> Any:
        if recipe.l1 and rest[:2] == (0, 1):
            tries.append(1)
            raise RuntimeError("out of luck")
        return train(self, recipe, *rest)

    monkeypatch.setattr(Setting, "train", crashing)
    argv = [w for w in command(data, tmp_path, "--methods", "l1,noise") if w != "--validation-size"]
    argv.remove("30")
    argv[argv.index("--storage") + 1] = str(tmp_path / "study.db")
    assert main([*argv, "--folds", "2"]) == 1
    assert len(tries) == 2
    assert "crashed: l1, seed 0, fold 1: RuntimeError: out of luck" in capsys.readouterr().out
    found = results(tmp_path)
    expected = {"arm": "l1", "seed": 0, "fold": 1, "error": "RuntimeError: out of luck"}
    assert found["crashed"] == [expected]
    assert len(found["trials"]) == 11
    assert found["effects"]["l1"]["test_loss"]["seeds"].keys() == {"1"}
    for name in ("effects.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("--methods dropout,batch-norm", "conv"),
        ("--methods dropout,drop_path", "resnet"),
        ("--methods dropout --drop-path 0.1", "resnet"),
        ("--methods drop_path --model mixer", "mixer"),
    ],
)
def test_the_model_is_one_that_the_methods_go_with(words: str, model: str) -> None:
    args = build_parser(["compare"]).parse_args(["compare", *words.split()])
    assert recipe_from(args, Recipe()).model == model


def test_methods_of_which_every_training_crashes(
    data: Path,
    tmp_path: Path,
    no_plot: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is nothing particular to say of them."""
    train = Setting.train

    def crashing(self: Setting, recipe: Recipe, *rest: Any) -> Any:
        if recipe.methods().keys() - {"batch_norm"}:
            raise RuntimeError("out of luck")
        return train(self, recipe, *rest)

    monkeypatch.setattr(Setting, "train", crashing)
    methods = "l1,early_stopping,distillation"
    assert main(command(data, tmp_path, "--methods", methods, "--seeds", 1)) == 1
    said = capsys.readouterr().out
    found = results(tmp_path)
    for name in methods.split(","):
        assert f"crashed: {name}, seed 0: RuntimeError: out of luck" in said
        assert (found["arms"][name]["means"], found["effects"][name]) == ({}, {})


# What it refuses


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--methods", "dropout,mixpu"],
            "--methods: there is no method 'mixpu': did you mean mixup?",
        ),
        (["--methods", " , "], "--methods: must name at least one method, got none"),
        (
            ["--methods", "drop_path"],
            "--methods: drop_path goes with --model resnet, mixer, got mlp",
        ),
        (["--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["--seeds", "4294967297"], "--seeds: must be at most 4294967296, got 4294967297"),
        (["--seed", "-1"], "--seed: must be in 0..4294967294, got -1"),
        (["--workers", "0"], "--workers: must be at least 1, got 0"),
        (
            ["--design", "factorial", "--methods", "l1,l2,noise,mixup,cutmix,dropout"],
            "--design: would be 128 trials, 64 nets x 2 seeds, of at most 100; "
            "--max-trials allows more",
        ),
        (["--train-size", "0"], "--train-size: must be at least 1, got 0"),
        (
            ["--validation-size", "70"],
            "--validation-size: must be in 3..57 for 100 images of 3 classes, got 70",
        ),
        (
            ["--folds", "2"],
            "--validation-size: goes without --folds, whose parts are validated on",
        ),
        (["--dropout", "1.5"], "--dropout: must be in [0, 1), got 1.5"),
        (
            ["--storage", "study.txt"],
            "--storage: must be a file that ends in .db, SQLite's, or in "
            ".log, a journal, or a URL, got study.txt",
        ),
    ],
)
def test_bad_options(
    data: Path,
    tmp_path: Path,
    more: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = command(data, Path("out"), "--methods", "l1", "--max-trials", "100", *more)
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", f"reg-kernels compare: {said}\n")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("folds", "said"),
    [
        ("1", "--folds: must be at least 2, got 1"),
        ("14", "--folds: must be at most the images of each class to train on, got 14 for 13"),
    ],
)
def test_bad_folds(
    data: Path, tmp_path: Path, folds: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(data, tmp_path / "out", "--methods", "l1", "--folds", folds)
    at = words.index("--validation-size")
    assert main(words[:at] + words[at + 2 :]) == 2
    assert capsys.readouterr().err == f"reg-kernels compare: {said}\n"
    assert not (tmp_path / "out").exists()


def test_the_storage_of_another_comparison(
    data: Path, tmp_path: Path, no_plot: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(data, tmp_path, "--methods", "l1", "--seeds", 1)
    assert main(argv) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    where = f"reg-kernels compare: --storage {tmp_path / 'study.log'}: is of another study: "
    for more, said in (
        (["--epochs", "3"], "epochs 2 there, 3 here"),
        (["--methods", "l1,l2"], "methods ['l1'] there, ['l1', 'l2'] here"),
        (["--kernels", "eager"], "kernels fused there, eager here"),
    ):
        assert main([*argv, *more]) == 2
        assert capsys.readouterr().err == f"{where}{said}; name another one\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert _errors.INTERRUPTED == 130
