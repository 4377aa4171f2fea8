"""The `tune` command: what it finds, what it goes on with, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from matplotlib.figure import Figure

from reg_kernels.cli import _tune_plan, _tune_results, build_parser, main, train, tune
from reg_kernels.cli._data import load_images, split
from reg_kernels.cli._recipe import options_of, recipe_from
from reg_kernels.cli._trainer.training import Training
from reg_kernels.cli._trial import Setting
from reg_kernels.cli._tune_space import Axis
from reg_kernels.training import METHODS, Recipe

RESULTS = ["recipe.toml", "search.png", "study.log", "tune.json"]
EPOCHS = 2
Loss = Callable[[Recipe, int, int], float]  # of a recipe and a seed, after an epoch


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_plot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny training; one test looks at the picture."""
    monkeypatch.setattr(tune, "draw", lambda path, results: path.write_bytes(b"picture"))


def command(data: Path, out: Path, *more: object) -> list[str]:
    """A journal is made sooner than an SQLite file."""
    sizes = ["--train-size", 40, "--validation-size", 30, "--epochs", EPOCHS]
    where = ["--data", data, "--out", out, "--storage", out / "study.log", "--device", "cpu"]
    given = [*where, *sizes, "--model", "mlp", "--workers", 1, "--confirm", 0, *more]
    return ["tune", *map(str, given)]


def plan_of(argv: list[str]) -> tune.Plan:
    return tune._plan(build_parser(["tune"]).parse_args(argv))


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "tune.json").read_text())
    return found


def losses(out: Path) -> list[float]:
    return [trial["validation_loss"] for trial in results(out)["trials"]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loss], list[tuple[Recipe, int, bool]]]:
    """Puts losses in the place of trainings, and notes them: recipe, seed, whether it is tested."""

    def by(loss: Loss) -> list[tuple[Recipe, int, bool]]:
        seen: list[tuple[Recipe, int, bool]] = []

        def fake(
            self: Setting,
            recipe: Recipe,
            seed: int,
            fold: int = 0,
            after_epoch: Any = lambda *_: None,
            tested: bool = True,
        ) -> dict[str, Any]:
            seen.append((recipe, seed, tested))
            history = []
            for epoch in range(1, recipe.epochs + 1):
                history.append(loss(recipe, seed, epoch))
                after_epoch(epoch, history)
            last = history[-1] if math.isfinite(history[-1]) else None
            measures = {"validation_loss": last}
            if tested:
                accuracy = 0.9 - loss(recipe, seed, recipe.epochs) / 10
                measures |= {"test_accuracy": accuracy, "seconds_per_epoch": 2.0}
            return {"measures": measures, "history": {"validation_loss": history}}

        monkeypatch.setattr(Setting, "train", fake)
        return seen

    return by


def bowl(recipe: Recipe, seed: int, epoch: int) -> float:
    """Least for a dropout of 0.4 and without mixup."""
    return 0.1 + (recipe.dropout - 0.4) ** 2 + recipe.mixup / 10 + seed / 100 + 1 / (9 + epoch)


TWO = ["--methods", "dropout,mixup"]


# What is searched


@pytest.mark.parametrize("name", METHODS)
def test_the_axis_of_each_method(name: str) -> None:
    method = METHODS[name]
    axis = Axis(name, *method.search)
    space, recipe = axis.distribution, Recipe(model=method.models[-1])

    def trained_with(number: Any) -> Any:
        assert space._contains(space.to_internal_repr(number))
        strength = axis.strength(number)
        # A recipe takes it, and it is what a user would read and type.
        assert getattr(dataclasses.replace(recipe, **{name: strength}), name) == strength
        assert float(f"{strength:.3g}") == strength
        return strength

    assert trained_with(axis.off) == method.off
    assert trained_with(axis.number(method.on)) == method.on
    assert axis.number(method.off) == axis.off
    grid = [trained_with(number) for number in axis.grid(3)]
    if method.kind is bool:
        assert grid == [False, True]
        return
    least, most = method.search
    assert [grid[0], grid[1], grid[-1]] == [0, least, most]
    assert grid[2] == pytest.approx(
        math.sqrt(least * most) if method.log else (least + most) / 2, 0.04
    )
    assert trained_with(space.low) == 0
    assert trained_with(axis.number(0.9 * least)) == least
    # Half of the axis is off.
    sampler = optuna.samplers.RandomSampler(0)
    study = optuna.create_study(sampler=sampler)
    drawn = [trained_with(study.ask({name: space}).params[name]) for _ in range(100)]
    assert 30 < drawn.count(0) < 70
    assert all(least <= strength <= most for strength in drawn if strength)


