"""Where the files of a store lie: in a local folder (`LocalFolder`), or in a folder that a URL names (`remote.RemoteFolder`).

A run whose store lies elsewhere has a pointer in its `activations/`, beside copies of the manifest and the table of documents,
so that a report needs no network:

    store.json               url: of the store; sha256: of its manifest
"""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from crossdiff.errors import UserError
from crossdiff.files import read_json, sha256, write_json

MANIFEST, DOCUMENTS, POINTER = "manifest.json", "documents.parquet", "store.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")

T = TypeVar("T")


class Folder(ABC):
    """A folder of files, all of them in it and none below. `where` is what messages call it."""

    where: Path | str

    def at(self, name: str) -> str:
        """A file of the place, as messages name it."""
        return f"{self.where}/{name}"

    def checked(self, name: Any) -> str:
        """The name of a file, if it cannot lead out of the place: manifests are not trusted.

        Raises:
            UserError: it is no plain file name, or a symbolic link.
        """
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name) or self._is_link(name):
            raise UserError(f"{self.at(MANIFEST)} names the shard {name!r}; expected a plain file name in the store")
        return name

    def _is_link(self, name: str) -> bool:
        return False

    def skims(self, names: Sequence[str]) -> list[Path]:
        """LocalFolder files that hold what the named safetensors files do, but perhaps for their activations."""
        return list(self.overlapped([partial(self.skim, name) for name in names]))

    @abstractmethod
    def prepare(self) -> None:
        """Make sure that the place can be written to.

        Raises:
            UserError: it cannot, and why.
        """

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of each file; symbolic links are left out. A place that is not there yet is empty."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """A local file with the content of one that fits on the local disk.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def skim(self, name: str) -> Path:
        """As `skims`, of one file."""

    @abstractmethod
    def read(self, name: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Fill memory with parts of a file: each piece is the first byte and where to put as many as there is room for.

        Raises:
            UserError: the file ends before them or cannot be read.
        """

    @abstractmethod
    def overlapped(self, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
        """The results of calls that read, in order; they wait for their answers together where there is a network."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """SHA-256 of a file."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write to; at the end of the block, and not before, it becomes the file of that name."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file."""


class LocalFolder(Folder):
    """A folder of this machine."""

    where: Path

    def __init__(self, where: Path) -> None:
        self.where = where

    def _is_link(self, name: str) -> bool:
        return (self.where / name).is_symlink()

    def prepare(self) -> None:
        try:
            self.where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.where}: {error.strerror}") from None

    def sizes(self) -> dict[str, int]:
        if not self.where.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in self.where.iterdir() if path.is_file() and not path.is_symlink()}

    def fetch(self, name: str) -> Path:
        if not (self.where / name).is_file():
            raise FileNotFoundError("no such file")
        return self.where / name

    def skim(self, name: str) -> Path:
        return self.where / name

    def read(self, name: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        path = self.where / name
        try:
            with path.open("rb", buffering=0) as file:
                for start, content in pieces:
                    while content:
                        n_read = os.preadv(file.fileno(), [content], start)
                        if not n_read:
                            raise UserError(
                                f"{path} ends at byte {start}, within its activations; restore it, or harvest again"
                            )
                        content, start = content[n_read:], start + n_read
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None

    def overlapped(self, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
        return (call() for call in calls)

    def digest(self, name: str) -> str:
        return sha256(self.where / name)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        path = self.where / f"{name}.partial"
        yield path
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(self.where / name)

    def remove(self, name: str) -> None:
        (self.where / name).unlink()


def open_folder(where: str | Path | Folder) -> Folder:
    """The place that a path or a URL names.

    Raises:
        UserError: a URL of a kind that cannot be read here.
    """
    if isinstance(where, Folder):
        return where
    text = str(where)
    if "://" not in text:
        return LocalFolder(Path(where))
    if text.startswith("file://"):
        return LocalFolder(Path(text.removeprefix("file://")))
    from crossdiff.activations.remote import RemoteFolder

    return RemoteFolder(text)


class Pointer(NamedTuple):
    """Where a run's store lies, and which it is."""

    url: str
    sha256: str


def leave_pointer(folder: Path, url: str) -> None:
    """Make a run's folder `activations` stand for the finished store at `url`."""
    place = open_folder(url)
    for name in (MANIFEST, DOCUMENTS):
        shutil.copyfile(place.fetch(name), folder / name)
    write_json(folder / POINTER, Pointer(url, sha256(folder / MANIFEST))._asdict())


def read_pointer(place: Folder) -> Pointer | None:
    """The pointer in a local folder, if there is one.

    Raises:
        UserError: it is damaged.
    """
    if not isinstance(place, LocalFolder) or not (place.where / POINTER).is_file():
        return None
    found = read_json(place.where / POINTER)
    match found:
        case {"url": str(url), "sha256": str(digest)} if "://" in url:
            return Pointer(url, digest)
    raise UserError(
        f"{place.at(POINTER)} is damaged: expected the url of a store and the sha256 of its manifest, found {found}"
    )
