"""`train --parallel`: ranks train what one process trains, speak once, and end together."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import Ranks, running_ranks
from torch import distributed as dist

from reg_kernels import optim
from reg_kernels.cli import main, train
from reg_kernels.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3
KINDS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks() as pool:
        yield pool


class Said(tuple[int, str, str]):
    """Exit code, standard output and standard error of a command."""


def run(argv: Sequence[object], stop_at: int | None = None) -> tuple[int, str, str]:
    """Runs a command in this process; the optimizer's `stop_at`-th step is interrupted."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes longer than a tiny training.
        patch.setattr(train, "draw", lambda path, metrics: path.write_bytes(b"picture"))
        if stop_at is not None:
            interrupt(patch, stop_at)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def run_all(
    commands: Sequence[Sequence[object]], stop_at: int | None = None
) -> list[tuple[int, str, str]]:
    return [run(argv, stop_at) for argv in commands]


def interrupt(patch: pytest.MonkeyPatch, step: int) -> None:
    original, done = optim.AdamW.step, 0

    def stepping(self: optim.AdamW) -> None:
        nonlocal done
        done += 1
        if done >= step:
            raise KeyboardInterrupt
        original(self)

    patch.setattr(optim.AdamW, "step", stepping)


def command(data: Path, out: Path, *more: object) -> list[object]:
    options = ["--data", data, "--out", out, "--device", "cpu", "--train-size", 70]
    return ["train", *options, "--epochs", EPOCHS, "--time-epochs", 0, *more]


def metrics_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(out / "model.pt", weights_only=True)
    return found


def assert_close(out: Path, expected: Path) -> None:
    """The same training, but for the order in which sums round."""
    found, like = metrics_of(out), metrics_of(expected)
    for runs in ("runs", "teachers"):
        assert found[runs].keys() == like[runs].keys()
        for name, run in found[runs].items():
            twin = like[runs][name]
            assert len(run["history"]) == len(twin["history"])
            rows = zip(
                [*run["history"], run["final"]], [*twin["history"], twin["final"]], strict=True
            )
            for row, other in rows:
                for measure, value in row.items():
                    tolerance = {"abs": 0.021} if "accuracy" in measure else {"rel": 1e-3}
                    if measure in ("gap", "zeros") or measure.endswith("ece"):
                        continue
                    assert value == pytest.approx(other[measure], **tolerance), (name, measure)
    weights, others = weights_of(out), weights_of(expected)
    assert list(weights) == list(others)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-2, atol=2e-3)


def assert_same_bits(out: Path, expected: Path) -> None:
    found, like = metrics_of(out), metrics_of(expected)
    assert found["runs"] == like["runs"]
    weights, others = weights_of(out), weights_of(expected)
    assert list(weights) == list(others)
    assert all(value.equal(others[name]) for name, value in weights.items())


EVERYTHING = {
    "conv": Recipe(
        dropout=0.3, noise=0.1, l2=0.01, weight_decay=0.1, label_smoothing=0.1, batch_size=16
    ),
    "resnet": Recipe(model="resnet", drop_path=0.4, adversarial=0.1, batch_size=32),
    "mlp": Recipe(
        model="mlp",
        batch_norm=False,
        input_dropout=0.1,
        l1=0.01,
        augment=0.5,
        early_stopping=1,
        distillation=0.5,
        adversarial=0.1,
        batch_size=16,
    ),
    "mixer": Recipe(model="mixer", drop_path=0.2, dropout=0.2, batch_size=16),
}
