"""Files: JSON, atomic writing, digests, read-only SQLite, and disk errors in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from crossdiff.errors import UserError


def fingerprint(value: Any) -> str:
    """A short, stable digest of plain data (JSON with sorted keys)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def matching_files(names: Iterable[str]) -> list[Path]:
    """The files of these names in order: the file of exactly this name, or else those that match it, sorted.

    Only `*` (and `**` for any folders) has a meaning in a pattern; brackets and question marks stand for themselves.
    """
    files: list[Path] = []
    for name in names:
        exact = Path(name)
        pattern = re.sub(r"[\[?]", lambda match: f"[{match.group()}]", name)
        found = [exact] if exact.is_file() else sorted(map(Path, glob(pattern, recursive=True)))
        files += [path for path in found if path.is_file()]
    return files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` at the end of the block.

    The new file is synced first, so that a kill or a full disk leaves the old one intact. After an error it is deleted.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file; an existing one is replaced only by a complete one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON; an existing file is replaced only by a complete one."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. A `UserError` names a file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def open_sqlite(path: Path, any_thread: bool = False) -> sqlite3.Connection:
    """Open an SQLite database for reading only.

    Args:
        any_thread: let other threads use the connection; the caller keeps them from doing so at the same time.
    """
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=not any_thread)


def explain_disk_error(error: OSError, path: Path) -> UserError | None:
    """A full or read-only disk as a `UserError`; None if the error is something else."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(path).free / 1e6 if path.exists() else 0.0
        return UserError(f"the disk of {path} is full ({free:.0f} MB left); free some space and run the same command again")
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return UserError(f"cannot write {error.filename or path}: {error.strerror}; choose a folder you may write to")
    return None
