"""Read a distributed checkpoint of torch without running what is in it.

Its table of contents is a pickle, which can name any function to call. A run directory may come from somebody else, so only
the few classes that such a table consists of are accepted. The tensors are read by torch with `weights_only`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

CONTENTS = ".metadata"
"""File of a checkpoint with its table of contents."""
ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata",
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip
"""Classes by module, and the function of torch that looks up the name of a memory layout."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which a checkpoint of crossdiff does not contain")
        return super().find_class(module, name)


def read_contents(path: Path) -> Metadata:
    """The table of contents of a checkpoint.

    Raises:
        pickle.UnpicklingError: it is damaged, or holds what a checkpoint does not contain, which is then not run.
    """
    try:
        with path.open("rb") as file:
            contents = _PlainUnpickler(file).load()
    except (OSError, pickle.UnpicklingError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise pickle.UnpicklingError(f"its table of contents is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(contents, Metadata):
        raise pickle.UnpicklingError(f"its table of contents is a {type(contents).__name__}")
    return contents


def problem_of(folder: Path) -> str | None:
    """What is wrong with the table of contents of a checkpoint; None if it can be read."""
    try:
        read_contents(folder / CONTENTS)
    except (OSError, pickle.UnpicklingError) as error:
        return str(error)
    return None


class PlainReader(FileSystemReader):
    """Reads a checkpoint from a folder, and only what a checkpoint consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        contents = read_contents(Path(self.path) / CONTENTS)
        contents.storage_meta = contents.storage_meta or StorageMeta()
        contents.storage_meta.load_id = self.load_id
        return contents
