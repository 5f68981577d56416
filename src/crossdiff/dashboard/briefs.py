"""What a latent is about, in two lines of a table: its label, its strongest tokens, and one snippet with the token marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.search import CONTEXTS, Phrase, found_in, phrases, spans, together
from crossdiff.report.cards import ExampleView
from crossdiff.report.concept_cards import Title, title_of
from crossdiff.report.examples import TOKENS_AFTER, TOKENS_BEFORE, Example, joined, strongest_text, visible

TOKENS = 4
"""Strongest tokens that are shown."""
BEFORE, AFTER = 12, 6
"""Tokens of a snippet on either side of the marked one."""


def with_words(views: Sequence[ExampleView], search: str) -> list[ExampleView]:
    """Examples whose tokens are marked `found` where they are part of the search's words."""
    asked = phrases(search)
    return [_with_words(view, asked) for view in views]


def _with_words(view: ExampleView, asked: Sequence[Phrase]) -> ExampleView:
    texts = [piece.text for piece in view.pieces]
    where = spans(texts)
    hits = found_in(where.words, asked)
    marked = tuple(
        piece if hits.isdisjoint(where.at(at, len(text))) else piece._replace(classes=f"{piece.classes} found")
        for at, (piece, text) in enumerate(zip(view.pieces, texts, strict=True))
    )
    return view._replace(pieces=marked)


class Brief(NamedTuple):
    """A latent in two lines.

    Attributes:
        label: its explanation, or that of its concept; None without one.
        tokens: the different tokens on which its strongest examples have their maximum.
        snippet: its strongest example, or the one with the words of a search; None if no example is stored.
        matches: the marked token is one of the search's words, and not necessarily the strongest.
    """

    label: str | None
    tokens: tuple[str, ...]
    snippet: Title | None
    matches: bool


def briefs(coder: Coder, latents: Sequence[int], search: str = "") -> dict[int, Brief]:
    """The latents of a page in brief; with `search`, each snippet shows the words where the latent is most active on them."""
    examples = coder.database.strongest(latents, CONTEXTS)
    return {latent: _brief(coder.label(latent), examples.get(latent, ()), search) for latent in latents}


def _brief(label: str | None, examples: Sequence[Example], search: str) -> Brief:
    tokens = dict.fromkeys(visible(strongest_text(example)) for example in examples)
    shown = tuple(tokens)[:TOKENS]
    if matched := _match(examples, search):
        return Brief(label, shown, title_of(matched, BEFORE, AFTER), True)
    return Brief(label, shown, title_of(examples[0], BEFORE, AFTER) if examples else None, False)


def _match(examples: Sequence[Example], search: str) -> Example | None:
    """The example with the search's words, at the token of them on which the latent is most active; None if none has one.
    Examples that have all of them side by side come before the others."""
    asked, best, best_rank = phrases(search), None, (False, 0.0)
    for example in examples if asked else ():
        first = max(0, example.position - TOKENS_BEFORE)
        tokens = example.tokens[first : example.position + TOKENS_AFTER + 1]
        groups = list(joined(tokens))
        where = spans([text for _, text in groups])
        adjacent, hits = together(asked).places(where.words), found_in(where.words, asked)
        for at, (own, text) in enumerate(groups) if hits else ():
            activation, position = max((tokens[each].activation, -each) for each in range(own.start, own.stop))
            of = where.at(at, len(text))
            rank = (not adjacent.isdisjoint(of), activation)
            if not hits.isdisjoint(of) and (best is None or rank > best_rank):
                best, best_rank = replace(example, position=first - position, activation=activation), rank
    return best
