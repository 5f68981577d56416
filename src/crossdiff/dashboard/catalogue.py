"""The runs that the dashboard shows, as they were when they were opened. Tables are held in memory, large files are held open;
nothing is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.dashboard.concepts import Concepts
from crossdiff.dashboard.editions import Edition, edition_of, one_edition
from crossdiff.dashboard.looks import RunLook
from crossdiff.dashboard.side_tables import Activity, OpenExamples, Promoted, PromotedTokens
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.latents.ranking import RANKED, title
from crossdiff.look.reading import read_look
from crossdiff.notes.identity import concept_notes, latent_notes
from crossdiff.notes.store import Notes
from crossdiff.report.cards import Card, card_of
from crossdiff.report.chain import StepLine, read_chain, step_lines
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.reading import latent_of, read_run
from crossdiff.report.records import CrosscoderReport, Latent, RunReport
from crossdiff.report.tables import read_table
from crossdiff.report.wording import predicted

TOP, PER_QUANTILE = 10, 3
"""Examples on the page of a latent: the strongest, and from each quantile."""
INDEXED = ("examples.sqlite", "interpretation.parquet", "latents.parquet")
"""Files that the search index is made from."""
PERCENTILES = ("delta_norm", *RANKED, "nu_activation", "decoder_cosine")


class Percentile(NamedTuple):
    """A latent's measure compared with the latents of the verdict shared: `share` of them have a smaller value."""

    name: str
    share: float


class Coder:
    """One crosscoder of a run; `run` and `name` make up its address. `concepts` are those of the run, None if it has none.

    Attributes:
        indexed: name, size and time of the files that the search index is made from.
    """

    def __init__(self, run: str, edition: Edition, report: RunReport, coder: CrosscoderReport, notes: Notes) -> None:
        self.run = run
        self.edition = edition
        self.report = report
        self.coder = coder
        self.name = coder.name
        self.title = coder.title
        self.directory = report.directory
        self.folder = report.directory / coder.name
        self.table = coder.latents
        self._row_of = {latent: row for row, latent in enumerate(self.table["latent"].to_list())}
        self.predicted = predicted(coder.behaviours)
        self.concepts: Concepts | None = None
        self.look: RunLook | None = None
        self.notes = latent_notes(notes, self.folder)
        paths = [self.folder / name for name in INDEXED]
        self.indexed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
        hold(self, "database", "_activity", "_chain", "_promoted", "_neighbours", "_twins", "causal")

    @property
    def path(self) -> str:
        """The address of its pages."""
        return f"/run/{self.run}/{quote(self.name, safe='')}"

    @property
    def embed_path(self) -> str:
        """The beginning of the addresses of its cards that other pages may show."""
        return f"/embed/{self.run}/{quote(self.name, safe='')}"

    @property
    def compares(self) -> bool:
        """Whether its latents have a direction in both models."""
        return self.coder.compares

    @property
    def has_weights(self) -> bool:
        """Whether the run has the crosscoder itself, whose directions are compared with those of others."""
        return (self.folder / "model.safetensors").is_file()

    @property
    def has_explanations(self) -> bool:
        return self.table["explanation"].null_count() < self.table.height

    def row(self, latent: int) -> dict[str, Any] | None:
        """The latent's row of the table; None if there is no such latent."""
        at = self._row_of.get(latent)
        return None if at is None else self.table.row(at, named=True)

    def rows(self, latents: npt.NDArray[np.int64]) -> pl.DataFrame:
        """The rows of several latents in their order."""
        return self.table[[self._row_of[latent] for latent in latents.tolist()]]

    def beside(self, latent: int) -> tuple[int | None, int | None]:
        """The previous and the next latent by number."""
        at, numbers = self._row_of[latent], self.table["latent"]
        return (int(numbers[at - 1]) if at else None, int(numbers[at + 1]) if at + 1 < len(numbers) else None)

    @cached_property
    def database(self) -> OpenExamples:
        return OpenExamples(self.folder / "examples.sqlite", "crossdiff analyze")

    def latent(self, row: dict[str, Any], top: int = TOP, per_quantile: int = PER_QUANTILE) -> Latent:
        """The record of a row, with its examples."""
        return latent_of(row, self.database, top=top, per_quantile=per_quantile)

    def label(self, latent: int) -> str | None:
        """The user's label, else its explanation, else the label or explanation of its concept; None if there is none."""
        label = self.notes.note(latent).label or self._explanations.get(latent)
        concept = None if self.concepts is None or label else self.concepts.of_latent(self.name, latent)
        return label if concept is None or self.concepts is None else self.concepts.label(concept)

    @cached_property
    def _explanations(self) -> dict[int, str]:
        return dict(self.table.select("latent", "explanation").drop_nulls().rows())

    def card(self, latent: Latent) -> Card:
        """The report's card of a latent."""
        return card_of(self.name, latent, self.predicted.get(latent.latent, ()))

    @cached_property
    def _shared(self) -> dict[str, npt.NDArray[np.float64]]:
        shared = self.table.filter(pl.col("verdict") == "shared")
        return {name: np.sort(shared[name].drop_nulls().drop_nans().to_numpy()) for name in PERCENTILES}

    def percentiles(self, row: dict[str, Any]) -> tuple[Percentile, ...]:
        """Its defined measures compared with the shared latents."""
        found = []
        for name, values in self._shared.items():
            value = row[name]
            if len(values) and value is not None and np.isfinite(value):
                found.append(Percentile(title(name), float(np.searchsorted(values, value)) / len(values)))
        return tuple(found)

    def activity(self, latent: int) -> list[dict[str, Any]]:
        """The groups of tokens on which it is active: rows of activity.parquet, the largest share first."""
        return self._activity.of(latent)

    @cached_property
    def _activity(self) -> Activity:
        return Activity(self.folder / "activity.parquet", "latent", "crossdiff analyze")

    def steps(self, latent: int) -> tuple[StepLine, ...]:
        """What each step of a chain does to it; nothing in a run with two models."""
        return () if self._chain is None else step_lines(self._chain, "latent", latent, self.report.titles)

    @cached_property
    def _chain(self) -> pl.DataFrame | None:
        return read_chain(self.folder, "latent", "crossdiff analyze")

    def promoted(self, latent: int) -> list[Promoted]:
        """The tokens that its directions promote, as `crossdiff analyze` has stored them; empty if it has not."""
        return self._promoted.of(latent)

    @cached_property
    def _promoted(self) -> PromotedTokens:
        return PromotedTokens(self.folder / "promoted.parquet", "latent", "crossdiff analyze")

    def neighbours(self, latent: int) -> list[dict[str, Any]]:
        """The nearest latents by their chat directions."""
        return _rows_of(latent, self._neighbours)

    def twins(self, latent: int) -> list[dict[str, Any]]:
        """Latents that may carry its concept in the base model, or whose concept it may carry: rows with `other`."""
        return _rows_of(latent, self._twins)

    @cached_property
    def _neighbours(self) -> pl.DataFrame:
        return self._links("neighbours.parquet", "neighbour", "cosine", "rank").sort("latent", "rank")

    @cached_property
    def _twins(self) -> pl.DataFrame:
        """Every pair twice, once for each of its latents."""
        pairs = self._links("twins.parquet", "twin", "cosine")
        sides = [pairs.with_columns(latent=mine, other=other) for mine, other in (("latent", "twin"), ("twin", "latent"))]
        return pl.concat(sides).sort("latent", "cosine", descending=[False, True])

    def _links(self, file: str, *columns: str) -> pl.DataFrame:
        """A table of links between latents; empty if the run has none."""
        path = self.folder / file
        if not path.is_file():
            return pl.DataFrame(schema=dict.fromkeys(("latent", *columns), pl.Int64))
        return read_table(path, ("latent", *columns), "crossdiff analyze")

    @cached_property
    def causal(self) -> list[dict[str, Any]]:
        """Results of the causal test; empty if it was not run."""
        path = self.folder / "causal.json"
        results: list[dict[str, Any]] = read_json(path)["results"] if path.is_file() else []
        return results


