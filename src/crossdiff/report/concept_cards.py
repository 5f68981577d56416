"""The card of one concept: what it is active on, its verdict, and the rungs of evidence for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from crossdiff.report import wording
from crossdiff.report.cards import ExampleView, Piece, example_view, fires_on, pieces
from crossdiff.report.concept_records import Concept, RunConcepts
from crossdiff.report.concept_wording import (
    KINDS,
    Rung,
    in_order,
    prediction_words,
    replicated_words,
    rungs,
    told,
    verdict_words,
)
from crossdiff.report.examples import Context, Example, context_of, visible
from crossdiff.report.marks import Sign, sign_of, verdict_mark
from crossdiff.report.overlap import overlap_words

TITLE_BEFORE, TITLE_AFTER = 16, 8
"""Tokens of the strongest example that a title shows."""
SNIPPETS = 3
"""Further examples that a card shows in one line each."""


class Title(NamedTuple):
    """The strongest example around its strongest token; `cut_before`, `cut_after`: text was left out on this side."""

    pieces: tuple[Piece, ...]
    cut_before: bool
    cut_after: bool


@dataclass(frozen=True, slots=True)
class ConceptCard:
    """One concept as a page shows it.

    Attributes:
        title: None if it is never active on the analysed text.
        snippets: the next strongest examples in one line each.
        chips: in how many trainings it is, and what it predicts.
        look: what the first look says of it; empty if nothing is known.
    """

    anchor: str
    number: int
    title: Title | None
    explanation: str | None
    snippets: tuple[Title, ...]
    sign: Sign
    chips: tuple[str, ...]
    verdict: str
    rungs: tuple[Rung, ...]
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    facts: str
    look: str
    examples: tuple[ExampleView, ...]


class Group(NamedTuple):
    """The cards of the concepts with one verdict, under a heading; `n_more` were left out."""

    heading: str
    verdict: str
    cards: tuple[ConceptCard, ...]
    n_more: int


def concept_anchor(number: int) -> str:
    """The id of a concept's card on the page."""
    return f"concept-{number}"


def concept_card(concept: Concept, concepts: RunConcepts) -> ConceptCard:
    """The card of one concept of a run."""
    predicts = tuple(f"predicts {prediction_words(each)}" for each in told(concept))
    sign = sign_of(wording.words(concept.verdict), verdict_mark(concept.verdict))
    titles = tuple(title_of(example) for example in concept.examples[: SNIPPETS + 1])
    return ConceptCard(
        anchor=concept_anchor(concept.number),
        number=concept.number,
        title=titles[0] if titles else None,
        explanation=concept.explanation,
        snippets=titles[1:],
        sign=sign,
        chips=(replicated_words(concept, concepts.n_trainings), *predicts),
        verdict=verdict_words(concept),
        rungs=rungs(concept, concepts),
        tokens=tuple(visible(token) for token in concept.tokens),
        words=concept.words,
        facts=_facts(concept),
        look=overlap_words(concept.overlap, "concept"),
        examples=tuple(example_view(example, concept.max_activation) for example in concept.examples),
    )


def _facts(concept: Concept) -> str:
    where = fires_on(concept.shares)
    latents = wording.latents(concept.n_members)
    active = f"active on {wording.share(concept.frequency)} of tokens" + (f" ({where})" if where else "")
    return f"Concept {concept.number}: {latents} together, {active}, {wording.share(concept.energy)} of the energy"


def title_of(example: Example, before: int = TITLE_BEFORE, after: int = TITLE_AFTER) -> Title:
    """An example around its strongest token, which alone is marked."""
    context = context_of(example, before, after)
    tokens = tuple(token if at == context.peak else token._replace(activation=0.0) for at, token in enumerate(context.tokens))
    found = pieces(Context(tokens, context.peak, False, False), example.activation)
    return Title(
        tuple(piece._replace(begins_line=False, ends_line=False, speaker=None) for piece in found),
        context.cut_before,
        context.cut_after,
    )


def plain_title(example: Example, before: int = TITLE_BEFORE, after: int = TITLE_AFTER) -> tuple[str, str, str]:
    """The text before an example's strongest token, the token, and the text after it, without invisible characters."""
    found = title_of(example, before, after).pieces
    at = next(at for at, piece in enumerate(found) if piece.is_peak)
    peak = found[at].text
    space = " " if peak.startswith(" ") else ""
    return "".join(piece.text for piece in found[:at]) + space, peak.strip(), "".join(piece.text for piece in found[at + 1 :])


def groups(concepts: RunConcepts) -> tuple[Group, ...]:
    """The concepts that the page shows by verdict, those of the chat model alone first."""
    found = []
    for verdict, (heading, _) in KINDS.items():
        shown = in_order(concept for concept in concepts.shown if concept.verdict == verdict)
        if shown:
            cards = tuple(concept_card(concept, concepts) for concept in shown)
            found.append(Group(heading, verdict, cards, max(0, concepts.count(verdict) - len(shown))))
    return tuple(found)


class BehaviourLine(NamedTuple):
    """A labelled behaviour with the concept that predicts it best, for one question."""

    behaviour: str
    cases: str
    cells: tuple[tuple[ConceptCard | None, str], ...]
    prompt: str


def behaviour_lines(concepts: RunConcepts, cards: dict[int, ConceptCard]) -> tuple[BehaviourLine, ...]:
    """One line per behaviour: the best concept for each question, and how well the words of the prompt do."""
    lines = []
    for behaviour in dict.fromkeys(result.behaviour for result in concepts.behaviours):
        results = {result.question: result for result in concepts.behaviours if result.behaviour == behaviour}
        cells = []
        for question in wording.QUESTIONS:
            score = results[question].scores.get("concepts") if question in results else None
            card = None if score is None or score.latent is None else cards.get(score.latent)
            cells.append((card, "" if score is None else f"AUROC {wording.interval(score.auroc)}"))
        words = results["before_answer"].scores.get("bag_of_words") if "before_answer" in results else None
        prompt = "" if words is None else wording.interval(words.auroc)
        cases = wording.cases(next(iter(results.values())))
        lines.append(BehaviourLine(wording.words(behaviour), cases, tuple(cells), prompt))
    return tuple(lines)
