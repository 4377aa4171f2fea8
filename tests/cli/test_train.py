"""The `train` command: what it writes, what resuming continues, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import errno
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from reg_kernels import backends, nn, optim
from reg_kernels.augment import MixedTarget
from reg_kernels.cli import _files, _train_checkpoint, main, train
from reg_kernels.cli._data import load_images, split
from reg_kernels.cli._trainer import by_torch, fused, training
from reg_kernels.cli._trainer import checkpoint as checkpoints
from reg_kernels.cli._trainer.models import build_model
from reg_kernels.functional import mixup
from reg_kernels.training import Recipe

from support import run_program

RESULTS = ["curves.png", "metrics.json", "model.pt", "recipe.toml"]
EPOCHS = 3
STEPS = 2 * EPOCHS  # of each net: 70 images make two batches


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny training; one test looks at the picture."""
    monkeypatch.setattr(train, "draw", lambda path, metrics: path.write_bytes(b"picture"))


def command(data: Path, out: Path, *more: object) -> list[str]:
    options = ["--data", data, "--out", out, "--device", "cpu", "--train-size", 70]
    return ["train", *map(str, [*options, "--epochs", EPOCHS, "--time-epochs", 0, *more])]


def results(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All that two runs of one result share: the times are left out."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["seconds_per_epoch"]
    return metrics, torch.load(out / "model.pt", weights_only=True)


def assert_same_bits(first: Path, second: Path) -> None:
    (metrics, model), (other_metrics, other_model) = results(first), results(second)
    assert metrics == other_metrics
    assert model.keys() == other_model.keys()
    for name, value in model.items():
        assert value.equal(other_model[name]), name


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("reg-kernels train: ")
    assert streams.err.count("\n") == 1
    return streams.err.removeprefix("reg-kernels train: ").rstrip("\n")


# What it writes


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_the_files_agree_with_a_net_of_pytorchs_own_layers(
    data: Path,
    tmp_path: Path,
    kernels: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "a" / "b"
    # A clock that goes on by two and a half seconds with each look at it.
    clock = SimpleNamespace(perf_counter=itertools.count(0, 2.5).__next__)
    monkeypatch.setattr(training, "time", clock)
    assert main(command(data, out, "--kernels", kernels, "--time-epochs", 1)) == 0
    assert sorted(path.name for path in out.iterdir()) == RESULTS

    metrics, weights = results(out)
    pair = split(load_images(str(data)), 70, 0)
    net = build_model(Recipe(), (1, 6, 5), 3, torch.nn.Dropout)
    net.load_state_dict(weights)
    net.eval()
    final = metrics["runs"]["regularised"]["final"]
    for part, x, y in (
        ("train", pair.train_x, pair.train_y),
        ("test", pair.test_x, pair.test_y),
    ):
        with torch.no_grad():
            scores = net(x)
        assert final[f"{part}_accuracy"] == (scores.argmax(1) == y).double().mean().item()
        assert final[f"{part}_loss"] == pytest.approx(F.cross_entropy(scores, y).item(), rel=1e-5)
    for run in metrics["runs"].values():
        assert [row.pop("epoch") for row in run["history"]] == list(range(1, EPOCHS + 1))
        gap = run["final"].pop("gap")
        assert gap == run["final"]["train_accuracy"] - run["final"]["test_accuracy"]
        assert run["final"].items() >= run["history"][-1].items()
    assert metrics["options"]["kernels"] == kernels
    assert metrics["versions"]["torch"] == torch.__version__

    seconds = json.loads((out / "metrics.json").read_text())["seconds_per_epoch"]
    for name in ("plain", "regularised"):
        assert seconds[name] == {"eager": 2.5, "fused": 2.5}
    table = capsys.readouterr().out
    assert f"({backends.choose('dropout', 'cpu', torch.float32)})" in table
    assert f"{final['test_accuracy']:.2%}" in table
    assert table.count("2.5000") == 4


def test_the_picture_shows_both_nets(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    assert main(command(data, tmp_path)) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    metrics, _ = results(tmp_path)
    for axes, measure in zip(drawn[0].axes, ("accuracy", "loss"), strict=True):
        lines = {line.get_label().split(" (")[0]: line for line in axes.lines}
        for name, run in metrics["runs"].items():
            for part in ("train", "test"):
                expected = [row[f"{part}_{measure}"] for row in run["history"]]
                assert list(lines.pop(f"{name}, {part}").get_ydata()) == expected
        assert not lines


def test_a_loss_that_ran_away_is_null_in_json() -> None:
    rows = {"history": [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": 0.5}]}
    assert _files.without_nan(rows) == {"history": [{"loss": None}, {"loss": None}, {"loss": 0.5}]}


@pytest.mark.usefixtures("no_plot")
def assert_alike(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Both trained the same net on the same batches; sums may round in another order."""
    for epoch, its_twin in zip(run["history"], other["history"], strict=True):
        assert epoch == pytest.approx(its_twin, rel=0.01, abs=1e-3)


class TestResult:
    """What the result depends on, and what it does not."""

    def test_the_seed_alone_and_not_the_timing(self, data: Path, tmp_path: Path) -> None:
        for name, more in (
            ("first", ()),
            ("again", ("--time-epochs", 1)),
            ("other", ("--seed", 1)),
        ):
            assert main(command(data, tmp_path / name, *more)) == 0
        assert_same_bits(tmp_path / "first", tmp_path / "again")
        first, other = (results(tmp_path / name)[1] for name in ("first", "other"))
        assert not first["0.weight"].equal(other["0.weight"])

    def test_fused_layers_round_and_draw_otherwise_and_change_nothing_else(
        self, data: Path, tmp_path: Path
    ) -> None:
        for kernels in ("eager", "fused"):
            assert main(command(data, tmp_path / kernels, "--kernels", kernels)) == 0
        (eager, eager_model), (fused, fused_model) = (
            results(tmp_path / kernels) for kernels in ("eager", "fused")
        )
        assert_alike(eager["runs"]["plain"], fused["runs"]["plain"])
        assert not eager_model["9.weight"].equal(fused_model["9.weight"])

    @pytest.mark.skipif(
        backends.why_not("native", "cpu", torch.float32) is not None,
        reason="the native kernels are not built",
    )
    def test_every_implementation_trains_alike(self, data: Path, tmp_path: Path) -> None:
        for backend in ("native", "reference"):
            assert main(command(data, tmp_path / backend, "--backend", backend)) == 0
        native, reference = (results(tmp_path / name) for name in ("native", "reference"))
        for name, run in native[0]["runs"].items():
            assert_alike(run, reference[0]["runs"][name])
        assert native[0]["options"]["implementation"] == "native"
        for name, value in native[1].items():
            torch.testing.assert_close(value, reference[1][name], rtol=0.01, atol=1e-3)

    def test_both_nets_start_from_the_same_weights_and_only_one_is_regularised(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        starts, decays = [], []
        original = optim.AdamW.step

        def step(self: optim.AdamW) -> None:
            if not self.state:
                starts.append([p.detach().clone() for p in self.param_groups[0]["params"]])
                decays.append(self.param_groups[0]["weight_decay"])
            original(self)

        monkeypatch.setattr(optim.AdamW, "step", step)
        assert main(command(data, tmp_path)) == 0
        plain, regularised = starts
        assert all(a.equal(b) for a, b in zip(plain, regularised, strict=True))
        assert decays[0] == 0 < decays[1]
        runs = results(tmp_path)[0]["runs"]
        assert runs["plain"]["dropout"] == 0 < runs["regularised"]["dropout"] < 1
        for name in ("mixup", "label_smoothing"):
            assert runs["plain"][name] == 0 < runs["regularised"][name]

    @pytest.mark.parametrize("kernels", ["eager", "fused"])
    def test_each_batch_of_the_regularised_net_is_mixed(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
    ) -> None:
        targets: list[Any] = []
        start = training.Training._start

        def recording(*args: Any) -> training._Net:
            net = start(*args)
            loss = net.loss
            net.loss = lambda scores, target: (targets.append(target), loss(scores, target))[1]
            return net

        monkeypatch.setattr(training.Training, "_start", recording)
        assert main(command(data, tmp_path, "--kernels", kernels)) == 0
        assert len(targets) == 2 * STEPS
        assert all(isinstance(target, torch.Tensor) for target in targets[:STEPS])
        assert all(isinstance(target, MixedTarget) for target in targets[STEPS:])
        assert len({float(target.lam) for target in targets[STEPS:]}) == STEPS


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_a_residual_net_with_stochastic_depth_noise_and_attacks(
    data: Path,
    tmp_path: Path,
    kernels: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = ["--kernels", kernels, "--model", "resnet", "--train-size", 40]
    regularising = ["--drop-path", 0.5, "--noise", 0.3, "--adversarial", 0.5]
    rates: list[list[float]] = []
    seen: list[torch.Tensor] = []
    build = training.build_model

    def building(*given: Any) -> torch.nn.Sequential:
        net = build(*given)
        drops = [block.drop_path for block in net if hasattr(block, "drop_path")]
        rates.append([getattr(d, "drop_prob", getattr(d, "p", None)) for d in drops])
        net[0].register_forward_pre_hook(lambda layer, given: seen.extend(given))
        return net

    monkeypatch.setattr(training, "build_model", building)
    drawn: list[dict[str, Any]] = []

    def draw(path: Path, metrics: dict[str, Any]) -> None:
        drawn.append(metrics)
        path.write_bytes(b"picture")

    monkeypatch.setattr(train, "draw", draw)
    assert main(command(data, tmp_path / "without", *more, "--noise", 3)) == 0
    assert "attacked" not in capsys.readouterr().out
    # However much noise there is, an image keeps to the pixels that the data have.
    images = split(load_images(str(data)), 40, 0)
    pixels = torch.cat(seen) * images.std + images.mean
    assert [pixels.min(), pixels.max()] == pytest.approx([images.lower, images.upper])
    assert (pixels > images.upper - 1e-4).sum() > 100
    for name in ("first", "second"):
        assert main(command(data, tmp_path / name, *more, *regularising)) == 0
        assert "test attacked" in capsys.readouterr().out
    assert_same_bits(tmp_path / "first", tmp_path / "second")
    assert rates[0] == [0] * 6
    assert rates[-1] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    runs = results(tmp_path / "first")[0]["runs"]
    for name, run in runs.items():
        assert run["drop_path"] == (0.5 if name == "regularised" else 0)
        assert len(run["history"]) == EPOCHS
        assert all(0 <= row["attacked_accuracy"] <= 1 for row in run["history"])
    # What is looked at under attack changes nothing of the plain net's training.
    plain = results(tmp_path / "without")[0]["runs"]["plain"]["history"]
    for row, other in zip(runs["plain"]["history"], plain, strict=True):
        assert {**other, "attacked_accuracy": row["attacked_accuracy"]} == row
    assert "attacked_accuracy" in drawn[-1]["runs"]["plain"]["final"]


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_augmented_nets_of_several_seeds(
    data: Path, tmp_path: Path, kernels: str, capsys: pytest.CaptureFixture[str], no_plot: None
) -> None:
    more = ["--kernels", kernels, "--train-size", 40]
    assert main(command(data, tmp_path / "one", *more)) == 0
    capsys.readouterr()
    for name in ("first", "second"):
        assert main(command(data, tmp_path / name, *more, "--augment", "--seeds", 2)) == 0
    said = capsys.readouterr().out
    assert "means of 2 seeds" in said
    assert "augmented against regularised, on the test set: " in said
    assert_same_bits(tmp_path / "first", tmp_path / "second")
    runs = results(tmp_path / "first")[0]["runs"]
    assert [(run["recipe"], run["seed"], bool(run["augment"])) for run in runs.values()] == [
        (recipe, seed, recipe == "augmented")
        for seed in (0, 1)
        for recipe in ("plain", "regularised", "augmented")
    ]
    # One seed's nets are what they are alone, and the augmented one is no other by its seed alone.
    alone = results(tmp_path / "one")[0]["runs"]
    for name in ("plain", "regularised"):
        assert runs[f"{name}, seed 0"]["history"] == alone[name]["history"]
    losses = [run["final"]["train_loss"] for run in runs.values()]
    assert len(set(losses)) == 6


def test_augmented_images_are_the_same_in_any_order(data: Path) -> None:
    pair = split(load_images(str(data)), 70, 0)
    pipeline = fused.pipeline(1.0, pair, 3, None)
    numbers = torch.tensor([5, 0, 7, 9])
    batch = pipeline(pair.train_x[numbers], numbers, 2)
    for row, number in enumerate(numbers.tolist()):
        again = pipeline(pair.train_x[number : number + 1], torch.tensor([number]), 2)
        assert torch.equal(batch[row], again[0])
    other = pipeline(pair.train_x[numbers], numbers, 3)
    assert not torch.equal(batch, other)


def test_pytorchs_own_augmentation_moves_and_erases_as_ours_does() -> None:
    """In the mean over many draws, of a bright square in the middle."""
    image = torch.zeros(1, 1, 12, 12)
    image[..., 4:8, 4:8] = 1.0
    pair = SimpleNamespace(lower=0.0, mean=torch.zeros(1), std=torch.ones(1))
    n = 4000
    means = []
    for run in (by_torch.augment_by_torch(1.0, pair, 0), fused.pipeline(1.0, pair, 0, None)):
        found = run(image.expand(n, 1, 12, 12), torch.arange(n), 0)
        assert found.shape == (n, 1, 12, 12)
        means.append(found.mean(0)[0])
    assert means[0].sum() == pytest.approx(means[1].sum().item(), rel=0.03)
    assert (means[0] - means[1]).abs().max() < 0.06


def test_both_kinds_of_kernels_attack_alike(data: Path) -> None:
    pair = split(load_images(str(data)), 70, 0)
    model = build_model(Recipe(), (1, 6, 5), 3, torch.nn.Dropout).eval()
    images, labels, loss = pair.test_x, pair.test_y, by_torch.loss_by_torch(0.0)
    attacks = [by_torch.attack_by_torch(0.3, pair), fused.fused_attack(0.3, pair, None)]
    scale = pair.std.view(1, -1, 1, 1)
    found = []
    for attack in attacks:
        torch.manual_seed(0)
        adv = attack(model, images, labels, loss)
        assert ((adv - images) * scale).abs().max() <= 0.3 * (1 + 1e-5)
        found.append(loss(model(adv), labels).item())
    assert found[0] > loss(model(images), labels).item()
    assert found == pytest.approx([found[0]] * 2, rel=0.05)


@pytest.mark.parametrize("size", [2, Recipe().batch_size + 1])
def test_images_of_one_pixel_train_with_no_batch_of_a_single_one(tmp_path: Path, size: int) -> None:
    y = np.arange(140) % 2
    x = np.random.default_rng(0).integers(0, 256, (140, 3, 1, 1), dtype=np.uint8)
    np.savez(tmp_path / "dots.npz", x=x, y=y)
    argv = command(tmp_path / "dots.npz", tmp_path / "out", "--train-size", size, "--epochs", 1)
    assert main(argv) == 0


def test_pytorchs_own_mixup_and_loss_are_those_of_the_fused_kernels() -> None:
    images, labels = torch.randn(5, 1, 3, 3), torch.tensor([2, 0, 1, 1, 3])
    state = torch.get_rng_state()
    mixed, target = by_torch.mix_by_torch(0.4)(images, labels)
    torch.set_rng_state(state)
    again, _ = by_torch.mix_by_torch(0.4)(images, labels)
    assert mixed.equal(again)
    assert 0 < target.lam < 1
    torch.testing.assert_close(mixed, mixup(images, target.lam, backend="reference"))
    scores = torch.randn(5, 4)
    for smoothing in (0.0, 0.1):
        ours = nn.CrossEntropyLoss(label_smoothing=smoothing, backend="reference")
        theirs = by_torch.loss_by_torch(smoothing)
        torch.testing.assert_close(theirs(scores, target), ours(scores, target))
        torch.testing.assert_close(theirs(scores, labels), ours(scores, labels))


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_pytorchs_own_mixing_mixes_labels_as_it_mixes_pixels(alphas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    images, labels = torch.zeros(4, 1, 8, 8), torch.arange(4)
    images[0] = 1.0
    mix, kinds = by_torch.mix_by_torch(*alphas), set()
    for _ in range(20):
        mixed, target = mix(images, labels)
        assert mixed[0].mean().item() == pytest.approx(target.lam, abs=1e-6)
        assert mixed[3].mean().item() == pytest.approx(1 - target.lam, abs=1e-6)
        kinds.add("paste" if bool(((mixed == 0) | (mixed == 1)).all()) else "blend")
    assert "blend" in kinds or alphas[0] == 0
    assert "paste" in kinds or alphas[1] == 0
    assert len(kinds) == (alphas[0] > 0) + (alphas[1] > 0)


def test_pytorchs_own_distillation_and_l1_are_those_of_the_fused_kernels() -> None:
    recipe = Recipe(
        distillation=0.3, temperature=3.0, label_smoothing=0.1, l1=0.5, weight_decay=1.0
    )
    kinds = [by_torch.BY_TORCH, fused.fused_kernels("reference")]
    scores, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([2, 0, 1, 1, 3])
    losses = [kernels.distill(recipe)(scores, teacher, labels) for kernels in kinds]
    torch.testing.assert_close(*losses)
    models = []
    for kernels in kinds:
        torch.manual_seed(0)
        models.append(model := torch.nn.Linear(30, 20))
        optimizer = kernels.optimizer(model, recipe)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 30)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(*(dict(model.named_parameters()) for model in models))
    assert (models[0].weight == 0).sum() > 10


@pytest.mark.parametrize(
    ("model", "kernels"), [("conv", "eager"), ("mlp", "fused"), ("mixer", "fused")]
)
def test_every_method_at_once(
    data: Path, tmp_path: Path, no_plot: None, kernels: str, model: str
) -> None:
    """Interrupted in the teacher and in the student, which stops early, it ends alike."""
    text = Recipe(model=model, epochs=EPOCHS, batch_norm=model == "conv", input_dropout=0.1)
    text = dataclasses.replace(text, l2=0.1, cutmix=1.0, early_stopping=1, distillation=0.5)
    text = dataclasses.replace(text, l1=0.1, noise=0.1, augment=0.5, mixup=0.1)
    if model == "conv":
        text = dataclasses.replace(text, adversarial=0.1)
    (tmp_path / "my.toml").write_text(text.to_toml())
    given = ["--kernels", kernels, "--recipe", tmp_path / "my.toml", "--validation-size", 10]
    given += ["--train-size", 40]  # one batch, one step of an epoch
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(data, whole, *given)) == 0
    assert Recipe.from_toml((whole / "recipe.toml").read_text()) == text
    metrics, _ = results(whole)
    assert list(metrics["runs"]) == ["plain", "regularised"]
    assert list(metrics["teachers"]) == ["teacher of regularised"]
    final = metrics["runs"]["regularised"]["final"]
    assert final["zeros"] > 0
    best = metrics["runs"]["regularised"]["history"][int(final["best_epoch"]) - 1]
    assert (final | {"epoch": best["epoch"]}).items() >= best.items()
    resume: list[object] = []
    for step in (EPOCHS + 2, 2):
        with pytest.MonkeyPatch.context() as monkeypatch:
            at_step(monkeypatch, step, KeyboardInterrupt)
            assert main(command(data, parts, *given, *resume)) == 130
        resume = ["--resume"]
    assert main(command(data, parts, *given, *resume)) == 0
    assert_same_bits(whole, parts)


def test_tensorboard_has_the_curves(
    data: Path, tmp_path: Path, no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    argv = command(data, tmp_path, "--tensorboard")
    assert main(argv) == 0  # what an earlier training left is no matter
    restore = at_step(monkeypatch, STEPS + 4, KeyboardInterrupt)
    assert main(argv) == 130
    restore()
    assert main([*argv, "--resume"]) == 0
    for name, run in results(tmp_path)[0]["runs"].items():
        found = events.EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        losses = found.Scalars("test/loss")
        assert [event.step for event in losses] == [1, 2, 3]
        expected = [row["test_loss"] for row in run["history"]]
        assert [event.value for event in losses] == pytest.approx(expected)


# Interrupting and resuming


def at_step(
    monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]
) -> Callable[[], None]:
    """Makes the optimizer's `step`-th update from now on, and all after it, raise."""
    done = 0
    originals = {kind: kind.step for kind in (optim.AdamW, torch.optim.AdamW)}

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: torch.optim.Optimizer, closure: None = None) -> None:
            nonlocal done
            done += 1
            if done >= step:
                raise error
            original(self)

        return wrapped

    def undo() -> None:
        for kind, original in originals.items():
            monkeypatch.setattr(kind, "step", original)

    for kind, original in originals.items():
        monkeypatch.setattr(kind, "step", wrap(original))
    return undo


@pytest.fixture(scope="session")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def run(kernels: str) -> Path:
        if kernels not in done:
            done[kernels] = tmp_path_factory.mktemp(kernels)
            assert main(command(data, done[kernels], "--kernels", kernels)) == 0
        return done[kernels]

    return run


@pytest.mark.usefixtures("no_plot")
class TestResume:
    @pytest.mark.parametrize("kernels", ["eager", "fused"])
    @pytest.mark.parametrize(
        "step",
        [1, 4, STEPS, STEPS + 1, STEPS + 4, 2 * STEPS],
        ids=["first", "plain", "plain-end", "regularised-first", "regularised", "last"],
    )
    def test_ctrl_c_anywhere_changes_nothing(
        self,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        uninterrupted: Callable[[str], Path],
        kernels: str,
        step: int,
    ) -> None:
        expected = uninterrupted(kernels)
        argv = command(data, tmp_path, "--kernels", kernels)
        restore = at_step(monkeypatch, step, KeyboardInterrupt)
        assert main(argv) == 130
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
        assert "--resume" in capsys.readouterr().err
        restore()
        torch.manual_seed(12345)  # a new process starts from another random state
        assert main([*argv, "--resume"]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == RESULTS
        assert_same_bits(tmp_path, expected)

    def test_no_finished_epoch_is_trained_again(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        restore = at_step(monkeypatch, STEPS + 4, KeyboardInterrupt)
        assert main(command(data, tmp_path)) == 130
        restore()
        # One epoch of the second net was whole: its two others are left, of two steps each.
        restore = at_step(monkeypatch, 5, KeyboardInterrupt)
        assert main(command(data, tmp_path, "--resume")) == 0
        restore()

    def test_again_and_again_and_from_another_path(
        self,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        uninterrupted: Callable[[str], Path],
    ) -> None:
        expected = uninterrupted("fused")
        resume: list[object] = []
        for _ in range(4):
            restore = at_step(monkeypatch, 4, KeyboardInterrupt)
            assert main(command(data, tmp_path / "first", *resume)) == 130
            restore()
            resume = ["--resume"]
        elsewhere = tmp_path / "kept.pt"
        (tmp_path / "first" / "checkpoint.pt").rename(elsewhere)
        assert main(command(data, tmp_path / "second", "--resume", elsewhere)) == 0
        assert_same_bits(tmp_path / "second", expected)
        assert elsewhere.exists()

    def test_a_killed_run_resumes_from_the_last_checkpoint(
        self,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        uninterrupted: Callable[[str], Path],
    ) -> None:
        expected = uninterrupted("fused")
        monkeypatch.setattr(_train_checkpoint, "CHECKPOINT_EVERY", 0.0)
        restore = at_step(monkeypatch, STEPS + 4, SystemExit)
        with pytest.raises(SystemExit):
            main(command(data, tmp_path))
        restore()
        assert main(command(data, tmp_path, "--resume")) == 0
        assert_same_bits(tmp_path, expected)

    def test_ctrl_c_while_the_results_are_written_or_timed(
        self,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        uninterrupted: Callable[[str], Path],
    ) -> None:
        expected = uninterrupted("fused")

        def interrupt(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        for owner, name in ((training.Training, "time_epochs"), (train, "json_text")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupt)
                more = () if name == "time_epochs" else ("--resume",)
                assert main(command(data, tmp_path, "--time-epochs", 1, *more)) == 130
            assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
        assert main(command(data, tmp_path, "--resume")) == 0
        assert_same_bits(tmp_path, expected)

    def test_ctrl_c_before_any_training_leaves_nothing(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(source: str, image_size: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "load_images", interrupt)
        assert main(command(data, tmp_path / "out")) == 130
        assert not (tmp_path / "out").exists()


def test_a_real_ctrl_c_leaves_a_run_that_resumes_to_the_same_bits(
    data: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    # It comes from the process itself, since on a slow machine no other could tell that it trains.
    code = """
import os, signal, sys
import reg_kernels.optim as optim
from reg_kernels.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
step, steps = optim.AdamW.step, []
def step_and_interrupt(self):
    steps.append(step(self))
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGINT)
optim.AdamW.step = step_and_interrupt
sys.exit(main(sys.argv[1:]))
"""
    done = run_program(
        [sys.executable, "-c", code, *command(data, tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 130, done.stderr
    assert (
        done.stdout
        == "70 images to train on, 30 to test on, 3 classes; conv, fused kernels on cpu\n"
    )
    assert "Traceback" not in done.stderr
    assert f"add --resume to continue from {tmp_path / 'checkpoint.pt'}" in done.stderr
    assert main(command(data, tmp_path, "--resume")) == 0
    assert_same_bits(tmp_path, uninterrupted("fused"))


# What it refuses


@pytest.fixture(scope="session")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of `command(data, ...)`, interrupted in its second epoch."""
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_step(monkeypatch, 4, KeyboardInterrupt)
        assert main(command(data, out)) == 130
    return (out / "checkpoint.pt").read_bytes()


class Trap:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


ROW = {"train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": 0.5}
# Where a checkpoint of the second epoch, whose digest was made anew, is wrong, and how.
FORGED = [
    (("epoch",), 2),
    (("epoch",), EPOCHS + 1),
    (("epoch",), 1.0),
    (("epoch",), True),
    (("phase",), 2),
    (("phase",), False),
    (("phase",), 1),
    (("model",), {}),
    (("model", "0.weight"), lambda x: x.double()),
    (("model", "0.weight"), lambda x: x[:1]),
    (("model", "1.num_batches_tracked"), lambda x: x + 1),
    (("rng",), None),
    (("rng",), lambda x: x[:-1]),
    (("shuffle",), lambda x: x.to(torch.int64)),
    (("cuda_rng",), 0),
    (("unknown",), 0),
    (("history",), []),
    (("history", "plain"), [3.0]),
    (("history", "plain"), [[0.5] * 4]),
    (("history", "plain"), [ROW, ROW]),
    (("history", "plain"), [ROW | {"more": 1.0}]),
    (("history", "plain"), [ROW | {"train_loss": "low"}]),
    (("history", "plain"), [ROW | {"test_accuracy": 1.5}]),
    (("history", "plain"), [ROW | {"test_accuracy": float("nan")}]),
    (("history", "regularised"), [ROW]),
    (("results",), {"plain": {}}),
    (("early_stopping",), {}),
    (("teacher",), {}),
    (("optimizer", "state", 0, "step"), lambda x: x * float("nan")),
    (("optimizer", "state", 0, "step"), lambda x: x + 1),
    (("optimizer", "state", 0, "step"), 2.0),
    (("optimizer", "state", 0, "exp_avg"), None),
    (("optimizer", "state", 0, "exp_avg"), lambda x: x[0]),
    (("optimizer", "state", 0), {}),
    (("optimizer", "state"), {}),
    (("optimizer", "param_groups"), []),
    (("optimizer", "param_groups"), lambda x: [x[0] | {"betas": (0.9, 2.0)}]),
    (("optimizer", "param_groups"), lambda x: [x[0] | {"weight_decay": float("nan")}]),
    (("optimizer", "param_groups"), lambda x: [x[0] | {"params": [0]}]),
]


class TestRefusal:
    @pytest.mark.parametrize(
        ("more", "difference"),
        [
            (["--seed", 5], "seed 0 there, 5 here"),
            (["--epochs", 4], "epochs 3 there, 4 here"),
            (["--train-size", 71], "train-size 70 there, 71 here"),
            (["--kernels", "eager"], "kernels fused there, eager here"),
        ],
    )
    def test_a_checkpoint_of_another_run(
        self,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        checkpoint: bytes,
        more: list[object],
        difference: str,
    ) -> None:
        path = tmp_path / "c.pt"
        path.write_bytes(checkpoint)
        argv = command(data, tmp_path / "out", "--resume", path, *more)
        assert refusal(capsys, argv) == f"--resume: {path} is of another run: {difference}"
        assert not (tmp_path / "out").exists()

    def test_a_checkpoint_of_other_data(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: bytes
    ) -> None:
        path = tmp_path / "c.pt"
        path.write_bytes(checkpoint)
        with np.load(data) as arrays:
            np.savez(tmp_path / "tiny.npz", x=arrays["x"] + 1, y=arrays["y"])
        argv = command(tmp_path / "tiny.npz", tmp_path / "out", "--resume", path)
        assert "is of another run: data sha256" in refusal(capsys, argv)

    def test_a_damaged_checkpoint(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: bytes
    ) -> None:
        path = tmp_path / "c.pt"
        size = len(checkpoint)
        middle = bytearray(checkpoint)
        middle[size // 2] ^= 1  # within a weight: torch itself would load it
        other = tmp_path / "other.pt"
        torch.save({"weight": torch.zeros(3)}, other)
        for content in (
            b"",
            b"text",
            checkpoint[: size // 2],
            checkpoint[:-1],
            bytes(middle),
            other.read_bytes(),
        ):
            path.write_bytes(content)
            message = refusal(capsys, command(data, tmp_path / "out", "--resume", path))
            assert message == (
                "--resume: must name a whole checkpoint of `train`, "
                f"got a damaged or other file: {path}"
            )
            assert not (tmp_path / "out").exists()

    def test_a_checkpoint_that_runs_code(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({"format": Trap(tmp_path / "sprung")}, tmp_path / "c.pt")
        argv = command(data, tmp_path / "out", "--resume", tmp_path / "c.pt")
        assert refusal(capsys, argv).startswith("--resume: ")
        assert not (tmp_path / "sprung").exists()

    def test_a_sound_checkpoint_of_an_impossible_state(
        self,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        checkpoint: bytes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = tmp_path / "c.pt"
        path.write_bytes(checkpoint)
        options, state = checkpoints.load_checkpoint(path)
        argv = command(data, tmp_path / "out", "--resume", path)
        monkeypatch.setattr(training.Training, "run", lambda *a: pytest.fail("trains"))
        for keys, wrong in FORGED:
            forged = copy.deepcopy(state)
            inner = forged
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = wrong(inner.get(keys[-1])) if callable(wrong) else wrong
            checkpoints.save_checkpoint(path, options, forged)
            assert "got a damaged or other file" in refusal(capsys, argv), keys
        # What cannot even be looked at: terabytes of one number, and what has no numbers.
        with pytest.raises(ValueError, match="larger than what it is stored in"):
            checkpoints.digest({"model": torch.zeros(1).expand(10**12)})
        blob = {"format": checkpoints.FORMAT, "sha256": ""}
        for tensor in (torch.zeros(1).expand(10**12), torch.zeros(3).to_sparse()):
            content = {"options": options, "state": state | {"model": {"0.weight": tensor}}}
            torch.save(blob | {"content": content}, path)
            assert "got a damaged or other file" in refusal(capsys, argv)
        for name, value in (("seed", torch.zeros(2)), ("seed", 0.0), ("kernels", "a\nb")):
            checkpoints.save_checkpoint(path, options | {name: value}, state)
            assert "got a damaged or other file" in refusal(capsys, argv), name
        assert not (tmp_path / "out").exists()
        checkpoints.save_checkpoint(path, options, state)
        with pytest.raises(pytest.fail.Exception, match="trains"):
            main(argv)

    def test_a_checkpoint_that_is_not_there(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        expected = f"--resume: must name a checkpoint, got {out / 'checkpoint.pt'}: No such file"
        assert refusal(capsys, command(data, out, "--resume")).startswith(expected)
        assert not out.exists()

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--seed", -1], "--seed: must be in 0..4294967295, got -1"),
            (["--seed", 2**32], "--seed: must be in 0..4294967295, got 4294967296"),
            (["--epochs", 0], "--epochs: must be at least 1, got 0"),
            (["--time-epochs", -1], "--time-epochs: must be at least 0, got -1"),
            (["--train-size", -3], "--train-size: must be at least 1, got -3"),
            (["--train-size", 98], "--train-size: must be in 3..97 for 100 images of 3 classes"),
            (["--device", "toaster"], "--device must be cpu, cuda or cuda:N, got 'toaster'"),
            (["--device", "cpu:3"], "--device must be cpu, cuda or cuda:N, got 'cpu:3'"),
            (["--device", "cuda:99"], "--device cuda:99: torch sees "),
            (
                ["--kernels", "eager", "--backend", "native"],
                "--backend: goes with --kernels fused, got native with eager",
            ),
            (["--data", "missing.npz"], "--data missing.npz: cannot be read: No such file"),
            (["--drop-path", 1.5], "--drop-path: must be in [0, 1], got 1.5"),
            (["--dropout", 1], "--dropout: must be in [0, 1), got 1"),
            (["--batch-size", 0], "--batch-size: must be at least 1, got 0"),
            (["--augment", 5], "--augment: must be in [0, 4], got 5"),
            (["--recipe", "missing.toml"], "--recipe missing.toml: cannot be read: No such file"),
            (["--validation-size", -1], "--validation-size: must be at least 0, got -1"),
            (["--validation-size", 31], "--validation-size: must be in 3..27 for 100 images of 3"),
            (
                ["--early-stopping", 3, "--validation-size", 0],
                "--validation-size: must be at least 1 with --early-stopping, got 0",
            ),
            (["--seeds", 0], "--seeds: must be at least 1, got 0"),
            (["--noise", -1], "--noise: must be finite and at least 0, got -1"),
            (["--adversarial", "inf"], "--adversarial: must be finite and at least 0, got inf"),
            (
                ["--drop-path", 0.1, "--model", "conv"],
                "--drop-path: goes with the models resnet, mixer, got conv",
            ),
        ],
    )
    def test_options_that_cannot_be(
        self,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        more: list[object],
        message: str,
    ) -> None:
        assert refusal(capsys, command(data, tmp_path / "out", *more)).startswith(message)
        assert not (tmp_path / "out").exists()

    def test_a_backend_that_cannot_run_here(
        self,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        argv = command(data, tmp_path / "out", "--backend", "triton")
        message = refusal(capsys, argv)
        assert message.startswith("--backend triton cannot run on cpu: ")
        assert not (tmp_path / "out").exists()
        with backends.backend("triton"):
            message = refusal(capsys, command(data, tmp_path / "out"))
        assert message.startswith("REG_KERNELS_BACKEND=triton cannot run on cpu: ")

    def test_a_recipe_at_fault_is_blamed_and_not_an_option_that_is_right(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = tmp_path / "my.toml"
        recipe.write_text("epochs = 1e3")
        argv = command(data, tmp_path / "out", "--recipe", recipe, "--epochs", 3)
        expected = f"--recipe {recipe}: epochs must be of type int, got 1000.0 of type float"
        assert refusal(capsys, argv) == expected
        assert not (tmp_path / "out").exists()

    def test_an_out_that_cannot_be_written(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("mine")
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            expected = f"--out: must be a directory that can be written to, got {out}: "
            assert refusal(capsys, command(data, out)).startswith(expected)
        assert (tmp_path / "file").read_text() == "mine"
        (tmp_path / "out" / "metrics.json").mkdir(parents=True)
        expected = f"--out: {tmp_path / 'out' / 'metrics.json'} must be a file or free"
        assert refusal(capsys, command(data, tmp_path / "out")).startswith(expected)

    def test_a_folder_of_curves_that_cannot_be_made(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("tensorboard")
        (tmp_path / "tensorboard").write_text("mine")
        expected = f"--tensorboard: cannot write to {tmp_path / 'tensorboard'}: File exists"
        assert refusal(capsys, command(data, tmp_path, "--tensorboard")) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]

    def test_a_disk_that_fills_up_leaves_the_earlier_files(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
    ) -> None:
        (tmp_path / "curves.png").write_bytes(b"an earlier run's")

        def full(path: Path, metrics: object) -> None:
            path.write_bytes(b"half a pict")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(train, "draw", full)
        assert main(command(data, tmp_path)) == 2
        remedy = f"add --resume to continue from {tmp_path / 'checkpoint.pt'}"
        expected = f"got {tmp_path}: No space left on device; {remedy}\n"
        assert capsys.readouterr().err.endswith(expected)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png"]
        assert (tmp_path / "curves.png").read_bytes() == b"an earlier run's"
        # Nothing of the training is lost: what is left to do is to write.
        monkeypatch.setattr(train, "draw", lambda path, metrics: path.write_bytes(b"picture"))
        monkeypatch.setattr(training.Training, "_train_epoch", lambda *a: pytest.fail("trains"))
        assert main(command(data, tmp_path, "--resume")) == 0

    @pytest.mark.parametrize("stop", [None, KeyboardInterrupt])
    @pytest.mark.parametrize("resumed", [False, True])
    def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(
        self,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        checkpoint: bytes,
        stop: type[BaseException] | None,
        resumed: bool,
    ) -> None:
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(checkpoint)

        def full(path: Path, *content: object) -> None:
            path.write_bytes(b"half a checkp")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(_train_checkpoint, "save_checkpoint", full)
        if stop is None:
            monkeypatch.setattr(_train_checkpoint, "CHECKPOINT_EVERY", 0.0)
        else:
            at_step(monkeypatch, 1, stop)
        remedy = f"; add --resume to continue from {path}" if resumed else ""
        assert main(command(data, tmp_path, *["--resume"][: int(resumed)])) == 2
        expected = f"train: --out: must be a directory that can be written to, got {tmp_path}: "
        message = capsys.readouterr().err
        assert message == f"reg-kernels {expected}No space left on device{remedy}\n"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
        assert path.read_bytes() == checkpoint

    def test_what_a_killed_run_left_goes_when_the_next_one_starts(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in (".checkpoint-ab12_xyz.partial.pt", ".curves-ab12_xyz.partial.png"):
            (tmp_path / name).touch()
        at_step(monkeypatch, 1, KeyboardInterrupt)
        assert main(command(data, tmp_path)) == 130
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
