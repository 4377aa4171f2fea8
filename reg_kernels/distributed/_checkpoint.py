"""Checkpoints that are whole or not there: torch.distributed.checkpoint into a folder of its own,
which takes the old one's place when every rank has written its part."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import distributed as dist

from ._ranks import check_group


def save_checkpoint(
    state: dict[str, Any], path: str | os.PathLike[str], process_group: Any = None
) -> None:
    """Saves `state` to the folder `path`, where the old checkpoint is until the new one is whole.

    Every rank writes its own shards to `path` + ".writing"; when all have, the first rank moves
    `path` to `path` + ".old", the new folder to `path`, and removes the old one. A rank that dies
    at any time leaves a whole checkpoint behind, which `load_checkpoint` finds: the old one, or the
    new one. `torch.distributed.checkpoint.save` by itself writes over what is at its `path`. To
    save in the background, hand torch's `async_save` a new folder each time, and a process group of
    its own: what it sends must not come between what the training sends. Each value has a checksum,
    and so has the folder's table of contents.

    Args:
        state: what torch.distributed.checkpoint takes: a dictionary of tensors, DTensors, values
            and such dictionaries, as `torch.distributed.checkpoint.state_dict.get_state_dict`
            makes them. The same keys on every rank.
        path: the folder, on a file system that all ranks share.
        process_group: the ranks that save together; None takes all. Without a process group this
            process saves alone.

    Raises:
        RuntimeError: a rank could not write its part, or the first one not move the folders; or
            another rank died.
        ValueError: this process is not in the group.
        TypeError: `process_group` is none.
        ImportError: there is a process group, but no numpy, by which torch hands objects on.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    check_group("save_checkpoint", process_group)
    first = not dist.is_initialized() or dist.get_rank(process_group) == 0
    whole = Path(path)
    replace = "save_checkpoint: path must be a folder that rank 0 can replace"
    _agree(replace, functools.partial(_clear, whole) if first else None, process_group)
    _call("save_checkpoint", save, state, _beside(whole, ".writing"), process_group)
    _agree(replace, functools.partial(_move, whole) if first else None, process_group)


def load_checkpoint(
    state: dict[str, Any], path: str | os.PathLike[str], process_group: Any = None
) -> None:
    """Loads the checkpoint that `save_checkpoint` left at `path` into `state`, in place.

    The ranks may be another number than those that saved, and their shards others. Nothing in the
    folder is run: a value is a tensor or what else `torch.load(..., weights_only=True)` takes, to
    which `torch.serialization.add_safe_globals` adds.

    Args:
        state: as in `save_checkpoint`; tensors are written to, other values replaced.
        path: the folder.
        process_group: the ranks that load together; None takes all.

    Raises:
        FileNotFoundError: there is no whole checkpoint at `path`.
        RuntimeError: what is asked for is not in it, of another shape, of a type that is not
            taken, or damaged.
        ValueError, TypeError: as of `save_checkpoint`.
        ImportError: as of `save_checkpoint`.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    from ._checkpoint_reader import SafePlanner, SafeReader

    check_group("load_checkpoint", process_group)
    whole = Path(path)
    found = next((p for p in (whole, _beside(whole, ".old")) if _is_whole(p)), None)
    if found is None:
        raise FileNotFoundError(
            f"load_checkpoint: path must be a folder that save_checkpoint wrote, got {whole}"
        )
    reader = SafeReader(found)
    _agree(_usable("load_checkpoint", found), reader.read_table, process_group)
    safe = functools.partial(load, storage_reader=reader, planner=SafePlanner())
    _call("load_checkpoint", safe, state, found, process_group)


def _call(name: str, function: Any, state: dict[str, Any], path: Path, process_group: Any) -> None:
    """Calls torch's save or load; what a rank raised there becomes an error that names the rank."""
    from torch.distributed.checkpoint.api import CheckpointException

    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        if alone:  # which torch speaks up about
            warnings.simplefilter("ignore", UserWarning)
        try:
            function(state, checkpoint_id=path, process_group=process_group, no_dist=alone)
        except CheckpointException as error:  # a BaseException, which nobody would catch
            of_group, (cause, _) = next(iter(error.failures.items()))
            rank = _global(of_group, process_group)
            raise RuntimeError(
                f"{_usable(name, path)}, got {type(cause).__name__}: {cause} on rank {rank}"
            ) from cause


def _usable(name: str, path: Path) -> str:
    return f"{name}: every rank must be able to use {path}"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end: its table of contents comes last."""
    return (path / ".metadata").is_file()


def _clear(whole: Path) -> None:
    """Takes away what a save that did not end has left."""
    old, writing = _beside(whole, ".old"), _beside(whole, ".writing")
    if not _is_whole(whole) and _is_whole(old):
        shutil.rmtree(whole, ignore_errors=True)
        old.rename(whole)
    for path in (old, writing):
        if path.exists():
            shutil.rmtree(path)


def _move(whole: Path) -> None:
    """Puts what is written in its place, with the checksum of its table."""
    from ._checkpoint_reader import CHECKSUM, TABLE, checksum

    old, writing = _beside(whole, ".old"), _beside(whole, ".writing")
    with (writing / CHECKSUM).open("w") as file:
        file.write(checksum((writing / TABLE).read_bytes()))
        file.flush()
        os.fsync(file.fileno())  # as torch does with its own: an empty one would be refused
    if whole.exists():
        whole.rename(old)
    writing.rename(whole)
    shutil.rmtree(old, ignore_errors=True)


def _require_numpy() -> None:
    try:
        importlib.import_module("numpy")
    except ImportError as error:
        raise ImportError(
            "a checkpoint of several ranks needs numpy, by which torch hands objects from rank to "
            "rank, not installed here: pip install numpy"
        ) from error


def _agree(expected: str, action: Any, process_group: Any) -> None:
    """Does a rank's `action`, where it has one. The ranks go on when all are done, or all raise
    what the first of them that failed says."""
    if dist.is_initialized():
        _require_numpy()
    error: str | None = None
    if action is not None:
        try:
            action()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(errors, error, group=process_group)
    for rank, said in enumerate(errors):
        if said is not None:
            where = _global(rank, process_group)
            raise RuntimeError(f"{expected}, got {said} on rank {where}")


def _global(rank: int, process_group: Any) -> int:
    """The number among all ranks of one that a group counts."""
    return dist.get_process_group_ranks(process_group)[rank] if dist.is_initialized() else rank
