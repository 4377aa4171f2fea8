"""`train --parallel`: ranks train what one process trains, speak once, and end together.

Most runs are in the ranks of a pool, whose group the command takes; the last ones are torchrun's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_group import Ranks, running_ranks
from torch import distributed as dist
from two_hosts import NoHosts, running_hosts

from reg_kernels import optim
from reg_kernels.cli import _train_checkpoint, main, train
from reg_kernels.cli._trainer import parallel, training
from reg_kernels.training import Recipe

from support import run_program

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3
KINDS = ("ddp", "fsdp")
ROOT = Path(__file__).parents[2]
RESULTS = ["curves.png", "metrics.json", "model.pt", "recipe.toml"]
SIZES = "70 images to train on, 30 to test on, 3 classes"

# Exit code, standard output and standard error of a command.
Outcome = tuple[int, str, str]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks() as pool:
        yield pool


# What the ranks of the pool run


def run(argv: Sequence[object], stop_at: int | None = None) -> Outcome:
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


def interrupt(patch: pytest.MonkeyPatch, step: int) -> None:
    original, done = optim.AdamW.step, 0

    def stepping(self: optim.AdamW) -> None:
        nonlocal done
        done += 1
        if done >= step:
            raise KeyboardInterrupt
        original(self)

    patch.setattr(optim.AdamW, "step", stepping)


def run_all(commands: Sequence[tuple[Sequence[object], int | None]]) -> list[Outcome]:
    return [run(argv, stop_at) for argv, stop_at in commands]


def run_of_rank(commands: Sequence[Sequence[object]]) -> Outcome:
    return run(commands[dist.get_rank()])


def run_interrupted(argv: Sequence[object], rank: int, step: int) -> Outcome:
    return run(argv, step if dist.get_rank() == rank else None)


def run_with_nan(argv: Sequence[object], ranks: Sequence[int]) -> Outcome:
    """The images of these ranks turn into NaN in the second epoch."""
    original = training.Training._step

    def step(self: training.Training, net: Any, batch: torch.Tensor, epoch: int) -> None:
        if epoch == 1 and dist.get_rank() in ranks:
            self._parts["train"][0].fill_(float("nan"))
        original(self, net, batch, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "_step", step)
        return run(argv)


def run_unwritable(argv: Sequence[object]) -> Outcome:
    """No checkpoint can be written from the first epoch on."""

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_train_checkpoint, "CHECKPOINT_EVERY", 0.0)
        patch.setattr(_train_checkpoint, "save_checkpoint", full)
        return run(argv)


# What is compared


def command(data: Path, out: Path, *more: object) -> list[object]:
    options = ["--data", data, "--out", out, "--device", "cpu", "--train-size", 70]
    return ["train", *options, "--epochs", EPOCHS, "--time-epochs", 0, *more]


SMALL = ("--model", "mlp", "--no-batch-norm", "--batch-size", 16)  # five batches of 14


def results(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    metrics = json.loads((out / "metrics.json").read_text())
    return metrics, torch.load(out / "model.pt", weights_only=True)


def rows_of(metrics: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    runs = metrics["runs"] | metrics["teachers"]
    return {name: [*run["history"], run["final"]] for name, run in runs.items()}


def assert_close(out: Path, expected: Path, rel: float = 1e-5) -> None:
    """The same training, but for the order in which sums round."""
    (found, weights), (like, others) = results(out), results(expected)
    assert found["options"] == like["options"]
    rows, twins = rows_of(found), rows_of(like)
    assert rows.keys() == twins.keys()
    for name in rows:
        for row, twin in zip(rows[name], twins[name], strict=True):
            assert row == pytest.approx(twin, rel=rel, abs=rel / 10), name
    assert {name: x.shape for name, x in weights.items()} == {
        name: x.shape for name, x in others.items()
    }
    assert {type(x) for x in weights.values()} == {torch.Tensor}


def assert_same_bits(out: Path, expected: Path) -> None:
    (found, weights), (like, others) = results(out), results(expected)
    assert rows_of(found) == rows_of(like)
    assert list(weights) == list(others)
    assert all(value.equal(others[name]) for name, value in weights.items())


# One process and several

RECIPES = {
    "conv": Recipe(
        dropout=0.3, noise=0.1, l2=0.01, weight_decay=0.1, label_smoothing=0.1, batch_size=16
    ),
    "resnet": Recipe(model="resnet", drop_path=0.4, batch_size=35),
    "mlp": Recipe(
        model="mlp",
        batch_norm=False,
        input_dropout=0.1,
        l1=0.01,
        augment=0.5,
        early_stopping=1,
        distillation=0.5,
        batch_size=16,
    ),
    "mixer": Recipe(model="mixer", drop_path=0.2, dropout=0.2, batch_size=16),
    # By the sign of a gradient near zero, what rounds otherwise goes the other way.
    "attacked": Recipe(model="mlp", batch_norm=False, adversarial=0.3, batch_size=16),
    "fewer images than ranks": Recipe(
        model="mlp", batch_norm=False, dropout=0.5, distillation=0.5, l2=0.1, batch_size=2
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_train_what_one_process_trains(
    data: Path, tmp_path: Path, ranks: Ranks, name: str
) -> None:
    epochs = {"mlp": EPOCHS, "conv": 2}.get(name, 1)
    recipe = dataclasses.replace(RECIPES[name], epochs=epochs)
    (tmp_path / "my.toml").write_text(recipe.to_toml())
    given = ["--recipe", tmp_path / "my.toml", "--epochs", recipe.epochs]
    given += ["--validation-size", 10] if recipe.early_stopping else []
    assert run(command(data, tmp_path / "one", *given))[0] == 0
    for size in (2, 3):
        runs = [
            (command(data, tmp_path / f"{kind}{size}", *given, "--parallel", kind), None)
            for kind in KINDS
        ]
        first, *others = ranks(size, run_all, runs)
        for kind, (code, out, err) in zip(KINDS, first, strict=True):
            assert (code, err) == (0, "")
            assert f"on cpu, {kind} on {size} ranks\n" in out
            near = 0.05 if name == "attacked" else 1e-5
            assert_close(tmp_path / f"{kind}{size}", tmp_path / "one", near)
        assert others == [[(0, "", "")] * 2] * (size - 1)


def test_one_rank_trains_to_the_bits_of_one_process(
    data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    assert run(command(data, tmp_path / "one"))[0] == 0
    runs = [(command(data, tmp_path / kind, "--parallel", kind), None) for kind in KINDS]
    ranks(1, run_all, runs)
    for kind in KINDS:
        assert_same_bits(tmp_path / kind, tmp_path / "one")
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == RESULTS
        parallel = results(tmp_path / kind)[0]["parallel"]
        assert parallel == {"kind": kind, "ranks": 1}
    assert results(tmp_path / "one")[0]["parallel"] is None


# Interrupted and resumed


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_resumed_on_as_many_ranks_has_the_same_bits(
    data: Path, tmp_path: Path, ranks: Ranks, size: int
) -> None:
    """With mixup, whose partners are other ones on other numbers of ranks, and of an optimizer's
    state that is put back into shards or whole."""
    whole = [(command(data, tmp_path / kind, *SMALL, "--parallel", kind), None) for kind in KINDS]
    parts = []
    for first, second in zip(KINDS, reversed(KINDS) if size == 2 else KINDS, strict=True):
        argv = command(data, tmp_path / f"{first}, in parts", *SMALL)
        parts.append(([*argv, "--parallel", first], 7))
        parts.append(([*argv, "--parallel", second, "--resume"], 20))
        parts.append(([*argv, "--parallel", first, "--resume"], None))
    # A group is of no use once its ranks were interrupted.
    runs = [ranks(size, run, *each) for each in (*whole, *parts)]
    said, *others = [list(each) for each in zip(*runs, strict=True)]
    for (code, out, err), (argv, step) in zip(said, [*whole, *parts], strict=True):
        assert out.startswith(SIZES)
        path = Path(str(argv[4])) / "checkpoint.pt"
        remark = f"\ninterrupted: add --resume to continue from {path}\n"
        assert (code, err) == ((0, "") if step is None else (130, remark))
    for each in others:
        assert each == [(code, "", "") for code, *_ in said]
    for kind in KINDS:
        assert_same_bits(tmp_path / f"{kind}, in parts", tmp_path / kind)


def test_what_is_resumed_on_other_ranks_ends_alike(
    data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    given = [*SMALL, "--mixup", 0, "--early-stopping", 2, "--seeds", 2]
    assert run(command(data, tmp_path / "whole", *given))[0] == 0

    def go(size: int, out: str, *more: object, stop: int | None = None) -> None:
        argv = command(data, tmp_path / out, *given, *more)
        said = ranks(size, run_all, [(argv, stop)]) if "--parallel" in argv else [[run(argv, stop)]]
        assert {code for ((code, *_),) in said} == {0 if stop is None else 130}

    go(3, "a", "--parallel", "fsdp", stop=20)
    go(2, "a", "--parallel", "ddp", "--resume")
    go(2, "b", "--parallel", "fsdp", stop=7)
    go(1, "b", "--resume")
    go(1, "c", stop=20)
    go(3, "c", "--parallel", "ddp", "--resume")
    for out in "abc":
        assert_close(tmp_path / out, tmp_path / "whole")


def test_the_curves_are_of_the_first_rank(data: Path, tmp_path: Path, ranks: Ranks) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    argv = command(data, tmp_path, *SMALL, "--parallel", "ddp", "--tensorboard")
    ranks(2, run, argv)
    for name, run_ in results(tmp_path)[0]["runs"].items():
        (file,) = (tmp_path / "tensorboard" / name).iterdir()
        losses = events.EventAccumulator(str(file)).Reload().Scalars("test/loss")
        expected = [row["test_loss"] for row in run_["history"]]
        assert [event.value for event in losses] == pytest.approx(expected)


# What ends all ranks


def test_bad_input_is_said_once(data: Path, tmp_path: Path, ranks: Ranks) -> None:
    parallel = ["--parallel", "ddp"]
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    refused = {
        "--train-size: must be in 3..97 for 100 images of 3 classes, got 700": (
            *("--train-size", 700),
        ),
        f"--resume: must name a checkpoint, got {out / 'checkpoint.pt'}: "
        "No such file or directory": ("--resume",),
        "--kernels: must be fused with --parallel, since PyTorch has no SyncBatchNorm for the CPU, "
        "got eager": ("--kernels", "eager"),
        "--time-epochs: must be 0 with --parallel, got 2": ("--time-epochs", 2),
        "--device: must be cpu or cuda with --parallel, got cuda:1": ("--device", "cuda:1"),
        f"--out: must be a directory that can be written to, got {tmp_path / 'file'}: "
        "File exists": ("--out", tmp_path / "file"),
    }
    runs = [(command(data, out, *SMALL, *parallel, *more), None) for more in refused.values()]
    first, second = ranks(2, run_all, runs)
    assert first == [(2, "", f"reg-kernels train: {said}\n") for said in refused]
    assert second == [(2, "", "")] * len(refused)
    assert not out.exists()


def test_ranks_that_do_not_meet_are_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two, as where the other one was told that there are three, or of another port."""
    monkeypatch.setattr(parallel, "TIMEOUT", datetime.timedelta(seconds=5))
    started = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    argv = command(data, tmp_path / "out", *SMALL, "--parallel", "ddp")
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    start = "reg-kernels train: --parallel: must be started alike on all ranks, as torchrun does, "
    assert said.startswith(f"{start}got Timed out ")
    assert "1/2 clients joined" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_one_rank_alone_is_given_names_it(data: Path, tmp_path: Path, ranks: Ranks) -> None:
    other, missing = tmp_path / "other.npz", tmp_path / "missing.npz"
    with np.load(data) as arrays:
        np.savez(other, x=arrays["x"] + 1, y=arrays["y"])
    out, parallel = tmp_path / "out", ("--parallel", "fsdp")
    plain = command(data, out, *parallel)
    said = ranks(2, run_of_rank, [plain, command(missing, out, *parallel)])
    no_file = f"--data {missing}: cannot be read: No such file or directory (on rank 1)"
    assert said == [(2, "", f"reg-kernels train: {no_file}\n"), (2, "", "")]
    shas = [train.load_images(str(path)).sha256[:16] for path in (data, other)]
    differs = f"data_sha256 must be the same on all ranks, got {shas[0]} on rank 0, "
    said = ranks(2, run_of_rank, [plain, command(other, out, *parallel)])
    assert said == [(1, "", f"reg-kernels train: {differs}{shas[1]} on rank 1\n"), (1, "", "")]
    rate = [*plain, "--learning-rate", 0.5]
    said = ranks(3, run_of_rank, [rate, plain, plain])
    differs = "learning-rate must be the same on all ranks, got 0.5 on rank 0, 0.004 on ranks 1 "
    assert said[1:] == [(1, "", f"reg-kernels train: {differs}and 2\n"), (1, "", "")]
    assert said[0] == (1, "", "")
    assert not out.exists()