def _rows_of(latent: int, table: pl.DataFrame) -> list[dict[str, Any]]:
    """The latent's rows of a table that is sorted by latent."""
    first, end = np.searchsorted(table["latent"].to_numpy(), [latent, latent + 1])
    return table[first:end].to_dicts()


class Catalogue:
    """All runs by their addresses.

    Args:
        notes: the user's notes; default: those in the user's data folder.

    Raises:
        UserError: a run cannot be read; a `BeingReplaced` says that its results were replaced meanwhile.
    """

    def __init__(self, directories: Sequence[Path], notes: Notes | None = None) -> None:
        self.directories = tuple(directories)
        self.notes = notes or Notes()
        self.editions: dict[str, Edition] = {}
        self.coders: dict[tuple[str, str], Coder] = {}
        self.reports: dict[str, RunReport] = {}
        self.concepts: dict[str, Concepts] = {}
        self.looks: dict[str, RunLook] = {}
        with one_edition(self.directories) as editions:
            for directory, slug, edition in zip(directories, slugs(directories), editions, strict=True):
                self.editions[slug] = edition
                look = read_look(directory / "look")
                if look is None or any(directory.glob("*/latents.parquet")):
                    self._add(slug, edition, read_run(directory))
                if look is not None:
                    self._add_look(RunLook(slug, edition, directory, look, self._first_of(slug)))

    def _add(self, slug: str, edition: Edition, report: RunReport) -> None:
        self.reports[slug] = report
        for coder in report.crosscoders:
            self.coders[slug, coder.name] = Coder(slug, edition, report, coder, self.notes)
        if report.concepts is not None:
            self._add_concepts(slug, report.concepts)

    def _add_concepts(self, slug: str, found: RunConcepts) -> None:
        own = [coder for coder in self if coder.run == slug]
        paths = {coder.name: coder.path for coder in own}
        notes = concept_notes(self.notes, found.folder, found.table, found.members)
        concepts = self.concepts[slug] = Concepts(slug, found, paths, self.reports[slug].titles, notes)
        hold(concepts, "database", "_activity", "_chain", "_trainings", "_promoted")
        for coder in own:
            coder.concepts = concepts

    def _first_of(self, slug: str) -> str:
        """The crosscoder whose models a first look uses; "" if none is analysed."""
        report = self.reports.get(slug)
        return "" if report is None else report.primary.name

    def _add_look(self, look: RunLook) -> None:
        self.looks[look.run] = look
        hold(look, "tokens")
        for coder in self:
            if coder.run == look.run:
                coder.look = look

    @property
    def is_current(self) -> bool:
        """Whether the runs still hold the results that were opened."""
        return list(map(edition_of, self.directories)) == list(self.editions.values())

    def __iter__(self) -> Iterator[Coder]:
        return iter(self.coders.values())


def hold(owner: Coder | Concepts | RunLook, *parts: str) -> None:
    """Read or open what pages need later, before it can be replaced. The page that needs a damaged part reads it again, and
    shows what is wrong with it."""
    for part in parts:
        with suppress(UserError):
            getattr(owner, part)


def slugs(directories: Sequence[Path]) -> list[str]:
    """A short unique name per run for its address; the name of a directory may have any characters."""
    found: list[str] = []
    for directory in directories:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", directory.resolve().name).strip("-") or "run"
        number = 2
        slug = name
        while slug in found:
            slug, number = f"{name}-{number}", number + 1
        found.append(slug)
    return found
