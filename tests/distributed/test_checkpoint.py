"""Checkpoints of sharded models and optimizers: by other numbers of ranks, into torch's optimizer,
and with ranks that die while one is written."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from process_group import Died, die, running_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from reg_kernels.distributed import load_checkpoint, save_checkpoint
from reg_kernels.optim import AdamW


@pytest.fixture(scope="module")
def ranks():
    with running_ranks() as pool:
        yield pool


OPTIMIZERS = {
    "ours": (AdamW, {}),
    "all of it": (AdamW, {"ema_decay": 0.9, "amsgrad": True, "max_grad_norm": 0.1}),
    "torch's": (torch.optim.AdamW, {}),
}


def made(kind):
    """A net, sharded over all ranks, with its optimizer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    of, options = OPTIMIZERS[kind]
    return model, of(model.parameters(), lr=0.05, weight_decay=0.1, **options)


def train(model, optimizer, steps=2):
    """The losses, and the parameters after the steps."""
    x = torch.linspace(-1, 1, 48).view(8, 6)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses, [p.full_tensor().detach() for p in model.parameters()]


def state_of(model, optimizer):
    weights, of_optimizer = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": of_optimizer}


def saved(path, kind, background=False):
    """Trains, saves, and trains on."""
    model, optimizer = made(kind)
    train(model, optimizer)
    state = state_of(model, optimizer)
    if background:
        # By a group of its own: what is sent meanwhile is not to come between.
        group = dist.new_group(backend="gloo")
        writing = checkpoint.async_save(state, checkpoint_id=path, process_group=group)
        result = train(model, optimizer)
        writing.result()
        return result
    save_checkpoint(state, path)
    return train(model, optimizer)


def loaded(path, kind):
    """Loads, and trains on."""
    model, optimizer = made(kind)
    state = state_of(model, optimizer)
    load_checkpoint(state, path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return train(model, optimizer)


def same(results, expected):
    for losses, params in results:
        assert losses == pytest.approx(expected[0][0], rel=1e-5)
        for own, true in zip(params, expected[0][1], strict=True):
            torch.testing.assert_close(own, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("background", [False, True])
def test_what_two_ranks_save_other_numbers_load(ranks, tmp_path, background):
    path = str(tmp_path / "checkpoint")
    expected = ranks(2, saved, path, "all of it", background)
    for size in (1, 3, 4):
        same(ranks(size, loaded, path, "all of it"), expected)


def test_torchs_optimizer_loads_ours_and_ours_loads_torchs(ranks, tmp_path):
    for kind, other in (("ours", "torch's"), ("torch's", "ours")):
        path = str(tmp_path / kind)
        expected = ranks(2, saved, path, kind)
        same(ranks(2, loaded, path, other), expected)


# Ranks that die


def dies_while_saving(path, rank, when):
    """Rank `rank` dies before it writes, or when it has written all but the table of contents; the
    first one also between two moves of folders."""
    from torch.distributed.checkpoint import FileSystemWriter

    model, optimizer = made("ours")
    train(model, optimizer)
    save_checkpoint(state_of(model, optimizer), path)
    expected = train(model, optimizer)
    if dist.get_rank() == rank and when == "moving":
        renamed = Path.rename

        def rename(self, target):
            if target == Path(path):  # what was there is moved already
                die()
            return renamed(self, target)

        Path.rename = rename
    elif dist.get_rank() == rank:
        written = FileSystemWriter.write_data

        def write_data(self, *arguments):
            if when == "written":
                written(self, *arguments).wait()
            die()

        FileSystemWriter.write_data = write_data
    try:
        save_checkpoint(state_of(model, optimizer), path)
    except Exception as error:
        return expected, f"{type(error).__name__}: {error}"
    return expected, "saved"


@pytest.mark.parametrize(("rank", "when"), [(1, "writing"), (0, "written"), (0, "moving")])
def test_a_rank_that_dies_leaves_the_last_whole_checkpoint(ranks, tmp_path, rank, when):
    path = str(tmp_path / "checkpoint")
    outcomes = ranks.outcomes(2, dies_while_saving, path, rank, when, timeout=15)
    assert outcomes[rank] == (False, Died(9))
    _, (expected, error) = outcomes[1 - rank]
    assert error != "saved"
    same(ranks(2, loaded, path, "ours"), [expected])
    # And a next save clears away what is left.
    ranks(2, saved, path, "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    same(ranks(1, loaded, path, "ours"), [expected])


def test_a_process_alone_and_what_is_not_there(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(FileNotFoundError, match="path must be a folder that save_checkpoint wrote"):
        load_checkpoint({}, path)
    save_checkpoint({"x": torch.arange(3.0), "epoch": 4}, path)
    state = {"x": torch.zeros(3), "epoch": 0}
    load_checkpoint(state, path)
    assert torch.equal(state["x"], torch.arange(3.0))
    assert state["epoch"] == 4
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"got NotADirectoryError: .* on rank 0"):
        save_checkpoint(state, tmp_path / "file" / "checkpoint")


# Folders that somebody else has written


class Trap:
    """Whoever unpickles this makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_that_a_folder_says_is_run(tmp_path):
    path, sprung = tmp_path / "checkpoint", tmp_path / "sprung"
    values = {"x": torch.arange(3.0), "names": ["a", ("b", None)], "lr": 0.5, "deep": {"on": True}}

    def refused(state, match):
        with pytest.raises(RuntimeError, match=match) as error:
            load_checkpoint(state, path)
        assert not sprung.exists()
        assert str(error.value).startswith("load_checkpoint: every rank must be able to use ")

    # A value, and the table of contents.
    save_checkpoint({"value": Trap(sprung)}, path)
    refused({"value": 0}, "weights_only")
    save_checkpoint(values, path)
    state = {"x": torch.zeros(3), "names": [0, (0, 0)], "lr": 0, "deep": {"on": 0}}
    load_checkpoint(state, path)
    assert torch.equal(state.pop("x"), values["x"])
    assert state == {k: v for k, v in values.items() if k != "x"}
    table = path / ".metadata"
    whole = table.read_bytes()
    table.write_bytes(pickle.dumps(Trap(sprung)))
    refused({"lr": 0}, r"its table of contents names posix\.mkdir")
    table.write_bytes(pickle.dumps([1]))
    refused({"lr": 0}, "its table of contents is none")
    assert b"__0_0.distcp" in whole
    table.write_bytes(whole.replace(b"__0_0.distcp", b"../secret.pt"))
    (tmp_path / "secret.pt").write_bytes((path / "__0_0.distcp").read_bytes())
    refused({"lr": 0}, r"its table of contents names the file '\.\./secret\.pt'")
    for length in range(0, len(whole), 97):
        table.write_bytes(whole[:length])
        refused({"lr": 0}, r" on rank 0$")


def test_torchs_own_loader_is_what_the_trap_is_made_for(tmp_path):
    save_checkpoint({"value": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint")
    with warnings.catch_warnings(action="ignore"):
        checkpoint.load({"value": 0}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert (tmp_path / "sprung").is_dir()
