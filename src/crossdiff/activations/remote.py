"""A store in a bucket or on another machine: any folder that fsspec reaches.

Files are written to the local disk and then uploaded as a whole, so the disk needs room for one shard and a bucket never has
half of one. What is read comes in few large requests, many of them at a time: pieces of a file that lie close together are
one request, and what lies between them is thrown away. Of each shard that is read all but the activations is kept in a local
file with a hole in it; that file and everything else local is in a temporary folder (`TMPDIR`) that goes with the place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from fsspec.core import url_to_fs

from crossdiff.activations.folder import Folder
from crossdiff.config import check_url
from crossdiff.errors import UserError
from crossdiff.files import explain_disk_error

IN_FLIGHT = 16
"""Requests at a time, of at most so many bytes each: what is read beside what was asked for is bounded by the two."""
REQUEST = 8 << 20
GAP = 1 << 20
"""So many bytes cost less to read and throw away than another request does."""
HEADER = 1 << 16
"""Bytes that are read of a shard first; a header is smaller by far."""

T = TypeVar("T")


@dataclass
class Request:
    """Bytes `start` to `stop` of a file, and which of them go where."""

    start: int
    stop: int
    pieces: list[tuple[int, memoryview]] = field(default_factory=list)


def requests(pieces: Iterable[tuple[int, memoryview]]) -> Iterator[Request]:
    """Few requests for many pieces: neighbours share one, and none is larger than `REQUEST`."""
    current: Request | None = None
    for begin, whole in pieces:
        for offset in range(0, len(whole), REQUEST):
            start, content = begin + offset, whole[offset : offset + REQUEST]
            stop = start + len(content)
            if current is None or not (current.start <= start <= current.stop + GAP and stop - current.start <= REQUEST):
                if current is not None:
                    yield current
                current = Request(start, stop)
            current.stop = max(current.stop, stop)
            current.pieces.append((start, content))
    if current is not None:
        yield current


class RemoteFolder(Folder):
    """A folder that a URL names.

    Raises:
        UserError: a protocol that is not known, or whose driver is not installed.
    """

    where: str

    def __init__(self, url: str) -> None:
        self.where = check_url(url).rstrip("/")
        try:
            with self._explained(ImportError):
                self._system, self._root = url_to_fs(self.where)
        except ImportError as error:
            raise UserError(
                f"{self.where} needs a package that is not installed ({error}); that of s3:// comes with "
                "`pip install 'crossdiff[remote]'`"
            ) from None
        self._scratch = Path(tempfile.mkdtemp(prefix="crossdiff-"))
        weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        # Two pools: whoever waits for the requests of a file takes no request's place.
        self._files = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="files")
        self._requests = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="requests")

    @contextmanager
    def _explained(self, *but: type[Exception]) -> Iterator[None]:
        """What a driver raises becomes the user's, `but` for these: every driver has exceptions of its own."""
        passed: tuple[type[Exception], ...] = (UserError, *but)
        try:
            yield
        except passed:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"cannot use {self.where} ({reason}); check the URL, that the bucket exists, and that this machine's "
                "credentials may read and write it; what is finished is kept, and the same command goes on from there"
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def prepare(self) -> None:
        probe = f"writable-{uuid.uuid4().hex}"  # others may try at the same time
        with self.writing(probe) as path:
            path.write_bytes(b"")
        self.remove(probe)

    def sizes(self) -> dict[str, int]:
        with self._explained():
            self._system.invalidate_cache(self._root)
            try:
                entries = self._system.ls(self._root, detail=True)
            except FileNotFoundError:  # a folder of a bucket is there once a file is in it
                return {}
        files = [entry for entry in entries if entry["type"] == "file" and not entry.get("islink")]
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in files}

    def fetch(self, name: str) -> Path:
        path = self._scratch / name
        with self._explained(FileNotFoundError):
            self._system.get_file(self._path(name), str(path))
        return path

    def skim(self, name: str) -> Path:
        path = self._scratch / name
        if not path.exists():
            with self._explained():
                self._skim(name, path)
        return path

    def _skim(self, name: str, path: Path) -> None:
        size = int(self._system.size(self._path(name)))
        head: bytes = self._system.cat_file(self._path(name), start=0, end=min(size, HEADER))
        first = 8 + int.from_bytes(head[:8], "little")
        try:
            hole = json.loads(head[8:first]).get("activations", {"data_offsets": [0, 0]})["data_offsets"]
            start, stop = (first + int(offset) for offset in hole)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"shard {self.at(name)} is damaged: its header cannot be read ({error}); harvest again") from None
        if not 8 <= start <= stop <= size:
            raise UserError(f"shard {self.at(name)} is damaged: its activations end after the file; harvest again")
        partial_path = path.with_name(path.name + ".partial")
        with partial_path.open("wb") as file:
            file.truncate(size)
            for begin, end in ((0, start), (stop, size)):
                for offset in range(begin, end, REQUEST):
                    content = self._system.cat_file(self._path(name), start=offset, end=min(end, offset + REQUEST))
                    os.pwrite(file.fileno(), content, offset)
        partial_path.replace(path)

    def read(self, name: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        list(self._requests.map(partial(self._answer, name), requests(pieces)))

    def _answer(self, name: str, request: Request) -> None:
        with self._explained():
            found = memoryview(self._system.cat_file(self._path(name), start=request.start, end=request.stop))
        if len(found) != request.stop - request.start:
            raise UserError(f"{self.at(name)} ends at byte {request.start + len(found)}; restore it, or harvest again")
        for start, content in request.pieces:
            offset = start - request.start
            content[:] = found[offset : offset + len(content)]

    def overlapped(self, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
        return self._files.map(lambda call: call(), calls)

    def digest(self, name: str) -> str:
        with self._explained():
            size = int(self._system.size(self._path(name)))
        digest, window = hashlib.sha256(), memoryview(bytearray(min(size, IN_FLIGHT * REQUEST)))
        for start in range(0, size, max(1, len(window))):
            content = window[: size - start]
            self.read(name, [(start, content)])
            digest.update(content)
        return digest.hexdigest()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        path = self._scratch / f"{name}.upload"
        try:
            try:
                yield path
            except OSError as error:
                raise explain_disk_error(error, self._scratch) or error from error
            with self._explained():
                self._system.put_file(str(path), self._path(name))
        finally:
            for left in (path, self._scratch / name):  # and what was fetched of the file that this one replaces
                left.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        with self._explained():
            self._system.rm_file(self._path(name))
