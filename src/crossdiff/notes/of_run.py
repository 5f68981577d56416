"""The notes about one run, as `crossdiff.open(...).notes` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from operator import index
from typing import SupportsIndex

import polars as pl

from crossdiff.errors import UserError, check_latents
from crossdiff.notes.note import COMMENT, KINDS, LABEL, LIST, STAR, Note
from crossdiff.notes.store import Notebook

COLUMNS = {"note_label": pl.String(), "starred": pl.Boolean(), "comment": pl.String(), "lists": pl.List(pl.String)}


class RunNotes:
    """Your labels, stars, comments and lists for the latents and concepts of a run. The dashboard shows and writes the same.

    They are read from your file of notes whenever they are asked for, so that they include what a dashboard has just written.

    Examples:
        >>> notes = crossdiff.open("runs/demo").notes
        >>> notes.write(latent=3, label="greets", star=True, add_to=["to check"])
        >>> notes.latents.rows()
        [(3, 'greets', True, '', ['to check'])]
        >>> notes.latent(3).label
        'greets'
    """

    def __init__(self, books: Callable[[str], tuple[Notebook, int, str]]) -> None:
        """`books`: for `latent` or `concept`, the notebook, how many there are, and what has them."""
        self._books = books

    def __repr__(self) -> str:
        found = {book.kind: len(book.by_number()) for book in self._existing()}
        return f"<notes on {' and '.join(f'{n} {unit}s' for unit, n in found.items())}>"

    @property
    def latents(self) -> pl.DataFrame:
        """One row per latent with a note: `latent`, `note_label`, `starred`, `comment`, `lists`."""
        return self._table("latent")

    @property
    def concepts(self) -> pl.DataFrame:
        """One row per concept with a note.

        Raises:
            UserError: the run has no concepts yet.
        """
        return self._table("concept")

    def latent(self, latent: SupportsIndex) -> Note:
        """The note about a latent, which is empty if there is none."""
        return self._note("latent", latent)

    def concept(self, concept: SupportsIndex) -> Note:
        """The note about a concept, which is empty if there is none."""
        return self._note("concept", concept)

    def join(self, table: pl.DataFrame) -> pl.DataFrame:
        """A table of latents or concepts with the columns of their notes.

        Examples:
            >>> run = crossdiff.open("runs/demo")
            >>> run.notes.join(run.latents).filter("starred")["latent"].to_list()
            [3]
        """
        unit = "latent" if "latent" in table.columns else "concept"
        if unit not in table.columns:
            raise UserError(
                "the table has no column latent or concept, by which notes are joined to it; select one of them too"
            )
        notes = self._table(unit).cast({unit: table.schema[unit]})
        return table.join(notes, on=unit, how="left", maintain_order="left").with_columns(pl.col("starred").fill_null(False))

    def write(
        self,
        latent: SupportsIndex | None = None,
        concept: SupportsIndex | None = None,
        label: str | None = None,
        star: bool | None = None,
        comment: str | None = None,
        add_to: Iterable[str] = (),
        remove_from: Iterable[str] = (),
        seen: Note | None = None,
    ) -> None:
        """Write a note about one latent or one concept; what is None stays as it is. Values that are replaced are kept.

        Args:
            seen: the note as you read it. Then a label or comment that was changed since is not replaced.

        Raises:
            UserError: there is no such latent or concept, a value is too long, the file cannot be written, or a text was
                changed since `seen`.
        """
        if (latent is None) == (concept is None):
            raise UserError("a note is about one latent or one concept; give either latent= or concept=")
        for option, names in (("add_to", add_to), ("remove_from", remove_from)):
            if isinstance(names, str):
                raise UserError(f"{option} is {names!r}; expected names of lists, such as [{names!r}]")
        unit, number = ("concept", concept) if latent is None else ("latent", latent)
        values = {LABEL: label, COMMENT: comment, STAR: None if star is None else "yes" if star else ""}
        values |= {LIST + name: "yes" for name in add_to} | {LIST + name: "" for name in remove_from}
        times = None if seen is None else {name: seen.times.get(name, 0) for name in (LABEL, COMMENT)}
        given = {name: value for name, value in values.items() if value is not None}
        self._book(unit).edit(self._checked(unit, number), given, times)

    @property
    def digests(self) -> set[str]:
        """What identifies the crosscoder and the concepts in a file of notes."""
        return {book.of for book in self._existing()}

    def _existing(self) -> Iterator[Notebook]:
        for unit in KINDS:
            with suppress(UserError):  # a run may have no concepts
                yield self._books(unit)[0]

    def _book(self, unit: str) -> Notebook:
        book = self._books(unit)[0]
        book.by_number()
        if book.notes.problem:
            raise UserError(book.notes.problem)
        return book

    def _checked(self, unit: str, number: SupportsIndex | None) -> int:
        _, n, name = self._books(unit)
        check_latents([number], n, name, unit)
        return index(number)  # type: ignore[arg-type]

    def _note(self, unit: str, number: SupportsIndex) -> Note:
        return self._book(unit).note(self._checked(unit, number))

    def _table(self, unit: str) -> pl.DataFrame:
        notes = sorted(self._book(unit).by_number().items())
        rows = [(number, note.label, note.star, note.comment, list(note.lists)) for number, note in notes]
        return pl.DataFrame(rows, schema=pl.Schema({unit: pl.Int64(), **COLUMNS}), orient="row")
