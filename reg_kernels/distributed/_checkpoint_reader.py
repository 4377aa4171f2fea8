"""What `load_checkpoint` reads a folder with: torch's own reader runs what a file tells it to.

torch.distributed.checkpoint keeps its table of contents as a pickle, and what is no tensor as
pickles within files. Here the table may name the classes that such a table is made of, and no
others, and the values are read as `torch.load(..., weights_only=True)` reads them.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

_OF_TORCH = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    *("TensorProperties", "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta", "_StorageInfo"),
}
_OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "Path")),
}


class _TableUnpickler(pickle.Unpickler):
    """Reads a table of contents, whose classes are known."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module in _OF_TORCH and name in _NAMES) or (module, name) in _OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its table of contents names {module}.{name}")


class SafeReader(FileSystemReader):
    """torch's reader of a folder, which takes nothing from elsewhere and runs nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        with path.open("rb") as file:
            metadata = _TableUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("its table of contents is none")
        for info in metadata.storage_data.values():
            if PurePath(info.relative_path).name != info.relative_path:
                raise ValueError(f"its table of contents names the file {info.relative_path!r}")
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's way to put values in their place, which makes no objects of the file's choice."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        safe = io.BytesIO()  # torch's planner would read `value` itself as it comes
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)
