"""Answers on disk, keyed by the content of the request, so that no request is paid for twice."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

from crossdiff.errors import UserError

SCHEMA = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL
)"""


class Entry(NamedTuple):
    """An answer, and the tokens that it took."""

    text: str
    prompt_tokens: int
    answer_tokens: int


class Cache:
    """An SQLite file, made with the first answer. Every answer is on disk when `put` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = self._open() if path.exists() else None

    def _open(self) -> sqlite3.Connection:
        try:
            database = sqlite3.connect(self.path)
            database.execute(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it, and its answers are requested again") from None
        return database

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def get(self, key: str) -> Entry | None:
        if self._database is None:
            return None
        row = self._database.execute("SELECT text, prompt_tokens, answer_tokens FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Entry(*row)

    def put(self, key: str, entry: Entry) -> None:
        if self._database is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open()
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, *entry))
