"""The large files of a crosscoder or of the concepts. They stay on disk, and open: a page that reads from one never gets the
content of the file that has taken its place."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl

from crossdiff.errors import UserError
from crossdiff.integrity import intact
from crossdiff.report.examples import ExampleDatabase


class OpenExamples(ExampleDatabase):
    """An example database with one connection, for which the threads take turns."""

    def __init__(self, path: Path, command: str) -> None:
        self._turn = threading.Lock()
        super().__init__(path, command)
        self._own: Any = SimpleNamespace(database=self._own.database)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._turn, super()._reading() as database:
            yield database

    def rows(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._reading() as database:
            return database.execute(query, values).fetchall()


class Activity:
    """The groups of tokens on which each latent or concept is active: activity.parquet, which a run may lack.

    Args:
        unit: column with the number, `latent` or `concept`.
        command: the command that writes the file.
    """

    def __init__(self, path: Path, unit: str, command: str) -> None:
        self.path = path
        self.unit = unit
        self.command = command
        self._file = intact(path).open("rb") if path.is_file() else None
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def of(self, number: int) -> list[dict[str, Any]]:
        """The rows of a latent or concept, the largest share first."""
        if self._file is None:
            return []
        try:
            found = pl.scan_parquet(self._file).filter(pl.col(self.unit) == number).collect()
            return found.sort("share", descending=True, nulls_last=True, maintain_order=True).to_dicts()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{self.path} cannot be read as Parquet ({error}); run `{self.command}` again") from error
