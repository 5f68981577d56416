"""The concepts of a run as the dashboard shows them. Tables are held in memory, large files are held open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import polars as pl

from crossdiff.dashboard.side_tables import Activity, OpenExamples, Promoted, PromotedTokens
from crossdiff.latents.ranking import RECONSTRUCTIONS
from crossdiff.notes.store import Notebook
from crossdiff.report import wording
from crossdiff.report.cards import Display, ExampleView, example_views
from crossdiff.report.chain import StepLine, read_chain, step_lines
from crossdiff.report.concept_cards import ConceptCard, Title, concept_card, title_of
from crossdiff.report.concept_reading import COMMAND, concept_of, ranked
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.concept_wording import counted, prediction_words, told
from crossdiff.report.examples import visible
from crossdiff.report.histogram import HistogramView, histogram_view
from crossdiff.report.marks import Sign, sign_of, verdict_mark
from crossdiff.report.tables import read_table

TRAINING_NUS = ("nu_error", *RECONSTRUCTIONS)
"""The nus of a concept in each training alone, as its page shows them."""
LIST_PAGE = 25
"""Concepts on a page of the list."""
TOP, PER_QUANTILE = 10, 3
"""Examples on the page of a concept: the strongest, and from each quantile."""
TITLES = 20_000
"""Titles held in memory."""


class ConceptRow(NamedTuple):
    """A concept in a list; `explanation` is the user's label if there is one."""

    number: int
    title: Title | None
    explanation: str | None
    tokens: tuple[str, ...]
    sign: Sign
    found: str
    energy: str
    predicts: tuple[str, ...]


class Member(NamedTuple):
    """A latent of a concept; `path` is its page, if the dashboard has one."""

    training: str
    latent: int
    path: str | None
    sign: Sign
    energy: str
    correlation: str


