"""The JSON of a latent and of a concept: everything that their pages show, under stable names. NaN is null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from crossdiff.dashboard.catalogue import TOP as TOP_LATENT
from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.concepts import PER_QUANTILE, TOP, Concepts
from crossdiff.dashboard.side_tables import Promoted
from crossdiff.notes.note import Note
from crossdiff.report.cards import Card
from crossdiff.report.concept_cards import concept_card
from crossdiff.report.concept_reading import concept_of
from crossdiff.report.examples import Example

assert TOP_LATENT == TOP


class NoteRecord(BaseModel):
    """What the user noted."""

    label: str
    star: bool
    comment: str
    lists: list[str]


class ExampleRecord(BaseModel):
    """A text on which it is active. The four lists have one entry per token."""

    kind: str = Field(description="top, quantile, or band for imported examples")
    quantile: float | None
    dataset: str | None
    label: str | None
    document: int | None
    position: int = Field(description="the token with the maximum, counted from 0")
    activation: float = Field(description="v at this token")
    ids: list[int]
    texts: list[str]
    flags: list[int] = Field(description="1 BOS, 2 template, 4 user, 8 assistant, added up")
    activations: list[float] = Field(description="v; 0 where it is silent")


class TokenLogit(BaseModel):
    """A token and its logit."""

    token: str
    logit: float


class PromotedRecord(BaseModel):
    """The tokens that one direction promotes (`up`) and demotes (`down`) most in a model."""

    direction: str
    up: list[TokenLogit]
    down: list[TokenLogit]


class ActivityRecord(BaseModel):
    """How active it is on one group of tokens."""

    dataset: str | None
    group: str = Field(description="plain, bos, template, user or assistant")
    role: str | None
    template_index: int | None = Field(description="which of the template tokens of its turn")
    token: str | None
    n_tokens: int
    n_active: int
    frequency: float | None
    share: float | None = Field(description="share of its active tokens that are in this group")
    mean_activation: float | None
    max_activation: float | None


class TwinRecord(BaseModel):
    """A latent that may carry the same concept for the other model."""

    latent: int
    cosine: float | None
    n_both: int = Field(description="tokens on which both are active")
    jaccard: float | None


class NeighbourRecord(BaseModel):
    """A latent with a similar direction."""

    latent: int
    cosine: float | None


class LatentRecord(BaseModel):
    """A latent, as its page shows it."""

    run: str
    crosscoder: str
    latent: int
    address: str = Field(description="path of its page")
    verdict: str
    verdict_reason: str
    label: str | None = Field(description="your label, else its explanation, else that of its concept")
    note: NoteRecord
    explanation: str | None
    concept: int | None = Field(description="number of the concept that it is part of")
    predicts: list[str] = Field(description="behaviours that it predicts best")
    look: str = Field(description="what the first look says of it")
    measures: dict[str, Any] = Field(description="all columns of the latent table, see docs/run-directory.md")
    percentiles: dict[str, float] = Field(
        description="by measure: the share of the latents with the verdict shared that have a smaller value"
    )
    activity: list[ActivityRecord]
    twins: list[TwinRecord]
    neighbours: list[NeighbourRecord]
    promoted: list[PromotedRecord]
    examples: list[ExampleRecord] = Field(description="the strongest, then some per quantile of its activations")


class MemberRecord(BaseModel):
    """A latent of a concept."""

    training: str
    latent: int
    address: str | None = Field(description="path of its page, if it has one")
    verdict: str
    energy: float | None
    correlation: float | None


class RungRecord(BaseModel):
    """One piece of evidence for a concept: passed, failed or not measured."""

    name: str
    state: str
    why: str


class ConceptRecord(BaseModel):
    """A concept, as its page shows it."""

    run: str
    concept: int
    address: str = Field(description="path of its page")
    verdict: str
    verdict_reason: str
    label: str | None = Field(description="your label, else its explanation")
    note: NoteRecord
    explanation: str | None
    tokens: list[str] = Field(description="its strongest tokens")
    words: list[str] = Field(description="words that are typical of what comes before them")
    look: str = Field(description="what the first look says of it")
    measures: dict[str, Any] = Field(description="all columns of the concept table, see docs/run-directory.md")
    evidence: list[RungRecord]
    members: list[MemberRecord]
    trainings: list[dict[str, Any]] = Field(description="its measures in each training alone")
    activity: list[ActivityRecord]
    promoted: list[PromotedRecord]
    examples: list[ExampleRecord] = Field(description="the strongest, then some per quantile of its activations")


class ErrorRecord(BaseModel):
    """Why a request failed."""

    error: str


def latent_record(coder: Coder, row: dict[str, Any]) -> LatentRecord:
    """The record of a row of the latent table."""
    number = row["latent"]
    latent = coder.latent(row)
    card: Card = coder.card(latent)
    return LatentRecord(
        run=coder.run, crosscoder=coder.name, latent=number, address=f"{coder.path}/latent/{number}",
        verdict=row["verdict"], verdict_reason=row["verdict_reason"], label=coder.label(number),
        note=note_record(coder.notes.note(number)), explanation=row["explanation"],
        concept=None if coder.concepts is None else coder.concepts.of_latent(coder.name, number),
        predicts=list(card.predicts), look=card.look, measures=row,
        percentiles={each.name: each.share for each in coder.percentiles(row)},
        activity=[ActivityRecord.model_validate(each) for each in coder.activity(number)],
        twins=[TwinRecord.model_validate(twin | {"latent": twin["other"]}) for twin in coder.twins(number)],
        neighbours=[NeighbourRecord(latent=near["neighbour"], cosine=near["cosine"]) for near in coder.neighbours(number)],
        promoted=_promoted(coder.promoted(number)), examples=_examples(latent.examples),
    )  # fmt: skip


def concept_record(concepts: Concepts, number: int) -> ConceptRecord:
    """The record of a concept."""
    found = concepts.found
    concept = concept_of(found, number, concepts.database.examples(number, TOP, PER_QUANTILE))
    card = concept_card(concept, found)
    members = [
        MemberRecord(
            training=row["training"], latent=row["latent"], address=concepts.page_of(row["training"], row["latent"]),
            verdict=row["verdict"], energy=row["energy"], correlation=row["correlation"],
        )
        for row in concepts.member_rows(number)
    ]  # fmt: skip
    return ConceptRecord(
        run=concepts.run, concept=number, address=f"{concepts.path}/{number}", verdict=concept.verdict,
        verdict_reason=concept.verdict_reason, label=concepts.label(number), note=note_record(concepts.notes.note(number)),
        explanation=concept.explanation, tokens=list(concept.tokens), words=list(concept.words), look=card.look,
        measures=found.table.row(number, named=True),
        evidence=[RungRecord(name=rung.name, state=rung.state, why=rung.why) for rung in card.rungs],
        members=members, trainings=concepts.trainings(number),
        activity=[ActivityRecord.model_validate(each) for each in concepts.activity(number)],
        promoted=_promoted(concepts.promoted(number)), examples=_examples(concept.examples),
    )  # fmt: skip


def note_record(note: Note) -> NoteRecord:
    """A note without the times of its fields."""
    return NoteRecord(label=note.label, star=note.star, comment=note.comment, lists=list(note.lists))


def _promoted(found: Sequence[Promoted]) -> list[PromotedRecord]:
    def side(tokens: Sequence[tuple[str, float]]) -> list[TokenLogit]:
        return [TokenLogit(token=token, logit=logit) for token, logit in tokens]

    return [PromotedRecord(direction=each.name, up=side(each.up), down=side(each.down)) for each in found]


def _examples(examples: Sequence[Example]) -> list[ExampleRecord]:
    return [
        ExampleRecord(
            kind=each.kind, quantile=each.quantile, dataset=each.dataset, label=each.label, document=each.document,
            position=each.position, activation=each.activation, ids=each.tokens.ids.tolist(),
            texts=[token.text for token in each.tokens], flags=each.tokens.flags.tolist(),
            activations=[float(f"{value:.9g}") for value in each.tokens.activations.tolist()],
        )
        for each in examples
    ]  # fmt: skip