def test_strengths_keep_to_a_range_that_has_more_digits() -> None:
    axis = Axis("dropout", 0.12345, 0.99999)
    assert axis.strength(0.12346) == 0.12345
    assert axis.strength(0.99998) == 0.99999
    assert Axis("weight_decay", 0.1, 1.0).strength(0.98765) == 0.988


def test_the_base_and_the_usual_strengths_come_first(
    data: Path, tmp_path: Path, trained: Any
) -> None:
    seen = trained(bowl)
    given = ["--dropout", 0.3, "--label-smoothing", 0.05, *TWO, "--trials", 3, "--seeds", 2]
    assert main(command(data, tmp_path, *given)) == 0
    base = Recipe(model="mlp", epochs=EPOCHS, label_smoothing=0.05)
    usual = dataclasses.replace(base, dropout=0.3, mixup=0.2)
    assert [s[:2] for s in seen[:4]] == [(base, 0), (base, 1), (usual, 0), (usual, 1)]
    assert len(seen) == 6
    found = results(tmp_path)
    # The mean over the seeds.
    assert found["base"]["validation_loss"] == pytest.approx(bowl(base, 0, EPOCHS) + 0.005)
    assert found["usual"]["number"] == 1


def test_a_grid_has_every_combination_once(data: Path, tmp_path: Path, trained: Any) -> None:
    seen = trained(bowl)
    grid = ["--search", "grid", "--points", 2, *TWO, "--range", "dropout=0.4:0.6"]
    assert main(command(data, tmp_path, *grid, "--trials", 9)) == 0
    assert main(command(data, tmp_path, *grid, "--trials", 9)) == 0
    recipes = [(recipe.dropout, recipe.mixup) for recipe, _, _ in seen]
    assert sorted(recipes) == sorted(itertools.product((0, 0.4, 0.6), (0, 0.1, 0.4)))
    best = results(tmp_path)["best"]
    assert best["strengths"] == {"dropout": 0.4, "mixup": 0}


def test_a_grid_goes_on_with_what_another_search_found(
    data: Path, tmp_path: Path, trained: Any
) -> None:
    trained(bowl)
    given = [*TWO, "--trials", 9, "--confirm", 0]
    assert main(command(data, tmp_path, *given, "--dropout", 0.4)) == 0
    found = results(tmp_path)
    grid = ["--search", "grid", "--points", 2, "--range", "dropout=0.2:0.6"]
    assert main(command(data, tmp_path, *given, *grid)) == 0
    assert found["best"]["validation_loss"] < bowl(Recipe(dropout=0.6), 0, EPOCHS)
    assert results(tmp_path)["best"] == found["best"]
    assert len(results(tmp_path)["trials"]) > 9


# What it finds


def test_the_printed_command_trains_the_best_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "a", tmp_path / "b"
    given = ["--trials", 4, "--seed", 3, "--search", "random", "--early-stopping", 2]
    assert main(command(data, out, *given, "--confirm", 1)) == 0
    assert sorted(path.name for path in out.iterdir()) == RESULTS
    found = results(out)
    line = next(x for x in capsys.readouterr().out.splitlines() if "reg-kernels train" in x)
    assert line.endswith(found["best"]["command"])
    _, *words = shlex.split(found["best"]["command"])
    assert main([*words, "--out", str(again), "--time-epochs", "0"]) == 0
    assert (again / "recipe.toml").read_text() == (out / "recipe.toml").read_text()
    *_, run = json.loads((again / "metrics.json").read_text())["runs"].values()
    assert run["final"]["validation_loss"] == found["best"]["validation_loss"]
    assert found["best"]["validation_loss"] == min(losses(out))


def test_train_takes_every_recipe_by_its_options() -> None:
    on = {name: Axis(name, *of.search).strength(of.search[1]) for name, of in METHODS.items()}
    parser = build_parser(["train"])
    for name, model in itertools.product(METHODS, ("mlp", "resnet")):
        if model not in METHODS[name].models:
            continue
        for recipe in (Recipe(model=model), Recipe(model=model, **{name: on[name]})):
            args = parser.parse_args(["train", *options_of(recipe, train.REGULARISED)])
            *_, last = train._recipes(recipe_from(args, train.REGULARISED), args.augmented).values()
            assert last == recipe