class Concepts:
    """The concepts of one run: `paths` has the address of each of its crosscoders by name, `titles` the names of its models."""

    def __init__(
        self, run: str, found: RunConcepts, paths: Mapping[str, str], titles: Mapping[str, str], notes: Notebook
    ) -> None:
        self.run = run
        self.titles = titles
        self.found = found
        self.notes = notes
        self.ranked = ranked(found)
        self._paths = paths
        self.title = lru_cache(TITLES)(self._title)

    @cached_property
    def labels(self) -> dict[int, str]:
        """The explanations of the concepts that have one."""
        return dict(self.found.table.select("concept", "explanation").drop_nulls().rows())

    def label(self, number: int) -> str | None:
        """The user's label, or its explanation; None if there is neither."""
        return self.notes.note(number).label or self.labels.get(number)

    @property
    def path(self) -> str:
        """The address of the list of concepts."""
        return f"/run/{self.run}/concepts"

    def steps(self, number: int) -> tuple[StepLine, ...]:
        """What each step of a chain does to a concept; nothing in a run with two models."""
        return () if self._chain is None else step_lines(self._chain, "concept", number, self.titles)

    @cached_property
    def _chain(self) -> pl.DataFrame | None:
        return read_chain(self.found.folder, "concept", COMMAND)

    @cached_property
    def database(self) -> OpenExamples:
        return OpenExamples(self.found.folder / "examples.sqlite", COMMAND)

    def chosen(self, verdict: str | None, every: bool, noted: str = "") -> list[int]:
        """The concepts of a verdict, or of all; only those that replicate unless `every` or there is one training; and only
        those with a note, see `Notebook.numbers`, if one is asked for."""
        rows = self.ranked if verdict is None else self.ranked.filter(verdict=verdict)
        if not every and self.found.summary.needed is not None:
            rows = rows.filter("replicated")
        if noted:
            rows = rows.filter(pl.col("concept").is_in(self.notes.numbers(noted)))
        return rows["concept"].to_list()

    def rows(self, numbers: Sequence[int]) -> list[ConceptRow]:
        """Lines of a list of concepts."""
        n = self.found.n_trainings
        found = []
        for number in numbers:
            concept = concept_of(self.found, number, ())
            found.append(ConceptRow(
                number, self.title(number), self.label(number), tuple(map(visible, concept.tokens)),
                sign_of(wording.words(concept.verdict), verdict_mark(concept.verdict)),
                f"{concept.n_trainings} of {n}", wording.share(concept.energy),
                tuple(prediction_words(prediction) for prediction in told(concept)),
            ))  # fmt: skip
        return found

    def _title(self, number: int) -> Title | None:
        examples = self.database.examples(number, 1, 0)
        return title_of(examples[0]) if examples else None

    def card(self, number: int) -> ConceptCard:
        """The report's card of a concept with the examples of its page."""
        return concept_card(concept_of(self.found, number, self.database.examples(number, TOP, PER_QUANTILE)), self.found)

    def views(self, number: int, display: Display) -> list[ExampleView]:
        """The examples of its page."""
        concept = concept_of(self.found, number, self.database.examples(number, TOP, PER_QUANTILE))
        return example_views(concept.examples, concept.max_activation, display)

    def histogram(self, number: int) -> HistogramView | None:
        """How strongly it is active; None if the stage has stored no histogram."""
        found = self.database.histogram(number)
        return None if found is None else histogram_view(found, concept_of(self.found, number, ()).frequency)

    def members(self, number: int) -> list[Member]:
        """Its latents, in the order of the trainings."""
        return [
            Member(
                row["training"], row["latent"], self.page_of(row["training"], row["latent"]),
                sign_of(wording.words(row["verdict"]), verdict_mark(row["verdict"])), wording.share(row["energy"]),
                wording.fixed(row["correlation"]),
            )
            for row in self.member_rows(number)
        ]  # fmt: skip

    def coders(self, number: int) -> list[tuple[str, str]]:
        """The trainings with one of its latents that have pages, each with its address."""
        names = dict.fromkeys(row["training"] for row in self.member_rows(number))
        return [(name, self._paths[name]) for name in names if name in self._paths]

    def member_rows(self, number: int) -> list[dict[str, Any]]:
        """Rows of members.parquet: its latents, in the order of the trainings."""
        return self.found.members.filter(pl.col("concept") == number).to_dicts()

    def page_of(self, training: str, latent: int) -> str | None:
        """The page of a latent; None if the dashboard has none."""
        path = self._paths.get(training)
        return None if path is None else f"{path}/latent/{latent}"

    @cached_property
    def _members_of(self) -> dict[str, dict[int, int]]:
        return {training.name: self.found.of_latents(training.name) for training in self.found.summary.trainings}

    def of_latent(self, training: str, latent: int) -> int | None:
        """The concept that a latent belongs to; None if it belongs to none."""
        return self._members_of.get(training, {}).get(latent)

    def trainings(self, number: int) -> list[dict[str, Any]]:
        """Rows of trainings.parquet: its measures in each training alone."""
        return self._trainings.filter(pl.col("concept") == number).to_dicts()

    @cached_property
    def _trainings(self) -> pl.DataFrame:
        nus = [f"{nu}{end}" for nu in TRAINING_NUS for end in ("", "_low", "_high")]
        columns = ("concept", "training", "n_members", "energy", "delta_norm", "decoder_cosine", *nus, "verdict")
        return read_table(self.found.folder / "trainings.parquet", columns, COMMAND)

    def promoted(self, number: int) -> list[Promoted]:
        """The tokens that its directions promote and demote, from the table of the stage."""
        return self._promoted.of(number)

    @cached_property
    def _promoted(self) -> PromotedTokens:
        return PromotedTokens(self.found.folder / "promoted.parquet", "concept", COMMAND)

    def activity(self, number: int) -> list[dict[str, Any]]:
        """The groups of tokens on which it is active, the largest share first."""
        return self._activity.of(number)

    @cached_property
    def _activity(self) -> Activity:
        return Activity(self.found.folder / "activity.parquet", "concept", COMMAND)

    def counts(self, every: bool) -> list[tuple[str, Sign, str]]:
        """Each verdict with its sign and its number of concepts."""
        found = []
        for verdict in wording.VERDICTS:
            if n := self.found.count(verdict, replicated=not every):
                found.append((verdict, sign_of(wording.words(verdict), verdict_mark(verdict)), counted(n)))
        return found
