"""Checkpoints of sharded models and optimizers: by other numbers of ranks, into torch's optimizer,
and with ranks that die while one is written."""

import os
import pathlib
import pickle
import subprocess
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
from reg_kernels.distributed._checkpoint_reader import CHECKSUM, SafeReader, _table
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
    outcomes = ranks.outcomes(2, dies_while_saving, path, rank, when)
    assert outcomes[rank] == (False, Died(9))
    _, (expected, error) = outcomes[1 - rank]
    assert error != "saved"
    same(ranks(2, loaded, path, "ours"), [expected])
    # And a next save clears away what is left.
    ranks(2, saved, path, "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    same(ranks(1, loaded, path, "ours"), [expected])


def _in_a_subgroup(path):
    group, said = dist.new_group([1, 2]), []
    state = {"x": torch.ones(4)}
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup or None, got int"):
        load_checkpoint(state, path, 0)
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="process_group must be one that this process is in"):
            save_checkpoint(state, path, group)
        return said
    save_checkpoint(state, path, group)
    if dist.get_rank() == 2:
        state["x"] = torch.ones(5)
    for call in (
        lambda: load_checkpoint(state, path, group),
        lambda: save_checkpoint(state, "/proc/no/checkpoint", group),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        said.append(str(error.value)[-10:])
    return said


def test_errors_in_a_subgroup_name_the_rank_among_all(ranks, tmp_path):
    of_each = ["on rank 2", "on rank 1"]
    expected = [[], *[[f" {x}" for x in of_each]] * 2]
    assert ranks(3, _in_a_subgroup, str(tmp_path / "checkpoint")) == expected


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
    refused({"lr": 0}, r"its table of contents names 'posix\.mkdir'")
    table.write_bytes(pickle.dumps([1]))
    refused({"lr": 0}, "its table of contents has a list for a Metadata")
    assert b"__0_0.distcp" in whole
    table.write_bytes(whole.replace(b"__0_0.distcp", b"../secret.pt"))
    (tmp_path / "secret.pt").write_bytes((path / "__0_0.distcp").read_bytes())
    refused({"lr": 0}, r"its table of contents names the file '\.\./secret\.pt'")
    for length in range(0, len(whole), 97):
        table.write_bytes(whole[:length])
        refused({"lr": 0}, r" on rank 0$")


def opcodes(*parts):
    """A pickle: its opcodes, with texts in between."""
    texts = (p if isinstance(p, bytes) else b"\x8c" + bytes([len(p)]) + p.encode() for p in parts)
    return b"\x80\x04" + b"".join(texts) + b"."


OF_TORCH = "torch.distributed.checkpoint.metadata"
# Opcodes that set, call or ask for what is not the table's own, and that ask for memory.
TABLES = {
    "state of a path's class": (
        opcodes("pathlib", "PosixPath", b"\x93N}", "_str", "/victim", b"s\x86b"),
        "sets the state of what it did not make",
    ),
    "state of torch's class": (
        opcodes(OF_TORCH, "Metadata", b"\x93}", "storage_data", b"Nsb"),
        "sets the state of what it did not make",
    ),
    "a name of a module": (opcodes("os", "system", b"\x93", "true", b"\x85R"), "names 'os.system'"),
    "a name with a dot": (
        opcodes(OF_TORCH, "os.system", b"\x93", "true", b"\x85R"),
        "names 'torch.distributed.checkpoint.metadata.os.system'",
    ),
    "a name of another kind": (opcodes(b"N", "system", b"\x93"), "names a str of a NoneType"),
    "a call of what it made": (opcodes("torch", "Size", b"\x93)R)R"), "calls a _Record"),
    "the old way to name": (opcodes(b"cos\nsystem\n"), "holds the opcode GLOBAL"),
    "the old way to make": (opcodes(b"(ios\nsystem\n"), "holds the opcode INST"),
    "an extension": (opcodes(b"\x82\x01"), "holds the opcode EXT1"),
    "an object of elsewhere": (opcodes(b"N\x51"), "holds the opcode BINPERSID"),
    "a place far away": (opcodes(b"Nr\xff\xff\xff\x7f"), "holds the opcode LONG_BINPUT"),
    "a huge text": (opcodes(b"X\xff\xff\xff\x7f"), "expected 2147483647 bytes"),
    "nothing but lists": (opcodes(b"(" + b"]" * 100), "more containers than content"),
    "lists within lists": (opcodes(b"]" * 40 + b"a" * 39), "more containers than content"),
    "an empty stack": (opcodes(b"a"), "takes more from its stack"),
    "below a mark": (opcodes(b"N(\x85"), "takes more from its stack"),
    "keys that are tuples": (opcodes(b"})Ns"), "has keys that are neither texts nor indices"),
    "items of a record": (opcodes("torch", "Size", b"\x93Na"), "adds to a _Record"),
    "no end": (opcodes(b"N")[:-1], "its table of contents|pickle exhausted"),
}


@pytest.fixture(scope="module")
def checkpoint_of_both(tmp_path_factory):
    """As torch's own save would leave it, which writes no checksum of a table."""
    path = tmp_path_factory.mktemp("both") / "checkpoint"
    save_checkpoint({"x": torch.arange(3.0), "lr": 0.5}, path)
    (path / CHECKSUM).unlink()
    return path


def refusal(path):
    with pytest.raises(RuntimeError) as error:
        load_checkpoint({"x": torch.zeros(3), "lr": 0}, path)
    start = "load_checkpoint: every rank must be able to use "
    assert str(error.value).startswith(start), error.value
    return str(error.value)


def dictionaries():
    """What the classes hold that a table may name."""
    module = checkpoint.metadata
    names = ("Metadata", "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
    classes = [*(getattr(module, name) for name in names), torch.Size, pathlib.PosixPath, Path]
    return [{name: id(value) for name, value in vars(cls).items()} for cls in classes]


@pytest.mark.parametrize("what", TABLES)
def test_a_table_sets_and_calls_nothing(checkpoint_of_both, what):
    table, match = TABLES[what]
    place = checkpoint_of_both / ".metadata"
    whole, before = place.read_bytes(), dictionaries()
    try:
        place.write_bytes(table)
        said = refusal(checkpoint_of_both)
    finally:
        if "_str" in vars(pathlib.PosixPath) and "_str" not in before[-2]:
            del pathlib.PosixPath._str  # or the tests after this one were poisoned
        place.write_bytes(whole)
    assert any(part in said for part in match.split("|")), said
    assert dictionaries() == before
    assert Path("/a") != Path("/b")


def changed_tables(whole):
    """A right table's objects with one field of a wrong type or value, as pickles."""

    def table(**fields):
        made = pickle.loads(whole)
        for name, change in fields.items():
            change(getattr(made, name))
        return pickle.dumps(made)

    def entry(**values):
        return table(state_dict_metadata=lambda found: vars(found["x"]).update(values))

    def place(**values):
        return table(
            storage_data=lambda found: [vars(info).update(values) for info in found.values()]
        )

    properties = pickle.loads(whole).state_dict_metadata["x"].properties
    chunk = pickle.loads(whole).state_dict_metadata["x"].chunks[0]
    many = [chunk] * 2000
    deep = torch.Size([0] * 65)
    yield place(offset=-1), "a number out of range for an offset"
    yield place(offset=2**80), "a number out of range for an offset"
    yield place(length=True), "a bool for a length"
    yield place(length=2**62), "is shorter than its table of contents says"
    yield place(relative_path=Path("a")), "has a _Record for the name of a file"
    yield place(relative_path="../secret.pt"), "names the file '../secret.pt'"
    yield place(relative_path="/etc/passwd"), "names the file '/etc/passwd'"
    yield place(relative_path=".."), "names the file '..'"
    yield place(relative_path=""), "names the file ''"
    yield place(relative_path="\x1b[2J/"), r"names the file '\x1b[2J/'"
    yield place(relative_path="a\0b"), r"names the file 'a\x00b'"
    yield place(transform_descriptors=["zstd"]), "has values that are packed"
    yield entry(size=(3,)), "has a tuple for a Size"
    yield entry(size=deep), "has a size that is none"
    yield entry(size=torch.Size([3, 1])), "has a chunk with other dimensions than its tensor"
    yield entry(chunks=None), "has a NoneType for chunks"
    yield entry(chunks=[1]), "has a int for a ChunkStorageMetadata"
    yield entry(properties=chunk), "has a ChunkStorageMetadata for a TensorProperties"
    yield entry(more=1), "has other fields in a TensorStorageMetadata"
    yield table(state_dict_metadata=lambda found: found.update(x=found)), "for a TensorStorageMeta"
    made = checkpoint.metadata.TensorStorageMetadata
    shared = {f"{i}": made(properties, torch.Size([3]), many) for i in range(2000)}
    yield table(state_dict_metadata=lambda found: found.update(shared)), "than its bytes hold"


def test_each_field_of_a_table_is_looked_at(checkpoint_of_both):
    place = checkpoint_of_both / ".metadata"
    whole = place.read_bytes()
    try:
        for table, match in changed_tables(whole):
            place.write_bytes(table)
            assert match in (said := refusal(checkpoint_of_both)), said
    finally:
        place.write_bytes(whole)


def test_files_are_a_folders_own(tmp_path):
    path, outside = tmp_path / "checkpoint", tmp_path / "outside"
    save_checkpoint({"x": torch.arange(3.0), "lr": 0.5}, path)
    for name in ("__0_0.distcp", ".metadata"):
        (path / name).rename(outside)
        (path / name).symlink_to(outside)
        assert "OSError" in (said := refusal(path)), said
        (path / name).unlink()
        outside.rename(path / name)
    (path / "__0_0.distcp").unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path / "__0_0.distcp")
        assert "__0_0.distcp is no regular file" in refusal(path)
        if make is os.mkfifo:
            (path / "__0_0.distcp").unlink()


def test_a_table_is_as_torch_reads_it(tmp_path):
    """Whatever torch writes there, of each kind of tensor and of value."""
    values = {
        "x": torch.arange(3.0),
        "last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": [torch.ones(1, dtype=torch.bfloat16), torch.tensor(7), torch.zeros(0, 2).bool()],
        "n" * 300: {"lr": 0.5, "names": ["a", ("b", None)]},
    }
    save_checkpoint(values, tmp_path / "checkpoint")
    place = tmp_path / "checkpoint" / ".metadata"
    own, theirs = _table(place.read_bytes()), pickle.loads(place.read_bytes())
    assert own.state_dict_metadata == theirs.state_dict_metadata
    assert own.storage_data == theirs.storage_data
    assert [k.index for k in own.storage_data] == [k.index for k in theirs.storage_data]


def test_a_table_has_a_checksum(tmp_path):
    """Where two values stand in the file, its own checksums do not tell."""
    path = tmp_path / "checkpoint"
    save_checkpoint({"x": torch.zeros(3), "y": torch.ones(3)}, path)
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUM], cwd=path, check=True)
    table = pickle.loads((path / ".metadata").read_bytes())
    first, second = table.storage_data.values()
    first.offset, second.offset = second.offset, first.offset
    (path / ".metadata").write_bytes(pickle.dumps(table))
    state = {"x": torch.full((3,), 2.0), "y": torch.full((3,), 2.0)}
    otherwise = r"not the one that \.metadata\.sha256 was written for"
    for change in (None, b"", b"0" * 76):
        if change is not None:
            (path / CHECKSUM).write_bytes(change)
        with pytest.raises(RuntimeError, match=otherwise):
            load_checkpoint(state, path)
        assert all(bool((value == 2).all()) for value in state.values())
    (path / CHECKSUM).unlink()
    (path / CHECKSUM).symlink_to("/dev/zero")
    with pytest.raises(RuntimeError, match="OSError"):
        load_checkpoint(state, path)
    (path / CHECKSUM).unlink()
    load_checkpoint(state, path)
    assert torch.equal(state["x"], torch.ones(3))


def loads_a_broken_table(path):
    state = {"x": torch.zeros(3), "lr": 0}
    if dist.get_rank() == 1:  # which alone reads a table that is none
        SafeReader.read_table = lambda self: _table(b"N.")
    try:
        load_checkpoint(state, path)
    except RuntimeError as error:
        return str(error)
    return "loaded"


def test_every_rank_hears_of_a_table_that_one_cannot_read(ranks, checkpoint_of_both):
    for said in ranks(2, loads_a_broken_table, str(checkpoint_of_both)):
        assert said.endswith(
            "got ValueError: its table of contents has a NoneType for a Metadata on rank 1"
        ), said


def test_torchs_own_loader_is_what_the_trap_is_made_for(tmp_path):
    save_checkpoint({"value": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint")
    with warnings.catch_warnings(action="ignore"):
        checkpoint.load({"value": 0}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert (tmp_path / "sprung").is_dir()