def test_nobody_sees_the_test_set_before_it_is_confirmed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[tuple[bool, Any]] = []
    init = Training.__init__

    def spy(self: Training, data: Any, *args: Any, **others: Any) -> None:
        splits.append(("test" in data.parts(), data))
        init(self, data, *args, **others)

    monkeypatch.setattr(Training, "__init__", spy)
    # A few epochs are not enough to do better than the base.
    monkeypatch.setattr(_tune_plan, "best_of", lambda standing: next(iter(standing.done[1:]), None))
    given = [*TWO, "--trials", 2, "--seeds", 2, "--confirm", 2]
    assert main(command(data, tmp_path, *given)) == 0
    found = results(tmp_path)
    assert [tested for tested, _ in splits] == [False] * 4 + [True] * 4
    assert not any("test" in key for t in found["trials"] for key in t["trainings"][0]["measures"])
    # All have the same one, none of whose images any of them was trained or validated on.
    images = load_images(str(data))
    drawn = [split(images, 40, seed, 30, test_seed=0) for seed in range(4)]
    assert all(a.test_y.equal(drawn[0].test_y) for a in drawn)
    pixels = [_pixels(a.test_x, a) for a in drawn]
    for other in drawn:
        seen = np.concatenate([_pixels(other.train_x, other), _pixels(other.validation_x, other)])
        assert np.allclose(_pixels(other.test_x, other), pixels[0], atol=1e-5)
        assert np.abs(seen[:, None] - pixels[0]).max(axis=2).min() > 1e-3
    assert not drawn[1].train_y.equal(drawn[2].train_y)
    plain = split(images, 40, 0, 30)
    assert plain.train_x.equal(drawn[0].train_x)
    # And the nets that were confirmed had it.
    assert all(s.test_y.equal(drawn[0].test_y) for tested, s in splits if tested)


def _pixels(x: torch.Tensor, of: Any) -> np.ndarray:
    return (x * of.std.view(1, -1, 1, 1) + of.mean.view(1, -1, 1, 1)).flatten(1).numpy()


