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
from typing import Any, NamedTuple

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


class SideTable:
    """A Parquet file with rows of each latent or concept, which a run may lack.

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

    def rows(self, number: int, *order: str, descending: bool = False) -> pl.DataFrame:
        """The rows of a latent or concept, sorted; without columns if there is no file."""
        if self._file is None:
            return pl.DataFrame()
        try:
            found = pl.scan_parquet(self._file).filter(pl.col(self.unit) == number).collect()
            return found.sort(order, descending=descending, nulls_last=True, maintain_order=True)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{self.path} cannot be read as Parquet ({error}); run `{self.command}` again") from error


class Activity(SideTable):
    """The groups of tokens on which each latent or concept is active: activity.parquet."""

    def of(self, number: int) -> list[dict[str, Any]]:
        """The rows of a latent or concept, the largest share first."""
        return self.rows(number, "share", descending=True).to_dicts()


class Promoted(NamedTuple):
    """The tokens that one direction of a latent or concept promotes and demotes most in a model, with their logits."""

    name: str
    up: tuple[tuple[str, float], ...]
    down: tuple[tuple[str, float], ...]


class PromotedTokens(SideTable):
    """The tokens that the directions of each latent or concept promote: promoted.parquet. This needs no model."""

    def of(self, number: int) -> list[Promoted]:
        """Those of each direction of a latent or concept."""
        rows = self.rows(number, "rank")
        found = []
        for direction in rows["direction"].unique(maintain_order=True) if rows.height else ():
            sides = (rows.filter(direction=direction, side=side).select("token", "logit").rows() for side in ("up", "down"))
            found.append(Promoted(direction, *map(tuple, sides)))
        return found