def test_a_loss_that_is_nan_on_one_rank_first_ends_all(
    data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    argv = command(data, tmp_path / "out", *SMALL, "--parallel", "ddp")
    first, second = ranks(2, run_with_nan, argv, [1])
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    assert first[0::2] == (
        1,
        "reg-kernels train: loss must be finite, got nan on rank 1 at step 1 of epoch 2 of plain; "
        f"add --resume to continue from {checkpoint}\n",
    )
    assert second == (1, "", "")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    # On all of them it goes on, as it does in one process.
    argv = command(data, tmp_path / "all", *SMALL, "--parallel", "ddp")
    assert ranks(2, run_with_nan, argv, [0, 1])[1] == (0, "", "")
    assert results(tmp_path / "all")[0]["runs"]["plain"]["history"][-1]["train_loss"] is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_interrupted_alone_ends_the_other(
    data: Path, tmp_path: Path, ranks: Ranks, rank: int
) -> None:
    argv = command(data, tmp_path, *SMALL, "--parallel", KINDS[rank])
    said = ranks(2, run_interrupted, argv, rank, 8)
    remedy = f"add --resume to continue from {tmp_path / 'checkpoint.pt'}\n"
    assert [code for code, *_ in said] == ([130, 1] if rank == 0 else [1, 130])
    blame = rf"reg-kernels train: rank {rank} raised KeyboardInterrupt, at \S+ in stepping"
    if rank == 0:
        assert said[0][2] == f"\ninterrupted: {remedy}"
        assert re.fullmatch(f"{blame}\n", said[1][2])
    else:
        assert re.fullmatch(f"{blame}; {re.escape(remedy)}", said[0][2])
        assert said[1] == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_ends_all(data: Path, tmp_path: Path, ranks: Ranks) -> None:
    first, second = ranks(2, run_unwritable, command(data, tmp_path, *SMALL, "--parallel", "ddp"))
    assert first[0] == second[0] == 2
    assert first[2].endswith(f"got {tmp_path}: No space left on device\n")
    assert second == (2, "", "")
    assert not list(tmp_path.iterdir())


# By torchrun


def torchrun(*words: object) -> list[object]:
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "reg_kernels"]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_ranks_of_torchrun_do_not_train_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "reg-kernels train: --parallel: must be ddp or fsdp where torchrun has started 2 "
        "processes, got none: each of them would train by itself and write the same files\n"
    )


