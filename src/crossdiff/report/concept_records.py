"""Typed, immutable records of the folder `concepts` of a run; `concept_reading` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from crossdiff.report.examples import Example
from crossdiff.report.records import BehaviourResult, Number, Overlap, Record
from crossdiff.statistics import Estimate

CHANGED = ("chat_specific", "base_specific", "rotated")
"""Verdicts that say that the models differ."""


class Interval(Record):
    """A value with the ends of its 95% interval; NaN where the file has null."""

    value: Number
    low: Number
    high: Number


class TrainingRecord(Record):
    """One training that took part: its kind of sparsity, its seeds, and how many of its latents may belong to a concept.

    The seeds of a published crosscoder are not known.
    """

    name: str
    kind: str
    seed: int | None
    batch_seed: int | None
    n_candidates: int


class Explained(Record):
    """Share of the difference between the models' activations that a set of latents of one training accounts for."""

    training: str
    set: str
    n_latents: int
    explained: Interval


class Cut(Record):
    """Number of concepts at another limit of the correlation, and of those that replicate, also with documents permuted."""

    correlation: float
    n_concepts: int
    n_replicated: int
    specific_energy: Number
    n_replicated_permuted: int


class Half(Record):
    """The replicated concepts of half of the trainings, and the share of them that the other half has as well."""

    trainings: tuple[str, ...]
    n_replicated: int
    found: Interval
    found_energy: Interval


class ConceptsSummary(Record):
    """concepts.json. `needed` is the number of trainings in which a replicated concept has a member; None with one training."""

    trainings: tuple[TrainingRecord, ...]
    correlation: float
    needed: int | None
    n_tokens: int
    cuts: tuple[Cut, ...]
    halves: tuple[Half, ...] | None
    completeness: tuple[Explained, ...]

    def explained(self, latents: str) -> list[float]:
        """The share that a set of latents accounts for, one value per training."""
        return [entry.explained.value for entry in self.completeness if entry.set == latents]


class PatchedSet(Record):
    """Share of the gap to the chat model (KL) that a set of latents of one training closes when patched together."""

    training: str
    intervention: str
    closed: Interval


class ConceptsCausal(Record):
    """causal.json of the concepts."""

    results: tuple[PatchedSet, ...]

    def closed(self, intervention: str) -> list[float]:
        """The share that an intervention closes, one value per training."""
        return [result.closed.value for result in self.results if result.intervention == intervention]


@dataclass(frozen=True, slots=True)
class NullShare:
    """Share of a crosscoder's live latents with a verdict, in this run and in its null diff."""

    here: float
    there: float


@dataclass(frozen=True, slots=True)
class Patched:
    """What a concept closes when it is patched alone in one training: nats, and the share of the gap to the chat model."""

    training: str
    reduction: Estimate[float]
    closed: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A behaviour that a concept predicts best of all replicated ones, with the AUROC on held-out conversations."""

    behaviour: str
    question: str
    auroc: Estimate[float]


@dataclass(frozen=True, slots=True)
class Concept:
    """One row of the concept table with what else is known of it. Activations are the summed v of its members.

    Attributes:
        tokens: its strongest tokens; words: words that are typical of what comes before them.
        replicated: whether enough trainings have it; None if there is only one training.
        energy: share of the candidates' energy that its members hold, mean over trainings.
        shares: share of its active tokens in each group of tokens.
        examples: its strongest contexts first.
        overlap: with the directions of the first look.
    """

    number: int
    verdict: str
    verdict_reason: str
    replicated: bool | None
    n_trainings: int
    n_members: int
    energy: float
    nu_error: Estimate[float]
    nu_reconstruction: Estimate[float]
    nu_reconstruction_nobias: Estimate[float]
    delta_norm: float
    decoder_cosine: float
    frequency: float
    n_active: int
    max_activation: float
    shares: Mapping[str, float]
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    explanation: str | None
    predictions: tuple[Prediction, ...]
    patched: tuple[Patched, ...]
    examples: tuple[Example, ...]
    overlap: Overlap


@dataclass(frozen=True, slots=True)
class RunConcepts:
    """The folder `concepts` of a run.

    Attributes:
        table: the concept table with the column `explanation` and those of `look.reading.OVERLAP_COLUMNS`.
        members: one row per latent that is a member.
        behaviours: how well the best replicated concept predicts each behaviour; `latent` is the concept's number.
        patched: rows of causal.parquet by concept; empty if the causal test was not run.
        together: what sets of latents close; None if the causal test was not run.
        null: by verdict, how often the null diff gives it, per crosscoder; None without a null diff.
        shown: the concepts that the page shows, with examples.
    """

    folder: Path
    summary: ConceptsSummary
    table: pl.DataFrame
    members: pl.DataFrame
    behaviours: tuple[BehaviourResult, ...]
    patched: Mapping[int, tuple[Patched, ...]]
    together: ConceptsCausal | None
    null: Mapping[str, tuple[NullShare, ...]] | None
    shown: tuple[Concept, ...]

    @property
    def n_trainings(self) -> int:
        return len(self.summary.trainings)

    def count(self, verdict: str | None = None, replicated: bool = True) -> int:
        """Number of concepts of a verdict, or of all verdicts; `replicated`: only those that replicate.

        With one training nothing can replicate, and all concepts are counted.
        """
        rows = self.table if verdict is None else self.table.filter(pl.col("verdict") == verdict)
        if replicated and self.summary.needed is not None:
            rows = rows.filter("replicated")
        return rows.height

    def of_latents(self, training: str) -> dict[int, int]:
        """The concept of each latent of a training that is a member of one."""
        rows = self.members.filter(pl.col("training") == training).select("latent", "concept")
        return dict(rows.iter_rows())