def test_the_best_is_confirmed_beside_the_base_on_fresh_seeds(
    data: Path, tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = trained(bowl)
    given = [*TWO, "--seeds", 2, "--prune", "none"]
    assert main(command(data, tmp_path, *given, "--trials", 2, "--confirm", 3)) == 0
    best = Recipe(model="mlp", epochs=EPOCHS, dropout=0.5, mixup=0.2)
    base = Recipe(model="mlp", epochs=EPOCHS)
    fresh = [s for s in seen if s[2]]
    assert fresh == [(recipe, seed, True) for seed in (2, 3, 4) for recipe in (base, best)]
    confirmed = results(tmp_path)["confirmed"]
    assert confirmed["seeds"] == [2, 3, 4]
    gain = (bowl(base, 0, EPOCHS) - bowl(best, 0, EPOCHS)) / 10
    effect = confirmed["effects"]["test_accuracy"]
    assert [effect[key] for key in ("mean", "low", "high")] == pytest.approx([gain] * 3)
    assert confirmed["effects"]["seconds_per_epoch"]["mean"] == 1.0
    assert f"{100 * gain:+.2f}" in capsys.readouterr().out
    # A longer search finds a better one, for which the base is not trained again.
    assert main(command(data, tmp_path, *given, "--trials", 8, "--confirm", 3)) == 0
    more = [s for s in seen if s[2]][6:]
    assert {s[1] for s in more} == {2, 3, 4}
    assert len(more) == 3
    assert all(recipe != base for recipe, _, _ in more)


def test_folds_are_a_seeds_one_value(data: Path, tmp_path: Path, trained: Any) -> None:
    seen = trained(bowl)
    argv = command(data, tmp_path, *TWO, "--folds", 3, "--trials", 2, "--confirm", 2)
    at = argv.index("--validation-size")
    assert main(argv[:at] + argv[at + 2 :]) == 0
    assert len(seen) == 2 * 3 + 2 * 3 * 2
    found = results(tmp_path)
    assert len(found["best"]["trainings"]) == 3
    assert [*found["confirmed"]["effects"]["test_accuracy"]["seeds"]] == ["1", "2"]
    assert "--validation-size" not in found["best"]["command"]


def test_where_nothing_is_better_there_is_nothing_to_confirm(
    data: Path, tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = trained(lambda recipe, seed, epoch: 1 + recipe.dropout)
    given = ["--trials", 8, "--methods", "dropout", "--confirm", 2]
    assert main(command(data, tmp_path, *given)) == 0
    # What was drawn again is not trained again.
    assert len(losses(tmp_path)) == 8
    assert 1 < len(seen) == len({recipe for recipe, _, _ in seen}) < 8
    assert results(tmp_path)["confirmed"] is None
    assert "nothing that was tried is better than the net without" in capsys.readouterr().out


def test_where_no_loss_is_finite_nothing_is_found(
    data: Path, tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(lambda recipe, seed, epoch: math.nan)
    assert main(command(data, tmp_path, "--trials", 3, "--confirm", 2)) == 1
    assert "no trial ended with a finite loss" in capsys.readouterr().out
    assert not (tmp_path / "recipe.toml").exists()
    assert results(tmp_path)["best"] is None


def test_importances(data: Path, tmp_path: Path, trained: Any, capsys: Any) -> None:
    trained(bowl)
    # Of which some are ended early.
    given = [*TWO, "--search", "random"]
    assert main(command(data, tmp_path, *given, "--trials", 19)) == 0
    assert results(tmp_path)["importances"] is None
    assert "importances take 20 trials" in capsys.readouterr().out
    assert main(command(data, tmp_path, *given, "--trials", 20)) == 0
    found = results(tmp_path)["importances"]
    assert found["dropout"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    assert f"{found['dropout']:.0%}" in capsys.readouterr().out


@pytest.mark.parametrize("prune", ["median", "hyperband", "none"])
def test_bad_trials_are_ended_early_but_not_too_early(
    data: Path, tmp_path: Path, trained: Any, prune: str
) -> None:
    trained(bowl)
    given = ["--trials", 16, "--epochs", 40, "--prune", prune, "--search", "random"]
    assert main(command(data, tmp_path, *TWO, *given)) == 0
    trials = results(tmp_path)["trials"]
    ended = [t for t in trials if t["pruned"]]
    assert bool(ended) == (prune != "none")
    assert not any(t["trainings"] for t in ended)
    for trial in ended:
        (*_, last), recipe = sorted(map(int, trial["losses"])), Recipe(**trial["recipe"])
        assert trial["losses"][str(last)] == bowl(recipe, 0, last)
        assert last < 40
        assert last % 2 == 0  # twenty reports
        if prune == "median":
            assert last >= 20
    if prune == "none":
        assert not any(t["losses"] for t in trials)


def test_the_picture_shows_the_search(
    data: Path, tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(bowl)
    methods = "dropout,weight_decay,batch_norm,mixup,early_stopping"
    given = ["--methods", methods, "--trials", 14, "--epochs", 20, "--search", "random"]
    assert main(command(data, tmp_path, *given)) == 0
    found = results(tmp_path)
    _tune_results.draw(tmp_path / "a.png", found)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    _tune_results.draw(tmp_path / "a.png", found)
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == ["trial", *methods.split(",")]
    crosses, dots, best, base = panels[0].lines
    pruned = [t for t in found["trials"] if t["pruned"]]
    assert pruned
    assert list(crosses.get_xdata()) == [t["number"] for t in pruned]
    whole = [t["validation_loss"] for t in found["trials"] if not t["pruned"]]
    assert list(dots.get_ydata()) == whole
    assert list(best.get_ydata()) == list(np.minimum.accumulate(whole))
    assert base.get_ydata()[0] == found["base"]["validation_loss"]
    for axes, name in zip(panels[1:], methods.split(","), strict=True):
        ended, ran, star = axes.lines
        off = axes.get_xticks()[0]
        assert axes.get_xticklabels()[0].get_text() == "off"
        shown = [t["strengths"][name] or off for t in found["trials"] if not t["pruned"]]
        assert list(ran.get_xdata()) == shown
        assert list(star.get_ydata()) == [found["best"]["validation_loss"]]
        assert len(ended.get_xdata()) == len(pruned)
        assert off < min(x for x in [*shown, math.inf] if x != off)


def test_a_recipe_that_was_ended_early_is_tried_anew(
    data: Path, tmp_path: Path, trained: Any
) -> None:
    seen = trained(lambda recipe, seed, epoch: 1 + recipe.early_stopping + 1 / epoch)
    given = ["--methods", "early_stopping", "--range", "early_stopping=5:9", "--trials", 24]
    assert main(command(data, tmp_path, *given, "--epochs", 20, "--search", "random")) == 0
    strengths: dict[bool, list[int]] = {True: [], False: []}
    for trial in results(tmp_path)["trials"]:
        strengths[trial["pruned"]].append(trial["strengths"]["early_stopping"])
    ended, whole = strengths[True], strengths[False]
    assert len(set(ended)) < len(ended)
    assert len(set(whole)) < len(whole)
    assert len(seen) == len(ended) + len(set(whole))


# Going on


def test_the_same_seed_is_the_same_search(data: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        given = ["--trials", 12, "--seed", seed, "--epochs", 1, *TWO]
        assert main(command(data, tmp_path / name, *given)) == 0
        found.append([t["strengths"] for t in results(tmp_path / name)["trials"]])
        found.append(losses(tmp_path / name))
    assert found[:2] == found[2:4]
    assert found[0][2] != found[4][2]  # the first that was drawn, when only the usual was known


def test_ctrl_c_and_the_same_command_again(
    data: Path, tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    count = itertools.count()

    def interrupting(recipe: Recipe, seed: int, epoch: int) -> float:
        if next(count) == 3 * EPOCHS + 1:
            raise KeyboardInterrupt
        return bowl(recipe, seed, epoch)

    seen = trained(interrupting)
    given = ["--trials", 5, "--prune", "none"]
    assert main(command(data, tmp_path, *given)) == 130
    assert capsys.readouterr().err.count("interrupted: the same command goes on") == 1
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["study.log"]
    assert main(command(data, tmp_path, *given)) == 0
    assert "3 trials done before" in capsys.readouterr().out
    assert len(seen) == 6
    assert seen[4] == seen[3]  # what was given back
    assert len({s[0] for s in seen}) == 5
    # Another search goes on with it as well.
    assert main(command(data, tmp_path, *given, "--trials", 7, "--search", "random")) == 0
    assert len(seen) == 8


def test_another_process_of_the_same_command(data: Path, tmp_path: Path, trained: Any) -> None:
    seen = trained(bowl)
    argv = command(data, tmp_path, "--trials", 4, "--confirm", 1)
    # It is sent there.
    tune._help(pickle.loads(pickle.dumps(plan_of(argv))), math.inf, 1)
    assert len(seen) == 4 + 2
    assert main(argv) == 0
    assert len(seen) == 6
    # It draws other numbers than the first one.
    drawn = [r for r, _, _ in seen[2:4]]
    main(command(data, tmp_path / "b", "--trials", 4))
    assert len(other := [r for r, _, _ in seen[8:]]) == 2
    assert not {*other} & {*drawn}


def test_a_crash_is_reported_at_the_end(
    data: Path, tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def crashing(recipe: Recipe, seed: int, epoch: int) -> float:
        if recipe.dropout == 0.5:
            raise RuntimeError("no more memory\nat all")
        return bowl(recipe, seed, epoch)

    trained(crashing)
    assert main(command(data, tmp_path, *TWO, "--trials", 3)) == 1
    assert "crashed: " in (said := capsys.readouterr().out)
    assert "RuntimeError: no more memory" in said
    (crashed,) = results(tmp_path)["crashed"]
    assert crashed["error"] == "RuntimeError: no more memory"
    assert len(losses(tmp_path)) == 2


# The budget


def test_no_trial_begins_that_would_not_end_within_the_budget(
    data: Path,
    tmp_path: Path,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = itertools.count()
    times: list[float] = []
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(tune, "_seconds_of_a_trial", lambda plan: 10.0)

    def timed(recipe: Recipe, seed: int, epoch: int) -> float:
        times.append(tune.time.monotonic())
        return bowl(recipe, seed, epoch)

    trained(timed)
    assert main(command(data, tmp_path, *TWO, "--budget", "2m")) == 0
    assert 2 < len(losses(tmp_path)) < 60
    assert 60 < times[-1] <= 120
    assert "left" not in capsys.readouterr().out
    grid = ["--search", "grid", *TWO, "--points", 9, "--trials", 200]
    for rest in (grid, [*TWO, "--trials", 200]):
        assert main(command(data, tmp_path, *rest, "--budget", "1m")) == 0
        left = results(tmp_path)["left"]
        assert 0 < left < 200
        assert f"trials left: {left}: the same command goes on" in capsys.readouterr().out
    assert left == 200 - len(losses(tmp_path))


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_budget_too_little_for_one_trial(
    data: Path, tmp_path: Path, epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["--epochs", epochs, "--seeds", 2, "--budget", "0.001s", "--distillation", 0.5]
    said = refusal(capsys, command(data, out, *given, "--methods", "dropout,distillation"))
    assert said.startswith("--budget 0.001s: is too little for one trial, which takes about ")
    assert not out.exists()


def test_the_time_of_a_trial_is_of_all_its_nets(
    data: Path, tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = trained(bowl)
    clock = itertools.count(0, 0.5)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    given = ["--epochs", 7, "--seeds", 3, "--methods", "dropout,distillation"]
    assert tune._seconds_of_a_trial(plan_of(command(data, tmp_path, *given))) == 0.5 * 7 * 3 * 2
    assert [(r.distillation, r.dropout, t) for r, _, t in seen] == [(0, 0.5, False)]


# Bad input


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    return streams.err.removeprefix("reg-kernels tune: ").rstrip("\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--methods dropuot", "--methods: there is no method 'dropuot': did you mean dropout?"),
        ("--methods ,", "--methods: must name at least one method, got none"),
        ("--methods drop_path", "--methods: drop_path goes with --model resnet, mixer, got mlp"),
        ("--trials 0", "--trials: must be at least 1, got 0"),
        ("--seeds 0", "--seeds: must be at least 1, got 0"),
        ("--points 0", "--points: must be at least 1, got 0"),
        ("--confirm -1", "--confirm: must be at least 0, got -1"),
        ("--seed -1", "--seed: must be in 0..4294967295, got -1"),
        ("--budget soon", "--budget: must be a time above 0, as 90s, 20m or 2h, got 'soon'"),
        ("--budget 0s", "--budget: must be a time above 0, as 90s, 20m or 2h, got '0s'"),
        (
            "--range dropout",
            "--range dropout: must be METHOD=LEAST:MOST, as in dropout=0.1:0.8",
        ),
        (
            "--range dropout=a:nan",
            "--range dropout=a:nan: must be METHOD=LEAST:MOST, as in dropout=0.1:0.8",
        ),
        (
            "--range l1=0.5:0.1",
            "--range l1=0.5:0.1: must have 0 < LEAST < MOST; that a method is off is tried too",
        ),
        (
            "--range l1=0:0.1",
            "--range l1=0:0.1: must have 0 < LEAST < MOST; that a method is off is tried too",
        ),
        ("--range dropout=0.1:1", "--range dropout=0.1:1: MOST must be below 1"),
        ("--range augment=1:4.5", "--range augment=1:4.5: MOST must be at most 4"),
        ("--range l1=1:inf", "--range l1=1:inf: MOST must be finite"),
        (
            "--range cutmix=0.1:1 --methods dropout,l1",
            "--range cutmix=0.1:1: must be of a method that is searched, of dropout, l1",
        ),
        (
            "--range dorpout=0.1:1",
            "--range dorpout=0.1:1: there is no method 'dorpout': did you mean dropout?",
        ),
        (
            "--range early_stopping=1.5:3 --methods early_stopping",
            "--range early_stopping=1.5:3: must be of whole numbers",
        ),
        (
            "--range batch_norm=0:1 --methods batch_norm",
            "--range batch_norm=0:1: batch_norm is there or not, without a strength",
        ),
        (
            "--search grid --methods dropout,l1,batch_norm --points 4 --trials 20",
            "--search grid: takes 50 trials (5 of dropout, 5 of l1, 2 of batch_norm), more than "
            "--trials 20: give fewer --methods, fewer --points or more --trials",
        ),
        ("--dropout 1", "--dropout: must be in [0, 1), got 1"),
        ("--storage study.txt", "--storage: must be a file that ends in .db"),
    ],
)
def test_bad_options(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    expected: str,
) -> None:
    out = tmp_path / "out"
    said = refusal(capsys, command(data, out, *options.split()))
    assert said.startswith(expected)
    assert not out.exists() or not list(out.iterdir())


def test_the_storage_of_another_search_or_none(
    data: Path, tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(bowl)
    argv = command(data, tmp_path, *TWO, "--trials", 1)
    assert main(argv) == 0
    for more, there, here in (
        (
            ["--range", "dropout=0.1:0.6"],
            "methods {'dropout': [0.2, 0.6],",
            "'dropout': [0.1, 0.6]",
        ),
        (["--seeds", "2"], "seeds 1 there", "2 here"),
        (["--label-smoothing", "0.1"], "label_smoothing 0.0 there", "0.1 here"),
    ):
        said = refusal(capsys, [*argv, *more])
        assert said.startswith(f"--storage {tmp_path / 'study.log'}: is of another study: {there}")
        assert here in said
    (tmp_path / "study.log").write_text("no journal\n")
    said = refusal(capsys, argv)
    assert said.startswith(f"--storage {tmp_path / 'study.log'}: must be a whole journal of Optuna")
