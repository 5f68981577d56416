"""Live requests with their results, kept in a folder of the user's cache so that their addresses work again.

The key of an entry is the digest of its content. So two servers may share the folder, since they write the same file or
different ones; an entry that was changed or cut off is not shown; and a key that is not a digest is never used as a path.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

from crossdiff.files import to_json

MOST, MOST_BYTES = 500, 200 * 2**20
"""Entries and bytes that are kept; the oldest make room, and the newest always stays."""
IN_MEMORY = 16
"""Entries that are also held in memory, so that a click on a token reads no file."""
PARTIAL, ABANDONED = ".partial", 3600
"""End of the name of a file that is being written, and the seconds after which nobody is writing it any more."""
KEY = re.compile(r"[0-9a-f]{32}")


class Kept:
    """The entries of one folder: plain data by key. `problem` says why the last one was not written; "" if it was."""

    def __init__(self, folder: Path, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self.most = most
        self.most_bytes = most_bytes
        self.problem = ""
        self._recent: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, entry: Any) -> str:
        """Keep an entry and return its key. If the folder cannot be written, it is held in memory alone."""
        content = to_json(entry).encode()
        key = _digest(content)
        self._remember(key, json.loads(content))
        try:
            self._write(key, gzip.compress(content, 5, mtime=0))
            self.problem = ""
        except OSError as error:
            self.problem = f"{self.folder} cannot be written: {error.strerror}"
        return key

    def get(self, key: str) -> Any | None:
        """The entry of a key; None if there is none, or only a damaged one."""
        if not KEY.fullmatch(key):
            return None
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        try:
            content = gzip.decompress((self.folder / f"{key}.json.gz").read_bytes())
        except (OSError, EOFError, ValueError):
            return None
        if _digest(content) != key:
            return None
        entry = json.loads(content)
        self._remember(key, entry)
        return entry

    def _remember(self, key: str, entry: Any) -> None:
        with self._lock:
            self._recent[key] = entry
            self._recent.move_to_end(key)
            while len(self._recent) > IN_MEMORY:
                self._recent.popitem(last=False)

    def _write(self, key: str, content: bytes) -> None:
        """Write a file that only the user may read, completely or not at all, under a name of its own until then."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(dir=self.folder, prefix=f"{key}.", suffix=PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(partial, self.folder / f"{key}.json.gz")
        finally:
            Path(partial).unlink(missing_ok=True)
        self._make_room(key)

    def _make_room(self, newest: str) -> None:
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another server made room
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(PARTIAL) and time.time() - status.st_mtime < ABANDONED:
                    continue  # another server is writing it
                found.append((entry.name != f"{newest}.json.gz", -status.st_mtime_ns, status.st_size, entry.path))
        total = 0
        for number, (is_older, _, size, path) in enumerate(sorted(found)):
            total += size
            if is_older and (number >= self.most or total > self.most_bytes):
                Path(path).unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