def test_without_torchrun_the_command_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(word) for word in command(data, tmp_path, "--parallel", "fsdp")]) == 2
    assert capsys.readouterr().err == (
        "reg-kernels train: --parallel: must be started by torchrun, as torchrun "
        "--nproc-per-node 2 -m reg_kernels train --parallel fsdp\n"
    )


def test_words_that_are_no_options_are_told_once_a_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main(["train", "--parallel", "both"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("reg-kernels train: argument --parallel: ") == (rank == "0")
        assert said.count("\n") == (rank == "0")


def test_torchrun_trains(data: Path, tmp_path: Path) -> None:
    started = torchrun("--standalone", "--nproc-per-node", 2)
    options = {"cwd": tmp_path, "env": ENVIRONMENT}
    argv = command(data, tmp_path / "out", *SMALL, "--parallel", "ddp", "--mixup", 0)
    done = run_program([*started, *argv], **options)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == f"{SIZES}; mlp, fused kernels on cpu, ddp on 2 ranks"
    assert last == f"wrote {', '.join(RESULTS[:-1])} and {RESULTS[-1]} to {tmp_path / 'out'}"
    assert done.stdout.count("regularised") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == RESULTS
    assert main([str(word) for word in command(data, tmp_path / "one", *SMALL, "--mixup", 0)]) == 0
    assert_close(tmp_path / "out", tmp_path / "one")


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_torchrun_that_ends_early_leaves_a_checkpoint(data: Path, tmp_path: Path, how: str) -> None:
    argv = command(data, tmp_path, *SMALL, "--parallel", "ddp", "--epochs", 10**5, "--tensorboard")
    started = torchrun("--standalone", "--nproc-per-node", 2)
    process = subprocess.Popen(
        [str(word) for word in [*started, *argv]],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{SIZES}; mlp, fused kernels on cpu, ddp on 2 ranks\n"
        until = time.monotonic() + 240
        while not list(tmp_path.glob("tensorboard/plain/*")):  # which the first epoch leaves
            assert time.monotonic() < until
            time.sleep(0.1)
        if how == "interrupted":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(_last_child(process.pid), signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    path = tmp_path / "checkpoint.pt"
    assert process.returncode == 1
    assert out == ""
    assert err.count(f"add --resume to continue from {path}\n") == 1
    assert len(re.findall(r"(?m)^reg-kernels train: ", err)) <= (how == "killed")
    if how == "killed":
        assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", err)
    _, state = _train_checkpoint.load_checkpoint(path)
    assert state["epoch"] == len(state["history"]["plain"]) > 0


def _last_child(pid: int) -> int:
    """The process that a process has started last."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])


def test_two_hosts_train_together(data: Path, tmp_path: Path) -> None:
    argv = command(data, tmp_path / "out", *SMALL, "--parallel", "fsdp", "--mixup", 0)
    try:
        with running_hosts() as hosts:
            meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29511")
            processes = []
            for number, host in enumerate(hosts):
                # The two share a name, by which torchrun would look for the endpoint's host.
                where = ("--rdzv-conf", f"is_host={1 - number}", "--local-addr", host.address)
                started = torchrun("--nnodes", 2, "--nproc-per-node", 2, *meeting, *where)
                words = [str(word) for word in [*started, *argv]]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                processes.append(host.start(words, env=ENVIRONMENT, **pipes))
            said = [process.communicate(timeout=240) for process in processes]
    except NoHosts as reason:
        pytest.skip(str(reason))
    assert [process.returncode for process in processes] == [0, 0], said
    # Rank 0 is on the host that the rendezvous gave it.
    assert sorted(bool(out) for out, _ in said) == [False, True]
    assert max(out for out, _ in said).startswith(
        f"{SIZES}; mlp, fused kernels on cpu, fsdp on 4 ranks\n"
    )
    assert main([str(word) for word in command(data, tmp_path / "one", *SMALL, "--mixup", 0)]) == 0
    assert_close(tmp_path / "out", tmp_path / "one")
