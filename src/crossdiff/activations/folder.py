"""Folders that hold the files of a store: `LocalFolder` on this machine, `remote.RemoteFolder` behind a URL.

`locations.open_folder` returns the one that a path or URL names.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from crossdiff.errors import UserError
from crossdiff.files import replacing, sha256

MANIFEST, DOCUMENTS = "manifest.json", "documents.parquet"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")

T = TypeVar("T")


class Folder(ABC):
    """A folder of files without subfolders. `location` is its path or URL."""

    location: Path | str

    def path_of(self, name: str) -> str:
        """Full path or URL of a file, for messages."""
        return f"{self.location}/{name}"

    def checked_name(self, name: Any) -> str:
        """Return a file name from a manifest. A `UserError` refuses names that lead out of the folder, and symbolic links."""
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name) or self._is_link(name):
            raise UserError(f"{self.path_of(MANIFEST)} names the file {name!r}; expected a plain file name in the store")
        return name

    def _is_link(self, name: str) -> bool:
        return False

    def headers(self, names: Sequence[str]) -> list[Path]:
        """Return `header` of each file, fetched at the same time where there is a network."""
        return list(self.gather_calls([partial(self.header, name) for name in names]))

    def gather_calls(self, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
        """Yield the results of calls that read, in order. A remote folder makes the calls at the same time."""
        return (call() for call in calls)

    @abstractmethod
    def prepare(self) -> None:
        """Check that the folder can be written to; a local one is created. A `UserError` gives the reason why not."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Size of each file in bytes, without symbolic links. Empty if the folder does not exist yet."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """Return a local copy of a file, or the file itself if it is local. Raises `FileNotFoundError`."""

    @abstractmethod
    def header(self, name: str) -> Path:
        """Return a local safetensors file with everything in a shard but, if it is remote, the activations."""

    @abstractmethod
    def read(self, name: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Read parts of a file into memory. A piece is its first byte and the memory to fill."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """SHA-256 of a file."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Yield a local path to write to. It becomes the file at the end of the block, as a whole."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file."""


class LocalFolder(Folder):
    """A folder on this machine."""

    location: Path

    def __init__(self, location: Path) -> None:
        self.location = location

    def _is_link(self, name: str) -> bool:
        return (self.location / name).is_symlink()

    def prepare(self) -> None:
        try:
            self.location.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.location}: {error.strerror}") from None

    def sizes(self) -> dict[str, int]:
        if not self.location.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in self.location.iterdir() if path.is_file() and not path.is_symlink()}

    def fetch(self, name: str) -> Path:
        if not (self.location / name).is_file():
            raise FileNotFoundError("no such file")
        return self.location / name

    def header(self, name: str) -> Path:
        return self.location / name

    def read(self, name: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        path = self.location / name
        try:
            with path.open("rb", buffering=0) as file:
                for start, content in pieces:
                    while content:
                        n_read = os.preadv(file.fileno(), [content], start)
                        if not n_read:
                            raise UserError(f"{path} ends at byte {start}, within its activations; restore it or harvest again")
                        content = content[n_read:]
                        start += n_read
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None

    def digest(self, name: str) -> str:
        return sha256(self.location / name)

    def writing(self, name: str) -> AbstractContextManager[Path]:
        return replacing(self.location / name)

    def remove(self, name: str) -> None:
        (self.location / name).unlink()
