"""Files: JSON, atomic writing, digests, read-only SQLite, and disk errors in words."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from stat import S_IMODE
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
    # Created here and exclusively, so that whatever writes to it does not write through a link that somebody has put there.
    partial.touch(exist_ok=False)
    mode = S_IMODE(partial.stat().st_mode)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)  # safetensors makes a file of its own, which only its owner may read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file; an existing one is replaced only by a complete one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text, which has no NaN and no infinity: what is undefined is null (see `number`)."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def number(value: float | None) -> float:
    """A number from JSON; NaN where it is undefined."""
    return math.nan if value is None else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with null for NaN; an existing file is replaced only by a complete one."""
    write_text(path, to_json(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. A `UserError` names a file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def open_sqlite(path: Path, any_thread: bool = False) -> sqlite3.Connection:
    """Open an SQLite database for reading only.

    Args:
        any_thread: let other threads use the connection; the caller keeps them from doing so at the same time.
    """
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=not any_thread)


def short_repr(value: object, limit: int = 200) -> str:
    """`repr` of a value from a file of unknown content, cut to `limit` characters without building all of it."""
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 4, limit, limit
    shortener.maxlist = shortener.maxtuple = shortener.maxdict = 8
    text = shortener.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


NEARLY_FULL = 2**18
"""Bytes left on a disk below which an error that nobody knows is taken for one of a full disk."""
_FULL, _READ_ONLY = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)
_FAILED = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE)
_SQLITE = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO, sqlite3.SQLITE_READONLY: errno.EROFS}


def explain_disk_error(error: BaseException, folder: Path) -> UserError | None:
    """What is wrong with a disk in one sentence, from the error of any library; None if it is something else.

    Args:
        folder: where the work was done that ended with the error.
    """
    seen: BaseException | None = error
    while seen is not None:
        if (code := _disk_error_of(seen)) is not None:
            name = getattr(seen, "filename", None)
            return _explained(code, Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None, folder)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    # Some libraries only say that writing failed.
    return _explained(errno.ENOSPC, None, folder) if _free(folder) < NEARLY_FULL else None


def _free(folder: Path) -> int:
    """Bytes that are left on the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def _disk_error_of(error: BaseException) -> int | None:
    """The error number of a disk error, from whatever library; None for others."""
    known = (*_FULL, *_READ_ONLY, *_FAILED)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in known else None
    if isinstance(error, sqlite3.Error):
        return _SQLITE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    # Libraries written in Rust or C++ give the system's message as a part of theirs.
    text = str(error)
    found = re.search(r"\(os error (\d+)\)", text)
    if found is not None:
        return int(found[1]) if int(found[1]) in known else None
    return next((code for code in (*_FULL, errno.EROFS, errno.EIO) if os.strerror(code) in text), None)


def _explained(code: int, file: Path | None, folder: Path) -> UserError:
    if code in _FULL:
        free = _free(folder if file is None else file.parent) / 1e6
        return UserError(f"the disk of {folder} is full ({free:.0f} MB left); free some space and run the same command again")
    if code in _READ_ONLY:
        return UserError(f"cannot read or write {file or folder}: {os.strerror(code)}; choose a folder where you may")
    return UserError(
        f"the disk of {folder} fails to read or write {file or 'a file'} ({os.strerror(code)}); check the disk, then run the "
        "same command again"
    )


@contextmanager
def explaining_disk_errors(folder: Path) -> Iterator[None]:
    """Raise an error of the block that comes from the disk as a `UserError` in words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explained = explain_disk_error(error, folder)
        if explained is None:
            raise
        raise explained from error
