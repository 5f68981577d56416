"""Answers on disk, keyed by the content of the request, so that no request is paid for twice."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from crossdiff.errors import UserError
from crossdiff.files import explain_disk_error

SCHEMA = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL
)"""
PATIENCE = 30.0
"""Seconds to wait for another process that writes answers."""
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Entry(NamedTuple):
    """An answer, and the tokens that it took."""

    text: str
    prompt_tokens: int
    answer_tokens: int


class Cache:
    """An SQLite file, made with the first answer. Every answer is on disk when `put` returns.

    Args:
        patience: seconds to wait for another process that holds the file.
    """

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        self.path, self.patience = path, patience
        self._database = self._open() if path.exists() else None

    def _open(self) -> sqlite3.Connection:
        with self._explained():
            database = sqlite3.connect(self.path, timeout=self.patience)
            # Each answer was paid for, so it is synced, whatever the defaults of this SQLite are.
            database.execute("PRAGMA synchronous = FULL")
            database.execute(SCHEMA)
        return database

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def get(self, key: str) -> Entry | None:
        """The answer to a request; None if there is none. Raises like `put`."""
        if self._database is None:
            return None
        query = "SELECT text, prompt_tokens, answer_tokens FROM answers WHERE key = ?"
        with self._explained():
            row = self._database.execute(query, (key,)).fetchone()
        return None if row is None else Entry(*row)

    def put(self, key: str, entry: Entry) -> None:
        """Keep an answer.

        Raises:
            UserError: the file is locked or damaged, or it cannot be written.
        """
        if self._database is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open()
        with self._explained(), self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, *entry))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what is wrong with the file. Nothing here advises to delete it, because its answers were paid for."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without what the extended codes add
            if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                problem = f"is locked by another process, for more than {self.patience:g} s; wait for it"
            elif (full := explain_disk_error(error, self.path.parent)) is not None:
                raise full from None
            elif code in DAMAGED:
                problem = (
                    f"is damaged ({error}); move it aside and keep it, because `sqlite3 FILE .recover` may get its answers "
                    "back. Without it, they are requested again"
                )
            else:
                problem = f"cannot be used ({error}); check that its folder is there, is writable and has space left"
            raise UserError(f"{self.path} {problem}, and run the same command again") from None
