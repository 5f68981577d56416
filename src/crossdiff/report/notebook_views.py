"""What a notebook shows of a run, of its latents and of its concepts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from crossdiff.config import RunConfig
from crossdiff.errors import UserError
from crossdiff.notes.note import Note
from crossdiff.report import concept_wording, overview
from crossdiff.report.cards import Card, example_view
from crossdiff.report.concept_cards import ConceptCard, concept_card, plain_title
from crossdiff.report.concept_records import Concept
from crossdiff.report.examples import Example
from crossdiff.report.reading import read_run
from crossdiff.report.records import Latent
from crossdiff.report.templating import fragment

LEADING = 6
"""Concepts that the view of a run lists."""
HEALTH = {
    "latents",
    "FVE, base",
    "FVE, chat",
    "L0, active latents per token",
    "never active on held-out tokens",
    "chat-specific",
}
"""The rows of the health table that the view of a run has."""
CAVEATS = 3
"""Caveats that the view of a run has."""


class RunView(NamedTuple):
    """A run at a glance: `calls` are expressions to try next, with what each gives; `health` has a value per crosscoder."""

    title: str
    facts: list[str]
    headline: str
    leading: tuple[ConceptCard, ...]
    crosscoders: tuple[str, ...]
    health: list[overview.Row]
    caveats: list[str]
    calls: list[tuple[str, str]]


class Examples(tuple[Example, ...]):
    """Stored examples of one latent, the strongest first. A notebook tints each token by the latent's activation."""

    latent: Latent

    def __repr__(self) -> str:
        maxima = ", ".join(f"{example.activation:.3g}" for example in self)
        return f"<{len(self)} examples of latent {self.latent.latent}, maxima {maxima}>"

    def _repr_html_(self) -> str:
        views = [example_view(example, self.latent.max_activation) for example in self]
        return fragment(views=views, title=f"Latent {self.latent.latent}")


class LatentView:
    """One latent: `record` has its measures and examples, `note` is what you noted. A notebook shows it as the card of the
    report."""

    def __init__(self, record: Latent, card: Card, note: Note) -> None:
        self.record = record
        self.note = note
        self._card = card

    def __repr__(self) -> str:
        lines = [f"latent {self.record.latent}: {self._card.sign.name} ({self._card.reason})"]
        lines += [f"  {name:<34}{value}" for name, value, _ in self._card.measures]
        lines += [f"  {'active tokens':<34}{self._card.fires_on}"]
        return "\n".join([*lines, *(f"  {line}" for line in self.note.lines)])

    def _repr_html_(self) -> str:
        return fragment(cards=[self._card], notes={self.record.latent: self.note})


class ConceptView:
    """One concept: `record` has its measures and examples, `note` is what you noted. A notebook shows it as the card of the
    report."""

    def __init__(self, record: Concept, card: ConceptCard, note: Note) -> None:
        self.record = record
        self.note = note
        self._card = card

    def __repr__(self) -> str:
        name = self.record.explanation
        if name is None and self.record.examples:
            name = "{}«{}»{}".format(*plain_title(self.record.examples[0]))
        lines = [f"concept {self.record.number}: {name}", f"  {self._card.verdict}"]
        lines += [f"  {rung.name:<28}{rung.state}: {rung.why}" for rung in self._card.rungs]
        return "\n".join([*lines, *(f"  {line}" for line in self.note.lines)])

    def _repr_html_(self) -> str:
        return fragment(concepts=[self._card], notes={self.record.number: self.note})


def run_view(path: Path, config: RunConfig) -> RunView:
    """What a notebook shows of a run directory, however far the run has come."""
    look = [("run.look", "where and how the two models predict differently")] if (path / "look").is_dir() else []
    try:
        report = read_run(path)
    except UserError as error:
        title = f"What {overview.short(config.chat, '')} has that {overview.short(config.base, '')} lacks"
        return RunView(title, [], f"Not known yet: {error}.", (), (), [], [], look)
    found, coder = report.concepts, report.primary
    leading = [] if found is None else concept_wording.leading(found)[:LEADING]
    latent = coder.top.latents[0].latent if coder.top.latents else 0
    calls = [("run.concepts", "all concepts, as a table")] if found is not None else []
    calls += (
        [(f"run.concept({leading[0].number})", "the card of one concept, with its evidence and examples")] if leading else []
    )
    return RunView(
        title=overview.title(report),
        facts=overview.facts(report),
        headline=concept_wording.lead(report),
        leading=() if found is None else tuple(concept_card(concept, found) for concept in leading),
        crosscoders=tuple(each.title for each in report.crosscoders),
        health=[row for row in overview.health_rows(report) if row.name in HEALTH],
        caveats=overview.caveats(report)[:CAVEATS],
        calls=[
            *calls,
            (f"run.latent({latent})", "the card of one latent"),
            ("run.latents", "all latents, as a table"),
            ('run.activations("Some text")', "the latents that are active on a text of yours"),
            ("run.widget()", "the same with a mouse: choose what is shown, click on tokens"),
            *look,
        ],
    )
