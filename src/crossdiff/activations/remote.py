"""Stores in a bucket or on another machine: any folder that fsspec can reach.

A file is written to the local disk and then uploaded, so the disk needs room for one shard and a bucket never holds half of
one. Reading takes few large requests, many at a time: nearby pieces of a file share a request, and the bytes between them are
discarded.
Everything in a shard but its activations is kept in a local file with a hole in it. All local files are in a temporary folder
(`TMPDIR`) that is deleted with the `RemoteFolder`.
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
from crossdiff.files import explain_disk_error, replacing

IN_FLIGHT = 16
"""Number of simultaneous requests. Together with `REQUEST` it bounds the memory that requests need."""
REQUEST = 8 << 20
"""Largest request, in bytes."""
GAP = 1 << 20
"""Reading and discarding up to this many bytes is cheaper than another request."""
HEADER = 1 << 16
"""Number of bytes that are read of a shard first. The header is much smaller."""

T = TypeVar("T")


@dataclass
class Request:
    """Bytes `start` to `stop` of a file, and the pieces of memory to fill from them."""

    start: int
    stop: int
    pieces: list[tuple[int, memoryview]] = field(default_factory=list)


def requests(pieces: Iterable[tuple[int, memoryview]]) -> Iterator[Request]:
    """Yield few requests for many pieces: neighbours share one, and none is larger than `REQUEST`."""
    # fsspec's merge_offset_ranges would merge the ranges, but it neither splits a piece larger than a request nor tells
    # which pieces a request holds.
    current: Request | None = None
    for begin, whole in pieces:
        for offset in range(0, len(whole), REQUEST):
            content = whole[offset : offset + REQUEST]
            start = begin + offset
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
    """A folder at a URL. A `UserError` names an unknown protocol or a driver that is not installed."""

    location: str

    def __init__(self, url: str) -> None:
        self.location = check_url(url).rstrip("/")
        try:
            with self._explained(ImportError):
                self._system, self._root = url_to_fs(self.location)
        except ImportError as error:
            raise UserError(
                f"{self.location} needs a package that is not installed ({error}); install the one for s3:// with "
                "`pip install 'crossdiff[remote]'`"
            ) from None
        self._scratch = Path(tempfile.mkdtemp(prefix="crossdiff-"))
        weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        # Two pools: a thread that waits for the requests of a file must not occupy a request's place.
        self._files = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="files")
        self._requests = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="requests")

    @contextmanager
    def _explained(self, *passed: type[Exception]) -> Iterator[None]:
        """Turn a driver's exceptions, other than `passed`, into `UserError`. Every driver has exceptions of its own."""
        unchanged: tuple[type[Exception], ...] = (UserError, *passed)
        try:
            yield
        except unchanged:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"cannot use {self.location} ({reason}); check the URL, that the bucket exists, and that this machine's "
                "credentials may read and write it. Finished shards are kept; run the same command again to resume"
            ) from error

    def _remote_path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def prepare(self) -> None:
        probe = f"writable-{uuid.uuid4().hex}"  # other processes may probe at the same time
        with self.writing(probe) as path:
            path.write_bytes(b"")
        self.remove(probe)

    def sizes(self) -> dict[str, int]:
        with self._explained():
            self._system.invalidate_cache(self._root)
            try:
                entries = self._system.ls(self._root, detail=True)
            except FileNotFoundError:  # a folder in a bucket exists only once it holds a file
                return {}
        files = [entry for entry in entries if entry["type"] == "file" and not entry.get("islink")]
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in files}

    def fetch(self, name: str) -> Path:
        path = self._scratch / name
        with self._explained(FileNotFoundError):
            self._system.get_file(self._remote_path(name), str(path))
        return path

    def header(self, name: str) -> Path:
        path = self._scratch / name
        if not path.exists():
            with self._explained():
                self._fetch_header(name, path)
        return path

    def _fetch_header(self, name: str, path: Path) -> None:
        size = int(self._system.size(self._remote_path(name)))
        head: bytes = self._system.cat_file(self._remote_path(name), start=0, end=min(size, HEADER))
        first = 8 + int.from_bytes(head[:8], "little")
        try:
            hole = json.loads(head[8:first]).get("activations", {"data_offsets": [0, 0]})["data_offsets"]
            start, stop = (first + int(offset) for offset in hole)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"shard {self.path_of(name)} is damaged: its header cannot be read ({error}); harvest again"
            ) from None
        if not 8 <= start <= stop <= size:
            raise UserError(f"shard {self.path_of(name)} is damaged: its activations end beyond the file; harvest again")
        with replacing(path) as partial_path, partial_path.open("wb") as file:
            file.truncate(size)
            for begin, end in ((0, start), (stop, size)):
                for offset in range(begin, end, REQUEST):
                    content = self._system.cat_file(self._remote_path(name), start=offset, end=min(end, offset + REQUEST))
                    os.pwrite(file.fileno(), content, offset)

    def read(self, name: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        list(self._requests.map(partial(self._send, name), requests(pieces)))

    def _send(self, name: str, request: Request) -> None:
        """Send a request, and copy the answer to its pieces."""
        with self._explained():
            found = memoryview(self._system.cat_file(self._remote_path(name), start=request.start, end=request.stop))
        if len(found) != request.stop - request.start:
            raise UserError(f"{self.path_of(name)} ends at byte {request.start + len(found)}; restore it or harvest again")
        for start, content in request.pieces:
            offset = start - request.start
            content[:] = found[offset : offset + len(content)]

    def gather_calls(self, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
        return self._files.map(lambda call: call(), calls)

    def digest(self, name: str) -> str:
        with self._explained():
            size = int(self._system.size(self._remote_path(name)))
        digest = hashlib.sha256()
        window = memoryview(bytearray(min(size, IN_FLIGHT * REQUEST)))
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
                self._system.put_file(str(path), self._remote_path(name))
        finally:
            # The local copy of an earlier version of the file is out of date.
            for outdated in (path, self._scratch / name):
                outdated.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        with self._explained():
            self._system.rm_file(self._remote_path(name))
